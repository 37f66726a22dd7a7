"""Recompute: activations that are computed again in backward, block by block, and not kept."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mics._compat import CheckpointWrapper
from lightning_mics.blocks import Block


def checkpoint_activations(module: nn.Module) -> None:
    """Recompute `module`'s forward in backward. On the instance, so that neither its class nor its names change."""
    plain: Callable[..., Any] = module.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if module.training and torch.is_grad_enabled():
            return checkpoint(plain, *args, use_reentrant=False, **kwargs)
        return plain(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]


def already_recomputing(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Those that the user has told to; doing so twice would compute them three times. Rank 0 warns of them.

    By torch's `apply_activation_checkpointing`, or by transformers' `gradient_checkpointing_enable()`.
    """
    found = tuple(block for block in blocks if any(map(_recomputes, block.module.modules())))
    if found and dist.get_rank() == 0:
        names = ", ".join(block.name for block in found[:3])
        warnings.warn(
            "activation_checkpointing=True is configured, but the model already contains checkpointed layers, which "
            f"are left as they are: {names}{', ...' * (len(found) > 3)}",
            stacklevel=3,
        )
    return found


def _recomputes(module: nn.Module) -> bool:
    return isinstance(module, CheckpointWrapper) or bool(getattr(module, "gradient_checkpointing", False))
