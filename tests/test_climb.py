"""Which rung is taken, by hand, without processes."""

from __future__ import annotations

import mmap

import pytest
import torch

from lightning_mics import memory
from lightning_mics.climb import NEAR, Budget, Climb
from lightning_mics.ladder import RUNGS, ModelBytes, Rung, Whole

# Four blocks of 100 bytes, nothing outside, shards of 80 bytes.
SIZES = ModelBytes(shards=80, blocks=(Whole(100, 100, 100),) * 4, outside=Whole(0, 0, 0))


def traffic(rung: Rung, window: int) -> float:
    gathers = sum(rung.gathers(window, index, blocks=4, whole=2) for index in range(4))
    return 100 * (gathers + 4 * rung.reduce_scatters(window))


def climb(budget: int) -> Climb:
    return Climb(budget, torch.device("cpu"), SIZES, traffic)


def test_peaks_by_hand() -> None:
    """Two blocks' parameters and two blocks' gradients; or all parameters and two blocks' gradients; ..."""
    assert SIZES.peak(Rung.parse("block/sharded")) == 80 + 2 * 100 + 2 * 100
    # At the third block of four, three are gathered still, and the fourth's gradients are on their way.
    assert SIZES.peak(Rung.parse("micro_step/sharded")) == 80 + 3 * 100 + 100 + 100
    assert SIZES.peak(Rung.parse("window/sharded")) == 80 + 4 * 100 + 100 + 100
    # All gradients are held; a block's come from its backward and are added to them.
    assert SIZES.peak(Rung.parse("block/whole")) == 80 + 400 + 2 * 100 + 100
    assert SIZES.peak(Rung.parse("micro_step/whole")) == 80 + 400 + 4 * 100 + 100
    assert SIZES.peak(Rung.parse("window/whole")) == 80 + 400 + 4 * 100 + 100


def test_what_lies_outside_the_blocks_stays_from_forward_to_backward() -> None:
    sizes = ModelBytes(shards=0, blocks=(Whole(10, 10, 10),) * 2, outside=Whole(50, 50, 50))
    assert sizes.peak(Rung.parse("block/sharded")) == 50 + 50 + 2 * 10 + 10 + 10
    assert ModelBytes(0, (), Whole(50, 50, 50)).peak(Rung()) == 50 + 50


@pytest.mark.parametrize(
    ("room", "window", "expected"),
    [
        (480, 4, "block/sharded"),
        (475, 4, None),
        (585, 4, "micro_step/sharded"),
        (680, 4, "window/sharded"),
        (980, 4, "window/whole"),
        # With one micro-step a window saves nothing over a micro-step: of equal traffic, the least memory.
        (10_000, 1, "micro_step/sharded"),
    ],
)
def test_the_fastest_that_fits(room: int, window: int, expected: str | None) -> None:
    best = climb(round(room / NEAR) + 1).best(rest=0, micro_steps=window)
    assert best == (None if expected is None else Rung.parse(expected))


def test_what_else_is_in_memory_counts() -> None:
    assert climb(round(1080 / NEAR) + 1).best(rest=500, micro_steps=4) == Rung.parse("micro_step/sharded")


def test_no_rung_below_that_would_take_more_traffic_than_one_that_fits() -> None:
    for room in range(480, 1200, 20):
        best = climb(round(room / NEAR) + 1).best(rest=0, micro_steps=4)
        assert best is not None and SIZES.peak(best) <= room
        assert all(traffic(best, 4) <= traffic(r, 4) for r in RUNGS if SIZES.peak(r) <= room)


@pytest.mark.parametrize("amount", [0, 1, -5, 0.0, 1.5, True, "8GB", None])
def test_budgets_that_make_no_sense(amount: object) -> None:
    with pytest.raises(ValueError, match=r"memory_budget=.* must be a number of bytes .*, or a share"):
        Budget(amount)  # type: ignore[arg-type]


def test_budgets() -> None:
    cpu = torch.device("cpu")
    assert Budget(4096).bytes(cpu, 8) == 4096
    assert Budget(0.5).bytes(cpu, 2) == pytest.approx(memory.total(cpu, 1) / 4, rel=1e-6)


def test_the_peak_of_a_process_is_seen_and_forgotten() -> None:
    cpu = torch.device("cpu")
    memory.reset_peak(cpu)
    before = memory.peak(cpu)
    # Straight from the kernel: the C library may have kept as much from a test before, or may keep this for later.
    # And so much that it does not matter what little comes and goes meanwhile, or how exactly the kernel counts.
    with mmap.mmap(-1, 128 << 20) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    assert memory.peak(cpu) >= before + (96 << 20)
    memory.reset_peak(cpu)
    assert memory.peak(cpu) < before + (32 << 20)


def test_a_planned_rung_comes_first_and_stays_as_long_as_it_fits() -> None:
    planned = Rung.parse("micro_step/sharded")

    def of(budget: int) -> Climb:
        return Climb(budget, torch.device("cpu"), SIZES, traffic, planned)

    assert of(480).first == planned and climb(480).first == Rung()
    assert of(10_000).best(rest=0, micro_steps=4) == planned, "though window/whole would send less"
    assert of(round(480 / NEAR) + 1).best(rest=0, micro_steps=4) == Rung.parse("block/sharded")
    near = of(10_000)
    near._before = near._rest = 0
    assert near.window_begins(planned, 4, near=0.0) == planned
    assert near.window_begins(planned, 4, near=1.0) == Rung.parse("block/sharded")
