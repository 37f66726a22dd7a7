"""Successors: optimizers that were made of whole parameters step the shards that took their places."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from lightning_mics.checkpoint import part_of


class Successors:
    """The parameters that took the places of others when their modules were sharded."""

    def __init__(self) -> None:
        self._of: Any = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[type[Successors], tuple[()]]:
        """Pickled, none: parameters of another process are others."""
        return Successors, ()

    @contextmanager
    def sharding(self, module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> Iterator[None]:
        """Around the sharding of `module`, whose parameters get successors.

        The optimizers let go of its parameters meanwhile, so that these are freed block by block, and then hold the
        successors, at the same places of the same lists. State that they have already is sharded alike.
        """
        names = {id(param): name for name, param in _named(module).items()}
        whole = {name: weakref.ref(param) for name, param in _named(module).items()}
        held = [_Held(optimizer, names) for optimizer in optimizers]
        try:
            yield
        finally:
            now = _named(module)
            for each in held:
                each.take(now)
            for name, ref in whole.items():
                if (before := ref()) is not None and before is not now[name]:
                    self._of[before] = now[name]

    def follow(self, optimizer: Optimizer) -> None:
        """Have an optimizer that was made before the sharding, and not told of it, hold the successors.

        Raises:
            ValueError: if it has state that cannot be sharded as its parameters are.
        """
        before = {id(p): p for group in optimizer.param_groups for p in group["params"] if p in self._of}
        if before:
            check_state(optimizer)
            now = {str(key): self._of[param] for key, param in before.items()}
            _Held(optimizer, {key: str(key) for key in before}).take(now)

    def knows(self, param: Tensor) -> bool:
        """Whether `param` has a successor."""
        return param in self._of


def check_state(optimizer: Optimizer) -> None:
    """Before the parameters of an optimizer are sharded.

    Raises:
        ValueError: if it has state that nobody could tell how to shard.
    """
    kind = type(optimizer).__name__
    for param, fields in optimizer.state.items():
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        odd = [name for name, value in tensors.items() if value.numel() > 1 and value.shape != param.shape]
        if odd:
            raise ValueError(
                f"{kind} has state already: {', '.join(map(str, odd))} of a parameter of shape {tuple(param.shape)} "
                "has another shape, and cannot be sharded as it is; set the optimizer up before its first step"
            )
        if any(value.is_meta for value in tensors.values()):
            raise ValueError(
                f"{kind} has made state of parameters on the meta device, which has no values; set the module up "
                "first, and make the optimizer of what comes back"
            )


class _Held:
    """What an optimizer held, by name where a module has it."""

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str]) -> None:
        self._optimizer = optimizer
        self._groups: list[list[str | Tensor]] = []
        self._states: dict[str, Any] = {}
        for params in (group["params"] for group in optimizer.param_groups):
            self._groups.append([names.get(id(param), param) for param in params])
            for param in params:
                if id(param) in names and param in optimizer.state:
                    self._states[names[id(param)]] = optimizer.state.pop(param)
            params.clear()  # the list itself may be known elsewhere, as LBFGS knows it

    def take(self, now: Mapping[str, nn.Parameter]) -> None:
        for group, held in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["params"] += [now[each] if isinstance(each, str) else each for each in held]
        for name, fields in self._states.items():
            self._optimizer.state[now[name]] = {k: _sharded(v, now[name]) for k, v in fields.items()}


def _sharded(value: Any, param: nn.Parameter) -> Any:
    if not isinstance(value, Tensor) or value.shape != param.shape:
        return value
    return part_of(value, param).clone().to(param.device)


def _named(module: nn.Module) -> dict[str, nn.Parameter]:
    """By all their names, those of tied ones included."""
    return dict(module.named_parameters(remove_duplicate=False))
