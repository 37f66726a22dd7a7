"""Averages: a second set of weights, the mean of those that training has gone through.

An average goes element by element, so each rank keeps it for what it holds of each parameter, and nothing is
communicated. It is kept in fp32, or wider where the parameters are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mics.shards import local_part, sharded_as

AVERAGE, CURRENT = "average", "current"
KEY = "mics_averages"
"""Of what a checkpoint keeps of them, beside its state dict."""


class Averages:
    """Averages of a module's floating-point parameters.

    Args:
        module: sharded, or not; between forwards, when its parameters are what a rank holds.
        decay: of the exponential moving average, `average = decay * average + (1 - decay) * weights`, begun with the
            weights of the first update; None for the equal mean of all updates.
    """

    def __init__(self, module: nn.Module, decay: float | None) -> None:
        self._decay = decay
        self._params = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
        names = module.named_parameters(remove_duplicate=False)
        first = {id(p): name for name, p in self._params.items()}
        self._names = {name: first[id(p)] for name, p in names if id(p) in first}
        self.updates = 0
        """How many sets of weights have gone into the average."""
        self._values: dict[str, Tensor] = {}
        self._current: dict[str, Tensor] = {}  # while the module has the averages, and of a load
        self._shown = False
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """Forget the average: it is the module's weights, which no update has made."""
        self.updates = 0
        for name, param in self._params.items():
            self._values[name] = _in(param, _wide(param), param.detach())

    @torch.no_grad()
    def update(self) -> None:
        """Let the module's weights go into the average."""
        self.updates += 1
        weight = 1 / self.updates if self._decay is None or self.updates == 1 else 1 - self._decay
        for name, param in self._params.items():
            average = local_part(self._values[name])
            average.lerp_(local_part(param).to(average.dtype), weight)

    @torch.no_grad()
    def show(self) -> None:
        """Give the module the averages, rounded to its dtypes, and keep its own weights."""
        if not self._shown:
            self._current = {name: param.detach().clone() for name, param in self._params.items()}
            self.copy_to_module()
            self._shown = True

    @torch.no_grad()
    def hide(self) -> None:
        """Undo `show`, to the bit."""
        if self._shown:
            self._put(self._current)
            self._current, self._shown = {}, False

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Let the module go on with the averages."""
        self._put(self._values)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, param in self._params.items():
            local_part(param).copy_(local_part(values[name]))

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def into(self, state_dict: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Put the averages into a state dict of the module, in its dtypes.

        Returns:
            What else there is to save, by parameter: "current", the module's own weights; "average", in its own dtype,
            where the module's is another.
        """
        current = self._current if self._shown else self._params
        for name, first in self._names.items():
            if name in state_dict:
                state_dict[name] = _in(self._params[first], self._params[first].dtype, self._values[first])
        saved = {name: {CURRENT: current[name].detach()} for name in self._params}
        for name, average in self._values.items():
            if average.dtype != self._params[name].dtype:
                saved[name][AVERAGE] = average
        return saved

    def target(self, name: str, field: str) -> Tensor:
        """What a saved tensor is to be read into, of the saved shape and dtype.

        Raises:
            ValueError: if the module has no such parameter.
        """
        if name not in self._params:
            raise ValueError(f"averages of {name}, which the module does not have; build the model that was saved")
        if field == AVERAGE:
            return self._values[name]
        return self._current.setdefault(name, torch.empty_like(self._params[name], requires_grad=False))

    @torch.no_grad()
    def loaded(self, updates: int, averages: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint, whose state dict, the averages, is in the module.

        Args:
            updates: that had gone into the average.
            averages: those that were saved in a dtype of their own, and are not in `target` already.
            current: likewise, the weights that training goes on from.
        """
        own = {name for name, param in self._params.items() if self._values[name].dtype == param.dtype}
        for name, param in self._params.items():
            if name in averages or name in own:
                local_part(self._values[name]).copy_(local_part(averages.get(name, param)))
        self._put({**self._params, **self._current, **current})
        self._current, self.updates = {}, updates


def _in(param: Tensor, dtype: torch.dtype, value: Tensor) -> Tensor:
    """A copy of `value` in `dtype`, sharded as `param` is."""
    return sharded_as(local_part(value).to(dtype, copy=True), param)


def _wide(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)
