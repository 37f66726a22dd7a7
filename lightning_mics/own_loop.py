"""A training loop of the user's own: nobody says when a window begins, so it is seen from what the loop does.

A window begins with the first forward for training after an optimizer's step, whose micro-steps are the backward passes
up to the next one. What a window may begin with is the user's business, who clears gradients, as under DDP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_mics._compat import in_backward, tree_flatten
from lightning_mics.sharding import MiCSModule

_LOOP = "_mics_loop"


class Backward:
    """The backward pass that runs, and the modules that it reaches: others have no micro-step of it."""

    def __init__(self) -> None:
        self._stack: ExitStack | None = None
        self._reached: list[MiCSModule] = []

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Around one backward pass. If it raises, the windows of the modules that it has reached are forgotten."""
        try:
            with ExitStack() as self._stack:
                yield
        except BaseException:
            for root in self._reached:
                root.abort()
            raise
        finally:
            self._stack = None
            self._reached.clear()

    def reach(self, root: MiCSModule) -> None:
        """The pass has come to an output of `root`.

        Raises:
            RuntimeError: if there is none.
        """
        if self._stack is None:
            raise RuntimeError("a sharded module's backward needs to be told of: call fabric.backward(loss)")
        if root not in self._reached:
            self._reached.append(root)
            self._stack.enter_context(root.window.backward())


class Forwards:
    """Sees what a loop calls one module for.

    What a forward without gradients leaves gathered is freed behind it, as whatever changes parameters next may come
    unannounced; and before the first such forward of an evaluation, persistent buffers become rank 0's.

    Args:
        root: whose forwards it sees until `end`.
    """

    def __init__(self, root: MiCSModule) -> None:
        self._root = root
        self._buffers_differ = False
        self._hooks = (
            root.register_forward_pre_hook(self._begins, prepend=True),
            root.register_forward_hook(self._ended),
        )

    def end(self) -> None:
        """See no more."""
        for hook in self._hooks:
            hook.remove()

    def _begins(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            if not in_backward():
                self._buffers_differ = True
                self._trains()
        elif self._buffers_differ and not self._root.module.training:
            self._root.synchronize_buffers()
            self._buffers_differ = False

    def _ended(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            self._root.release()
        elif not in_backward():
            self._trained(output)

    def _trains(self) -> None:
        """A forward for training begins."""

    def _trained(self, output: Any) -> None:
        """And has ended."""


class OwnLoop(Forwards):
    """Sees windows of one module begin and end.

    Args:
        root: with `one_backward` set; until `end`, this is its only loop.
        backward: is told when a pass comes to `root`.
    """

    def __init__(self, root: MiCSModule, backward: Backward) -> None:
        super().__init__(root)
        self._backward = backward
        self._windows = 0
        root.window.cleared_by_user = True
        root.__dict__[_LOOP] = self

    @classmethod
    def of(cls, root: MiCSModule) -> OwnLoop | None:
        """The loop that runs a root, if one of a user's does."""
        loop: OwnLoop | None = root.__dict__.get(_LOOP)
        return loop

    @override
    def end(self) -> None:
        """Somebody else runs the root from now on."""
        super().end()
        self._root.window.cleared_by_user = False
        del self._root.__dict__[_LOOP]

    def close(self) -> None:
        """Before an optimizer's step: hop 2 is complete on every parameter."""
        self._root.window.close()

    def stepped(self) -> None:
        """After it: parameters are complete and what is gathered is gone; another window begins."""
        self._root.finish_updates()
        self._root.release()
        self._windows += 1

    @override
    def _trains(self) -> None:
        # Pieces of parameters hold gradients that a user may not know of, and keep none beyond a step.
        self._root.window.begin(self._windows, fresh=self._root.window.optimizer_shards is not None)

    @override
    def _trained(self, output: Any) -> None:
        for tensor in tree_flatten(output)[0]:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._reached)

    def _reached(self, gradient: Tensor) -> None:
        self._backward.reach(self._root)
