"""Hugging Face models within a module: what a checkpoint has to say of them so that they can be exported.

They are known by what they have, so that nothing of `transformers` is imported where there is none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def configurations(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The configuration of each outermost Hugging Face model in `module`, by its name in it, as `config.json` has it.

    "architectures" is the model's class, whatever the engine has renamed it to.
    """
    return {name: _configuration(model) for name, model in _outermost(module, "")}


def _outermost(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if _is_hugging_face(module):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost(child, f"{name}.{child_name}" if name else child_name)


def _is_hugging_face(module: nn.Module) -> bool:
    """A LightningModule may keep a configuration of a model, too, but has no such class attribute."""
    config = getattr(module, "config", None)
    has_config = hasattr(config, "model_type") and hasattr(config, "to_json_string")
    return has_config and hasattr(type(module), "base_model_prefix")


def _configuration(model: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(model.config.to_json_string())
    return {**config, "architectures": [_class_of(model).__name__]}


def _class_of(module: nn.Module) -> type:
    """The class before it was sharded: the engine puts a class of its own in front of it."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))
