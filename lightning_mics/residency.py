"""Residency: what stays whole where the engine would free it, and what a user sees meanwhile.

A block at which a forward turns into a backward, or a backward into the next micro-step's forward, is needed at once
again, and stays; so does whatever the memory ladder says. The engine registers a gathered parameter in place of its
shard until it frees it. Whoever reads parameters between forwards (clears gradients, logs them, saves) is to find the
shards, with the window's sums, so they are put back in their places until the backward or the next forward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from lightning_mics.ladder import Parameters, Rung

_Place = tuple[nn.Module, str, nn.Parameter]


class Residency:
    """Tells the engine what to free.

    Args:
        blocks: the sharded blocks, in order of execution.
        root: the sharded root.
        shards: of the parameters that each of them gathers; none where parameters are whole anyway.
        stay: how many blocks stay at a turn, because they may be whole at a time in any case; see `ModelBytes`.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        root: nn.Module,
        shards: Mapping[nn.Module, Sequence[nn.Parameter]],
        stay: int,
    ) -> None:
        self._blocks: Sequence[Any] = blocks
        self._root: Any = root
        self._stay = stay
        self._rung = Rung()
        self._one_backward = False
        self._places = _places(root, shards)
        self._aside: dict[nn.Module, list[nn.Parameter]] = {}
        for module in self._places:
            module.register_forward_pre_hook(self._put_back, prepend=True)
        self._tell()

    def take(self, rung: Rung) -> None:
        """Go on from another rung, between windows."""
        self._rung = rung
        self._tell()

    @property
    def one_backward(self) -> bool:
        """Whether each micro-step is one forward and one backward; otherwise the engine frees what it always does."""
        return self._one_backward

    @one_backward.setter
    def one_backward(self, value: bool) -> None:
        self._one_backward = value
        self._tell()

    def _tell(self) -> None:
        """Behind a forward, the blocks with which backward begins are not freed."""
        first_to_stay = len(self._blocks) - (self._stay if self._one_backward else 0)
        for index, block in enumerate(self._blocks):
            frees = self._rung.parameters == Parameters.BLOCK and index < first_to_stay
            block.set_reshard_after_forward(frees, recurse=False)

    def backward_begins(self, boundary: bool) -> None:
        """Behind the coming backward, inside a window, those with which forward begins are not freed."""
        if not self._places:
            return
        self.show_gathered()  # a backward may compute a block's forward again
        frees = boundary or not self._one_backward
        if self._rung.parameters == Parameters.WINDOW:
            self._root.set_reshard_after_backward(frees)
            return
        for block in self._blocks[: self._stay]:
            block.set_reshard_after_backward(frees, recurse=False)

    def show_shards(self) -> None:
        """Until the backward or the next forward, put shards where gathered parameters are registered."""
        for module, places in self._places.items():
            if any(isinstance(getattr(owner, name), DTensor) for owner, name, _ in places):
                continue
            registered = [getattr(owner, name) for owner, name, _ in places]
            self._aside[module] = registered
            for owner, name, shard in places:
                setattr(owner, name, shard)

    def show_gathered(self) -> None:
        """Undo `show_shards`."""
        for module in self._places:
            self._put_back(module)

    def _put_back(self, module: nn.Module, *_: Any) -> None:
        gathered = self._aside.pop(module, ())
        if any(param.numel() and not param.untyped_storage().nbytes() for param in gathered):
            return  # freed meanwhile
        for (owner, name, shard), param in zip(self._places[module], gathered, strict=False):
            param.requires_grad_(shard.requires_grad)
            setattr(owner, name, param)


def _places(root: nn.Module, shards: Mapping[nn.Module, Sequence[nn.Parameter]]) -> dict[nn.Module, list[_Place]]:
    """Where the parameters that each module gathers are registered; a tied one in several places."""
    registered: defaultdict[int, list[_Place]] = defaultdict(list)
    for owner in root.modules():
        for name, param in owner.named_parameters(recurse=False, remove_duplicate=False):
            registered[id(param)].append((owner, name, param))
    return {module: [place for param in params for place in registered[id(param)]] for module, params in shards.items()}
