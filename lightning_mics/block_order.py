"""Block order: every rank of a partition group takes part in every block, in one order.

A gather waits for all ranks of its group. A model that skips a block on one rank (layer drop, an unused branch) would
leave the others waiting, or pair one block's gather with another's. Here a skipped block is passed through instead of
left out: the tensors on their way go through the block's hooks unchanged, so that its parameters are gathered, its
gradient is a reduce-scatter of zeros, and both happen where the other ranks expect them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from lightning_mics._compat import in_backward, tree_flatten, tree_unflatten
from lightning_mics.blocks import Block


class BlockOrder:
    """Counts the calls of each block in a forward, and passes skipped blocks through.

    The order is that of `blocks`. A block that is called again, or after a later one, is simply called; one that the
    model calls out of this order costs an extra gather and reduce-scatter in each forward, so `blocks` should be
    given in the order of execution.

    A block that runs again has to do so on every rank; see `repeats`.

    Args:
        blocks: sharded modules, in order of execution.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = [block.module for block in blocks]
        self.calls = [0] * len(blocks)
        """How often each block ran in the current forward, passes included."""
        self.forwards = 0
        """Forwards with gradients since somebody, who begins a backward, set this to zero."""
        self.awaited = [0] * len(blocks)
        """How often each block ran in the last of them."""
        self.pass_skipped = False
        """Whether skipped blocks are passed through; for models whose forward is one pass over the blocks."""
        self.before_repeat: Callable[[int], None] = lambda index: None
        """Called with a block's index where skipped blocks are passed through and this one has run already."""
        self.before_call: Callable[[int], None] = lambda index: None
        """Called with a block's index before the engine looks at its parameters for a forward."""
        self._next = 0
        self.inside = False
        """Whether the root's forward is running."""
        for index, module in enumerate(self._blocks):
            module.pass_through = _pass_through  # type: ignore[assignment]
            register_fsdp_forward_method(module, "pass_through")
            module.register_forward_pre_hook(self._enter(index), prepend=True, with_kwargs=True)

    @contextmanager
    def forward(self) -> Iterator[Callable[[Any], Any]]:
        """Around the root's forward. Yields a function from its output to the output to return.

        The end belongs inside the root's forward, where the engine still expects blocks.
        """
        self.calls = [0] * len(self._blocks)
        self._next = 0
        self.inside = True
        try:
            yield self._pass_rest
        finally:
            self.inside = False
            if torch.is_grad_enabled():
                self.forwards += 1
                self.awaited = self.calls

    def _pass_rest(self, output: Any) -> Any:
        return self._pass_up_to(len(self._blocks), output) if self.pass_skipped else output

    def _enter(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if in_backward():
                return None
            if self.pass_skipped and self.inside and self._next < index:
                args, kwargs = self._pass_up_to(index, (args, kwargs))
            self._next = max(self._next, index + 1)
            if self.pass_skipped and self.inside and self.calls[index]:
                self.before_repeat(index)
            self.calls[index] += 1
            self.before_call(index)
            return args, kwargs

        return hook

    def _pass_up_to(self, stop: int, values: Any) -> Any:
        """Send the tensors in `values` through the blocks from the next expected one to `stop`."""
        for index in range(self._next, stop):
            if self.calls[index]:
                continue
            leaves, spec = tree_flatten(values)
            carriers = _carriers(leaves)
            if not carriers and torch.is_grad_enabled():
                break  # a training step without a loss: there will be no backward to keep in step with
            passed = [leaves[i] for i in carriers] or [torch.zeros(())]
            self.before_call(index)
            outputs = self._blocks[index].pass_through(*passed)  # type: ignore[operator]
            for i, tensor in zip(carriers, outputs, strict=False):
                leaves[i] = tensor
            values = tree_unflatten(leaves, spec)
            self.calls[index] += 1
        self._next = max(self._next, stop)
        return values


def _carriers(leaves: list[Any]) -> list[int]:
    """Which leaves are passed through: those that carry gradients, else the first floating-point tensor."""
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [i for i in tensors if leaves[i].requires_grad] or tensors[:1]


def _pass_through(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same values, as new tensors that autograd sees coming out of the block."""
    copies = tuple(t.clone() for t in tensors)
    if torch.is_grad_enabled() and not any(t.requires_grad for t in copies):
        return tuple(t.detach().requires_grad_() for t in copies)
    return copies
