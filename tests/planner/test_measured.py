"""A device's figures, of work whose seconds are known; and that the seconds are of all ranks at once."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from lightning_mics.planner import measured
from lightning_mics.planner.block_call import BlockCall
from lightning_mics.planner.hardware import Device
from tests.distributed.ranks import run_ranks

CPU = torch.device("cpu")
OPERATORS = 2 + 4 + 1 + 1 + 2
"""Of a block's forward: norms, products with their biases, attention, the function between, and two additions."""
SECONDS = 2e-3


def _in_two_milliseconds() -> tuple[Device, int]:
    with (
        patch.object(measured, "_CPU_ROWS", 10),
        patch.object(measured, "_CPU_BYTES", 4000),
        patch.object(measured, "_seconds", lambda work, device: SECONDS),
    ):
        return measured.measure(CPU, 2), len(measured._recorded(BlockCall.tiny(CPU).run))


def test_figures_follow_from_seconds() -> None:
    (ours, operators), (theirs, _) = run_ranks(2, _in_two_milliseconds)
    assert ours == theirs
    assert ours.peak_flops == {"fp32": pytest.approx(2 * 10**3 / SECONDS)}
    assert ours.memory_bandwidth == pytest.approx(2 * 4000 / SECONDS)
    assert (ours.matmul_share, ours.bandwidth_share, ours.processors) == (1, 1, 1)
    assert 2 * OPERATORS < operators < 5 * OPERATORS, "forward, and about twice as many in backward"
    assert 0 < ours.kernel < SECONDS / operators, "the rest is told by the slow memory and arithmetic"
    assert 1e8 < ours.memory_bytes < 1e13


class Clock:
    """Time passes in work alone, which takes three times as long on rank 1."""

    def __init__(self) -> None:
        self.now = self.on_processor = 0.0

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.on_processor

    def work(self) -> None:
        self.now += 0.01 * (1 + 2 * dist.get_rank())
        self.on_processor += 0.01


def _of_ranks_that_share() -> tuple[float, float, int]:
    clock, barriers = Clock(), list[None]()
    barrier = dist.barrier

    def counted() -> None:
        barriers.append(None)
        barrier()

    with (
        patch.object(measured, "time", clock),
        patch.object(dist, "barrier", counted),
        patch.object(measured, "_product", lambda *_: (clock.work, 0.0)),
    ):
        return measured._seconds(clock.work, CPU), measured.busy(), len(barriers)


def test_ranks_begin_together_and_share_as_unevenly_as_they_may() -> None:
    """In 0.1 s one rank does 10, in 0.12 s the other one 4: 0.22 s over 14. Busy: 0.5 and 0.51 s, for 0.5 and 0.17."""
    ours, theirs = run_ranks(2, _of_ranks_that_share)
    assert ours == theirs
    seconds, busy, barriers = ours
    assert seconds == pytest.approx(0.22 / 14, rel=0.1), "one more or less by rounding"
    assert busy == pytest.approx(1.01 / 0.67, rel=0.05)
    assert barriers == 2
