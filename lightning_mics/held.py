"""Held: gradients that stay whole until the boundary.

The engine can leave a micro-step's gradients where autograd puts them, on the gathered parameters, which outlive what
they gather; autograd adds the next micro-step's to them. The first backward in which the engine may reduce takes the
sums along. They are in 16 bits no longer than a backward: the engine sums in the dtype in which it reduces.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_mics._compat import forget_held_gradients, reduce_held_gradients


class HeldGradients:
    """Tells the engine when to reduce.

    Args:
        root: the sharded root.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._holds = False
        self._any = False  # since the last `forget`

    @property
    def holds(self) -> bool:
        """Whether the last backward's gradients are held."""
        return self._holds

    def hold(self, holds: bool) -> None:
        """Whether the coming backward's gradients are held; otherwise they are reduced, with all that were."""
        self._any = self._any or holds
        if holds != self._holds:
            self._holds = holds
            self._root.set_requires_gradient_sync(not holds)

    def reduce(self) -> None:
        """Begin hop 1 of what is held, if anything is, without a backward. Collective on the partition group."""
        if self._any:
            self.hold(False)
            with torch.no_grad():
                reduce_held_gradients(self._root)

    def forget(self, params: Iterable[nn.Parameter] | None = None) -> None:
        """Drop what is held, or what of it is of `params`."""
        if self._any:
            forget_held_gradients(self._root, params)
        self._any = self._any and params is not None
