"""Climb: take the fastest rung of the memory ladder that fits a budget.

The first window runs on the lowest rung and is measured: what is neither model state nor gathered (activations, the
optimizer, whatever else the process holds) is known from then on. All other figures of a rung are exact, so the second
window runs on the fastest that fits. Where a rung was planned, the first window runs on that one, and it stays as long
as it fits. Every later window is watched; when one comes near the budget on any rank, all ranks step down before the
next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lightning_mics import memory
from lightning_mics.ladder import RUNGS, ModelBytes, Rung

NEAR = 0.97
"""A window whose peak exceeds this share of the budget was the last on its rung."""


@dataclass(frozen=True)
class Budget:
    """How much memory a rank may use.

    Attributes:
        amount: bytes (an int), or a share of the device's memory between 0 and 1 (a float); on CPU, of an equal part
            of the node's memory.
    """

    amount: int | float

    def __post_init__(self) -> None:
        share = isinstance(self.amount, float) and 0 < self.amount <= 1
        count = isinstance(self.amount, int) and not isinstance(self.amount, bool) and self.amount > 1
        if not (share or count):
            raise ValueError(
                f"memory_budget={self.amount!r} must be a number of bytes (an int), or a share of the device's memory "
                "between 0 and 1 (a float)"
            )

    def bytes(self, device: torch.device, ranks_per_node: int) -> int:
        """The budget of one rank."""
        if isinstance(self.amount, float):
            return int(self.amount * memory.total(device, ranks_per_node))
        return self.amount


class Climb:
    """Chooses rungs between windows.

    Args:
        budget: bytes for each rank.
        device: whose memory is meant.
        sizes: what each rung holds.
        traffic: bytes that a rank sends on a rung in a window of so many micro-steps.
        planned: the rung of the first window, by which none other is taken as long as it fits; if there is one.
    """

    def __init__(
        self,
        budget: int,
        device: torch.device,
        sizes: ModelBytes,
        traffic: Callable[[Rung, int], float],
        planned: Rung | None = None,
    ) -> None:
        self.first = planned or RUNGS[0]
        self._planned = planned
        self.budget = budget
        self._device = device
        self._sizes = sizes
        self._traffic = traffic
        self._before: int | None = None
        self._rest: int | None = None
        self._excluded: set[Rung] = set()

    def measured(self) -> float:
        """For the ranks to add up: 1.0 where this rank's window came near the budget, else 0.0."""
        return float(memory.peak(self._device) > NEAR * self.budget)

    def window_begins(self, rung: Rung, micro_steps: int, near: float) -> Rung:
        """The rung of the coming window. Collective on the default group at the second call.

        Args:
            rung: of the last window.
            micro_steps: of the last window.
            near: sum of `measured` over all ranks.
        """
        if self._before is None:
            self._before = memory.in_use(self._device)
        elif self._rest is None:
            self._rest = self._largest(self._measure(rung))
            rung = self.best(self._rest, micro_steps) or rung
        elif near:
            self._excluded |= {each for each in RUNGS if self._sizes.peak(each) >= self._sizes.peak(rung)}
            rung = self.best(self._rest, micro_steps) or RUNGS[0]
        memory.reset_peak(self._device)
        return rung

    def best(self, rest: int, micro_steps: int) -> Rung | None:
        """The planned rung if it fits beside `rest` bytes, else the fastest; of equally fast ones, what holds least."""
        fits = [r for r in RUNGS if r not in self._excluded and rest + self._sizes.peak(r) <= NEAR * self.budget]
        if self._planned in fits:
            return self._planned
        return min(fits, key=lambda r: (self._traffic(r, micro_steps), self._sizes.peak(r)), default=None)

    def _measure(self, rung: Rung) -> int:
        """What the window held beside the model, and what the optimizer has made since."""
        assert self._before is not None
        made_since = memory.in_use(self._device) - self._before
        return memory.peak(self._device) - self._sizes.peak(rung) + max(0, made_since)

    def _largest(self, value: int) -> int:
        tensor = torch.tensor(value, dtype=torch.int64, device=self._device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)
