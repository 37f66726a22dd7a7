"""Flat: this rank's gradients of one bucket as one piece of memory, one behind the other, as hop 1 leaves them.

What lies so is reduced and added to in one operation, where it lies. A user who replaces a gradient by another tensor
loses nothing but that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ShardGradient:
    """A rank's part of a gradient, and how many elements every rank of its partition group has room for."""

    local: Tensor
    room: int

    def padded(self) -> Tensor:
        """One-dimensional, `room` elements long; a copy where it is not that already."""
        return torch.nn.functional.pad(self.local.reshape(-1), (0, self.room - self.local.numel()))


def together(gradients: Sequence[ShardGradient]) -> Tensor | None:
    """The memory in which `gradients` lie, each with its room behind it, and nothing else; None if they lie otherwise.

    One-dimensional, of their dtype.
    """
    if not gradients:
        return None
    first = gradients[0].local
    storage, room = first.untyped_storage(), sum(gradient.room for gradient in gradients)
    if storage.nbytes() != room * first.itemsize:
        return None
    offset, start = 0, storage.data_ptr()
    for gradient in gradients:
        local = gradient.local
        there = local.data_ptr() == start + offset * first.itemsize or not local.numel()
        if not (there and local.dtype == first.dtype and local.is_contiguous()):
            return None
        offset += gradient.room
    return first.as_strided((room,), (1,), 0)
