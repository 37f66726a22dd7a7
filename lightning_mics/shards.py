"""Shards: a rank's part of a tensor, and a part as a tensor that is sharded as another. Whole tensors are their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

outside_inference_mode = torch.inference_mode(mode=False)
"""For functions that copy or write shards, which torch cannot do in the inference mode that a caller may be in."""


def local_part(tensor: Tensor) -> Tensor:
    """This rank's, sharing its memory, without autograd."""
    own = tensor.detach()
    return own.to_local() if isinstance(own, DTensor) else own


def sharded_as(local: Tensor, like: Tensor, mesh: DeviceMesh | None = None) -> Tensor:
    """A tensor whose part on this rank is `local`, of the shape of `like` and sharded as it is. No communication.

    Args:
        local: of the shape of this rank's part of `like`, in any dtype and on the devices of the mesh.
        like: sharded, or whole, as the result is then.
        mesh: of the same ranks, if it is another than that of `like`.
    """
    if not isinstance(like, DTensor):
        return local
    mesh = mesh or like.device_mesh
    return DTensor.from_local(local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
