"""What a Lightning user may ask for and shards cannot do: refused before training starts, with what to use instead."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_mics._compat import steps_in_backward

_AVERAGING = (
    "averages copies of whole parameters and cannot average shards; use lightning_mics.callbacks.WeightAveraging{}"
)
# Lightning's callbacks, in either tree of classes, by name.
_CALLBACKS = {
    "StochasticWeightAveraging": _AVERAGING.format("(decay=None, start_step=...)"),
    "WeightAveraging": _AVERAGING.format(""),
    "BatchSizeFinder": (
        "is not supported with distributed strategies: a rank that runs out of memory would leave the others waiting; "
        'use lightning_mics.callbacks.BatchSizeFinder(), which lets none, or MiCSStrategy(micro_batch="auto"), which '
        "plans the batch from shapes and memory"
    ),
}
# Those that shard, by name; each rank would step its own part of what is a part already.
_SHARDING = {
    "ZeroRedundancyOptimizer": (
        "shards the optimizer state, which is sharded already: over the partition group, or with "
        'optimizer_state="world" over all ranks; use the optimizer that it was given as optimizer_class'
    ),
}
_MEANS = "takes norms of whole rows and columns, which torch cannot take of shards"
# torch's, and others' of the same name.
_OPTIMIZERS = {
    "LBFGS": "lays all parameters out as one vector, which shards are not",
    "Adafactor": _MEANS,
    "Rprop": "writes by index, which torch cannot do to shards",
}


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Refuse callbacks that hold whole parameters, or cannot keep ranks in step.

    Raises:
        ValueError: naming the callback, and what to use instead.
    """
    for callback in callbacks:
        for base in takewhile(_is_not_ours, type(callback).__mro__):
            if base.__name__ in _CALLBACKS:
                raise ValueError(f"{type(callback).__name__} {_CALLBACKS[base.__name__]}")


def _is_not_ours(base: type) -> bool:
    return base.__module__.split(".")[0] != "lightning_mics"


def check_checkpoint_io(checkpoint_io: Any) -> None:
    """Refuse a plugin that is to write checkpoints.

    Raises:
        ValueError: naming it, and what to use instead.
    """
    if type(checkpoint_io).__name__ != "TorchCheckpointIO":  # what Lightning has where nobody asks
        raise ValueError(
            f"plugins={type(checkpoint_io).__name__}: every rank writes its own part of a checkpoint, and no "
            "CheckpointIO is asked to; leave it out. Under a Trainer, MiCSStrategy(async_save=True) saves beside "
            "training"
        )


def check_optimizers(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers that cannot step shards.

    Raises:
        ValueError: naming the optimizer, and what to use instead.
    """
    for optimizer in optimizers:
        if type(optimizer).__module__.split(".")[0] == "bitsandbytes":
            raise ValueError(
                f"{type(optimizer).__name__} of bitsandbytes runs kernels that know no shards; use torchao's "
                "(torchao.optim.AdamW8bit), or keep parameters whole: partition_size=1"
            )
        for base in type(optimizer).__mro__:
            if base.__name__ in _SHARDING:
                raise ValueError(f"{type(optimizer).__name__} {_SHARDING[base.__name__]}")
            if base.__name__ in _OPTIMIZERS:
                raise ValueError(
                    f"{type(optimizer).__name__} {_OPTIMIZERS[base.__name__]}; choose an optimizer that treats "
                    "elements alike, as AdamW or SGD, or keep parameters whole: partition_size=1, "
                    'optimizer_state="partition"'
                )


def check_not_in_backward(module: nn.Module) -> None:
    """Refuse a module whose parameters are stepped while backward runs.

    Raises:
        ValueError: naming the first such parameter.
    """
    for name, param in module.named_parameters():
        if steps_in_backward(param):
            raise ValueError(
                f"{name} is stepped by an optimizer in backward, before its gradient has been averaged over the ranks; "
                "return the optimizer from configure_optimizers instead"
            )
