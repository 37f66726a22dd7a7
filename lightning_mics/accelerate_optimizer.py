"""An optimizer under Accelerate: it steps shards, and its step and its `zero_grad` are where windows end.

Accelerate's users make optimizers before they prepare the model, of parameters that are whole. `Successors` knows the
shards that took their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from lightning_mics.checkpoint import part_of
from lightning_mics.optimizer_shards import parameter_of
from lightning_mics.sharding import MiCSModule


class Successors:
    """The parameters that took the places of others when their modules were sharded."""

    def __init__(self) -> None:
        self._of: Any = WeakIdKeyDictionary()

    def note(self, before: dict[str, nn.Parameter], module: nn.Module) -> None:
        """Remember who followed whom.

        Args:
            before: the parameters that `module` had, by all their names.
            module: as it is now.
        """
        for name, param in module.named_parameters(remove_duplicate=False):
            if before[name] is not param:
                self._of[before[name]] = param

    def follow(self, optimizer: Optimizer) -> None:
        """Let an optimizer step the successors, in place. State that it has already is sharded as they are."""
        for group in optimizer.param_groups:
            for number, param in enumerate(group["params"]):
                new = self._of.get(param)
                if new is not None:
                    group["params"][number] = new
                    if param in optimizer.state:
                        fields = optimizer.state.pop(param)
                        optimizer.state[new] = {k: _sharded(v, new) for k, v in fields.items()}


def check_state(optimizer: Optimizer) -> None:
    """Before the parameters of an optimizer are sharded.

    Raises:
        ValueError: if it has state that nobody could tell how to shard.
    """
    for param, fields in optimizer.state.items():
        odd = [
            name
            for name, value in fields.items()
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != param.shape
        ]
        if odd:
            raise ValueError(
                f"{type(optimizer).__name__} has state already: {', '.join(map(str, odd))} of a parameter of shape "
                f"{tuple(param.shape)} has another shape, and cannot be sharded as it is; prepare the optimizer "
                "before its first step and before its state is loaded"
            )


def _sharded(value: Any, param: nn.Parameter) -> Any:
    if not isinstance(value, Tensor) or value.shape != param.shape:
        return value
    return part_of(value, param)


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
