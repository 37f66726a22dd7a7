"""A sharded module's state dict, whole, on those ranks that want it; one tensor is whole elsewhere at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics._compat import all_gather_single
from lightning_mics.checkpoint.flat import aliases_in


def whole_state_dict(module: nn.Module, *, keep: bool) -> dict[str, Any]:
    """The state dict with whole tensors, on the CPU. Collective on the partition group: all-gathers.

    Args:
        module: sharded by rows over one axis, or not at all; its hooks for state dicts run.
        keep: whether this rank wants it; otherwise it gets an empty one.
    """
    state: dict[str, Any] = {}
    aliases = aliases_in(module)
    for name, value in module.state_dict().items():
        if name not in aliases:
            whole = _whole(value) if isinstance(value, Tensor) else value
            if keep:
                state[name] = whole.cpu() if isinstance(whole, Tensor) else whole
        elif keep:
            state[name] = state[aliases[name]]  # one tensor, as in a module that is not sharded
    return state


@torch.no_grad()
def _whole(tensor: Tensor) -> Tensor:
    """Of the ranks that a tensor is sharded over, each has as many rows as the first, but for the last of them."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    mesh, local = tensor.device_mesh, tensor.to_local()
    rows = -(-len(tensor) // mesh.size())
    own = local.new_zeros(rows, *tensor.shape[1:])
    own[: len(local)] = local
    whole = own.new_empty(rows * mesh.size(), *tensor.shape[1:])
    all_gather_single(whole, own, mesh.get_group())
    return whole[: len(tensor)]
