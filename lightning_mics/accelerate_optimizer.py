"""An optimizer under Accelerate: it steps shards, and its step and its `zero_grad` are where windows end.

Accelerate's users make optimizers before they prepare the model, of parameters that are whole; see `Successors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mics.optimizer_shards import parameter_of
from lightning_mics.sharding import MiCSModule


class MiCSOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """What `MiCSAccelerator.prepare` makes of an optimizer.

    Args:
        optimizer: of the user's.
        roots: gives the sharded models that there are.
        scaler: of gradients, in "fp16".
    """

    def __init__(self, optimizer: Optimizer, roots: Callable[[], Iterable[MiCSModule]], scaler: Any) -> None:
        super().__init__(optimizer, device_placement=False, scaler=scaler)
        self._all_roots = roots
        self.steps = 0
        """Steps taken, those that the scaler skipped left out."""

    @property
    def held(self) -> list[Tensor]:
        """The parameters, or what it steps in their places."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def roots(self) -> Iterator[MiCSModule]:
        """The sharded models that have parameters here."""
        held = {id(parameter_of(param)) for param in self.held}
        for root in self._all_roots():
            if any(id(param) in held for param in root.parameters()):
                yield root

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """The windows close: hop 2 is complete on every parameter; then the step. Within a window, nothing."""
        if not self.gradient_state.sync_gradients:
            return
        roots = [*self.roots()]
        if closure is None:
            _close(roots)
            super().step()
        else:
            super().step(lambda: _closing(closure, roots))
        self.steps += not self.step_was_skipped
        for root in roots:
            root.release()

    @override
    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Within a window, nothing."""
        if not self.gradient_state.sync_gradients:
            return
        params, roots = [parameter_of(param) for param in self.held], [*self.roots()]
        for root in roots:
            root.window.clears(params)
        super().zero_grad(set_to_none)
        for root in roots:
            root.window.cleared(params)


def _closing(closure: Callable[[], Any], roots: Sequence[MiCSModule]) -> Any:
    result = closure()
    _close(roots)
    return result


def _close(roots: Sequence[MiCSModule]) -> None:
    for root in roots:
        root.window.close()
