"""What every integration takes in one form and the engine in another, what excludes what, and a module's root."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_mics.blocks import BlockChoice
from lightning_mics.checkpoint import Writers
from lightning_mics.groups import Groups
from lightning_mics.network import Network
from lightning_mics.offload import Offload
from lightning_mics.optimizer_shards import OptimizerState
from lightning_mics.precision import Precision
from lightning_mics.sharding import MiCSModule, shard
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


def root_of(
    module: nn.Module,
    topology: Topology,
    precision: Precision,
    groups: Callable[[], Groups],
    *,
    blocks: BlockChoice,
    activation_checkpointing: bool,
    compile: Mapping[str, Any] | None,
    network: Network | None,
    offload: Offload | None,
) -> MiCSModule:
    """The root of a module, which was sharded before or is now, at the beginning of a window; see `shard`.

    It is no submodule of the module, whose state dict is as it was.

    Args:
        groups: makes those of `topology`, or gives them; called only where the module is sharded now.

    Raises:
        ValueError: where a sharded module is to be run otherwise than it was sharded for.
    """
    root = sharded_before(module)
    if root is None:
        root = module.__dict__[_SHARDED] = shard(
            module,
            groups(),
            blocks=blocks,
            activation_checkpointing=activation_checkpointing,
            compile=compile,
            precision=precision,
            network=network,
            offload=offload,
        )
    elif (root.groups.topology, root.precision) != (topology, precision):
        raise ValueError(
            f"the model is sharded already, for {root.groups.topology} and {root.precision}, and is to be run by "
            f"{topology} and {precision} now; build a new model, or keep partition_size and precision"
        )
    elif (root.offload == Offload.PARAMETERS) != (offload == Offload.PARAMETERS):
        raise ValueError(
            f"the model is sharded already, with offload={_said(root.offload)}, and is to be run with "
            f"offload={_said(offload)} now, which would move its shards; build a new model, or keep offload"
        )
    root.forget_optimizer()
    root.window.drop()
    root.release()
    return root


def _said(offload: Offload | None) -> str:
    return "None" if offload is None else f'"{offload}"'
