"""Trials: batch sizes are tried one after the other, and none that some rank has no memory for.

A rank that runs out of memory in the midst of a micro-step leaves the others in a gather, for as long as their patience
lasts. So nobody finds out that way: what a batch holds grows with its size at most in proportion, and from what a trial
has held on the fullest rank it is known, on all ranks alike, what a larger one would hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from lightning_mics import memory


class OutOfBudget(RuntimeError):
    """A batch is too large, by what smaller ones have held; raised on all ranks alike, before anything is computed."""


class Trials:
    """What sizes have held, on the fullest rank.

    Args:
        budget: bytes that a rank may use.
        device: whose memory is meant.
        size: tells that of the batches which come now.
    """

    def __init__(self, budget: int, device: torch.device, size: Callable[[], int]) -> None:
        self._budget = budget
        self._device = device
        self._size = size
        self._under_way: int | None = None
        self._held: list[tuple[int, int]] = []  # sizes, and bytes at the most

    def batch_begins(self) -> None:
        """Before each micro-step of each trial. At a trial's first, an all-reduce of 16 bytes on the default group.

        Raises:
            OutOfBudget: if the batch would be too large.
        """
        if (size := self._size()) == self._under_way:
            return
        if self._under_way is not None:
            rest, most = self._largest(memory.in_use(self._device), memory.peak(self._device))
            if not self._held:
                self._held.append((0, rest))  # what there is without a batch, the optimizer's state with it
            self._held.append((self._under_way, most))
        self._under_way = None
        if (needed := self._predicted(size)) > self._budget:
            # Lightning's tuner knows what to do by these words.
            raise OutOfBudget(
                f"CUDA out of memory, or it would be: batches of {size} need {needed:,} bytes on the fullest rank, of "
                f"{self._budget:,}"
            )
        self._under_way = size
        memory.reset_peak(self._device)

    def _predicted(self, size: int) -> float:
        if len(self._held) < 2:
            return 0
        (less, below), (more, above) = sorted(self._held)[-2:]
        return above + max(0.0, (above - below) / (more - less)) * (size - more)

    def _largest(self, *values: int) -> list[int]:
        largest = torch.tensor(values, dtype=torch.int64, device=self._device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return [int(value) for value in largest.tolist()]
