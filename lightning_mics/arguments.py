"""Arguments that every integration takes in one form and the engine in another, and those that exclude one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_mics.checkpoint import Writers
from lightning_mics.optimizer_shards import OptimizerState
from lightning_mics.precision import Precision
from lightning_mics.sharding import MiCSModule
from lightning_mics.topology import Topology

_SHARDED = "_mics_module"


def compile_arguments(compile: bool | Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What `shard` takes: arguments of `torch.compile`, or None.

    Raises:
        TypeError: for anything but a mapping, True and False.
    """
    if isinstance(compile, Mapping):
        return compile
    if isinstance(compile, bool):
        return {} if compile else None
    raise TypeError(f"compile={compile!r} must be True, False or a mapping of torch.compile's arguments")


def check_writers(writers: Writers, optimizer_state: OptimizerState) -> None:
    """Raises:
    ValueError: where one partition group is to write what no partition group has.
    """
    if writers == Writers.GROUP and optimizer_state == OptimizerState.WORLD:
        raise ValueError(
            'writers="group" needs every partition group to hold the whole optimizer state, and '
            'optimizer_state="world" gives each a part of it; choose writers="all", or optimizer_state="partition"'
        )


# -- a module that was sharded before ----------------------------------------------------------------------------------


def sharded_before(module: nn.Module) -> MiCSModule | None:
    """The root of a module that was sharded, by whomever."""
    root: MiCSModule | None = module.__dict__.get(_SHARDED)
    return root


def remember_sharded(module: nn.Module, root: MiCSModule) -> None:
    """Have `sharded_before` find the root. It is no submodule: the module's state dict is as it was."""
    module.__dict__[_SHARDED] = root


def check_sharded_alike(sharded: MiCSModule, topology: Topology, precision: Precision) -> None:
    """Raises:
    ValueError: where a sharded module is to be run otherwise than it was sharded for.
    """
    if (sharded.groups.topology, sharded.precision) != (topology, precision):
        raise ValueError(
            f"the model is sharded already, for {sharded.groups.topology} and {sharded.precision}, and is to be run by "
            f"{topology} and {precision} now; build a new model, or keep partition_size and precision"
        )
