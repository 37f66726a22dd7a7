"""Counterparts: what a Trainer or a Fabric is asked for in a test of Lightning's, and what is asked of "mics" instead.

The rules are those of `docs/migrating.md`. What has no counterpart is an error, so that no test passes by leaving out
what it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.fabric.strategies as fabric_strategies
import lightning.pytorch.strategies as pytorch_strategies
from torch import nn
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

_ACCELERATORS = ("auto", "cuda", "gpu")
_NAMES = ("auto", "ddp", "fsdp", "single_device")  # and what begins so, as "ddp_spawn"
_WHOLE = 'has no counterpart under "mics"'
_PARTITION_SIZES: dict[ShardingStrategy, Any] = {
    ShardingStrategy.FULL_SHARD: None,
    ShardingStrategy.SHARD_GRAD_OP: None,
    ShardingStrategy.NO_SHARD: 1,
    ShardingStrategy.HYBRID_SHARD: "node",
    ShardingStrategy._HYBRID_SHARD_ZERO2: "node",
}


class NoCounterpartError(Exception):
    """A test asks for what "mics" has not."""


def accelerator(asked: Any) -> Any:
    """The CPU for a GPU, and what was asked for otherwise."""
    if asked in _ACCELERATORS or type(asked).__name__ == "CUDAAccelerator":
        return "cpu"
    return asked


def devices(asked: Any) -> Any:
    """As many processes as there would be GPUs; a list of GPUs, or one of them as a string, counts them."""
    if isinstance(asked, list | tuple):
        return len(asked)
    return asked


def arguments(asked: Any) -> Mapping[str, Any] | None:
    """Our strategy's arguments for a strategy that was asked for; None if it is one to leave alone.

    Raises:
        NoCounterpartError: naming what there is none for.
    """
    if asked is None:
        return {}
    if isinstance(asked, str):
        return _of_name(asked.lower())
    for modules in (pytorch_strategies, fabric_strategies):
        for name, read in _READ.items():
            if type(asked) is getattr(modules, name):
                return {**_common(asked), **read(asked)}
    return None


def _of_name(name: str) -> Mapping[str, Any] | None:
    return {} if name.startswith(_NAMES) else None


def _common(asked: Any) -> dict[str, Any]:
    """What every strategy takes."""
    given = {
        "accelerator": getattr(asked, "_accelerator", None),
        "parallel_devices": getattr(asked, "_parallel_devices", None),
        "cluster_environment": getattr(asked, "cluster_environment", None),
        "checkpoint_io": getattr(asked, "_checkpoint_io", None),
        "process_group_backend": getattr(asked, "_process_group_backend", None),
        "precision_plugin": getattr(asked, "_precision_plugin", None),
        "precision": getattr(asked, "_precision", None),
    }
    return {name: value for name, value in given.items() if value is not None}


def _of_single_device(asked: Any) -> dict[str, Any]:
    return {}


def _of_ddp(asked: Any) -> dict[str, Any]:
    for name in ("_ddp_comm_hook", "_model_averaging_period"):
        if getattr(asked, name, None) is not None:
            raise NoCounterpartError(f"{name.removeprefix('_')} {_WHOLE}")
    return {"timeout": asked._timeout}


def _of_fsdp(asked: Any) -> dict[str, Any]:
    kwargs = getattr(asked, "kwargs", None) or getattr(asked, "_fsdp_kwargs", {})
    if asked.cpu_offload is not None and asked.cpu_offload.offload_params:
        raise NoCounterpartError(f"cpu_offload {_WHOLE}")
    found: dict[str, Any] = {"partition_size": _PARTITION_SIZES[asked.sharding_strategy], "timeout": asked._timeout}
    if (mesh := kwargs.get("device_mesh")) is not None and found["partition_size"] == "node":
        found["partition_size"] = mesh[1] if isinstance(mesh, tuple) else mesh.size(1)
    if (policy := kwargs.get("auto_wrap_policy")) is not None:
        found["blocks"] = blocks(policy)
    if asked._activation_checkpointing_kwargs:
        found["activation_checkpointing"] = True
    if asked.mixed_precision is not None:
        found["param_dtype"] = asked.mixed_precision.param_dtype
        found["reduce_dtype"] = asked.mixed_precision.reduce_dtype
    return found


def blocks(policy: Any) -> Any:
    """The blocks that an FSDP wrapping policy would choose: the innermost, as blocks are not nested."""
    if isinstance(policy, ModuleWrapPolicy):
        return policy

    def wrapped(module: nn.Module) -> bool:
        count = sum(param.numel() for param in module.parameters())
        return count > 0 and bool(policy(module=module, recurse=False, nonwrapped_numel=count))

    def chosen(name: str, module: nn.Module) -> bool:
        _, *inside = module.modules()
        return name != "" and wrapped(module) and not any(map(wrapped, inside))

    return chosen


def _of_model_parallel(asked: Any) -> dict[str, Any]:
    tensor_parallel = asked._tensor_parallel_size
    if tensor_parallel not in ("auto", 1):
        raise NoCounterpartError(f"tensor_parallel_size={tensor_parallel} {_WHOLE}")
    return {"partition_size": None, "timeout": asked._timeout}


_READ: dict[str, Callable[[Any], dict[str, Any]]] = {
    "SingleDeviceStrategy": _of_single_device,
    "DDPStrategy": _of_ddp,
    "FSDPStrategy": _of_fsdp,
    "ModelParallelStrategy": _of_model_parallel,
}
