"""rung="auto" on real ranks: the choice, the fall, and the same numbers all the way."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_mics import memory
from lightning_mics.climb import NEAR
from lightning_mics.groups import Groups
from lightning_mics.ladder import RUNGS
from lightning_mics.sharding import shard
from lightning_mics.topology import Topology
from tests.distributed.ranks import run_ranks

WIDTH, WINDOW = 64, 3
BUDGET = 10_000_000
CPU = torch.device("cpu")


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def train(rung: str, windows: int, budget: int = BUDGET) -> tuple[list[str], list[float]]:
    """The rung of each window, and its loss."""
    n = dist.get_world_size()
    torch.manual_seed(0)
    root = shard(Layers(), Groups.create(Topology(n, n, n), "cpu"), rung=rung, memory_budget=budget)
    root.one_backward = True
    optimizer = torch.optim.AdamW(root.parameters(), lr=1e-2)
    rungs, losses = [], []
    for window in range(windows):
        root.window.begin(window)
        for micro in range(WINDOW):
            torch.manual_seed(100 * window + 10 * micro + dist.get_rank())
            if micro == WINDOW - 1:
                loss = root(torch.randn(4, WIDTH))
                with root.window.backward():
                    loss.backward()
            else:
                with root.window.hop_1_only():
                    loss = root(torch.randn(4, WIDTH))
                    with root.window.backward():
                        loss.backward()
        root.window.close()
        optimizer.step()
        optimizer.zero_grad()
        root.release()
        rungs.append(str(root.rung))
        losses.append(loss.item())
    return rungs, losses


def pretend(in_use: int, peaks: list[int]) -> pytest.MonkeyPatch:
    """A memory with figures of our own: a peak for each window, read once in each."""
    figures = itertools.chain(peaks, itertools.repeat(peaks[-1]))
    patch = pytest.MonkeyPatch()
    patch.setattr(memory, "in_use", lambda device: in_use)
    patch.setattr(memory, "reset_peak", lambda device: None)
    patch.setattr(memory, "peak", lambda device: next(figures))
    return patch


def choose_and_fall() -> tuple[list[str], list[float], list[float]]:
    """Rank 1 comes near the budget in the third window."""
    near = int(BUDGET * NEAR) + 1 if dist.get_rank() == 1 else 0
    # A window's end looks once, and the choice after the first window once more.
    patch = pretend(in_use=0, peaks=[0, 0, 0, near, 0])
    rungs, losses = train("auto", 6)
    patch.undo()
    return rungs, losses, train("block/sharded", 6)[1]


def test_all_ranks_climb_and_fall_together_and_the_numbers_stay() -> None:
    results = run_ranks(4, choose_and_fall)
    rungs = results[0][0]
    assert rungs[:3] == ["block/sharded", "window/whole", "window/whole"]
    assert set(rungs[3:]) == {rungs[3]} and rungs[3] != "window/whole"
    for others, losses, plain in results:
        assert others == rungs
        assert losses == pytest.approx(plain, rel=2e-6)


def with_real_memory(room: int) -> tuple[list[str], dict[str, int]]:
    n = dist.get_world_size()
    root = shard(Layers(), Groups.create(Topology(n, n, n), "cpu"))
    peaks = {str(rung): root.bytes_held().peak(rung) for rung in RUNGS}
    return train("auto", 2, memory.in_use(CPU) + room)[0], peaks


def test_a_roomy_budget_takes_the_fastest_and_a_tight_one_stays() -> None:
    roomy, tight = run_ranks(2, with_real_memory, 2**30), run_ranks(2, with_real_memory, -(2**20))
    assert [rungs for rungs, _ in roomy] == [["block/sharded", "window/whole"]] * 2
    assert [rungs for rungs, _ in tight] == [["block/sharded", "block/sharded"]] * 2


def refuse() -> list[str]:
    n = dist.get_world_size()
    groups = Groups.create(Topology(n, n, n), "cpu")
    messages = []
    for arguments in ({"rung": "fastest"}, {"rung": "auto", "memory_budget": 2.0}):
        with pytest.raises(ValueError) as caught:
            shard(Layers(), groups, **arguments)  # type: ignore[arg-type]
        messages.append(str(caught.value))
    return messages


def test_what_is_not_on_the_ladder_is_refused_before_anything_is_sent() -> None:
    for rung, budget in run_ranks(2, refuse):
        assert "rung='fastest'" in rung and all(str(each) in rung for each in RUNGS) and "'auto'" in rung
        assert "memory_budget=2.0" in budget


def measured_peaks(ranks_per_node: int) -> dict[str, tuple[int, int]]:
    """Bytes of tensors at their highest in the second window, and the formula, of each rung."""
    from tests.distributed.test_sharding import PeakBytes

    n = dist.get_world_size()
    results = {}
    for rung in RUNGS:
        with PeakBytes() as measured:
            model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(8)))
            groups = Groups.create(Topology(n, ranks_per_node, n), "cpu")
            root = shard(model, groups, rung=rung, blocks="Linear")
            root.one_backward = True
            for window in range(2):
                measured.peak = 0
                root.window.begin(window)
                with root.window.hop_1_only():
                    loss = root(torch.ones(1, 512)).sum()
                    with root.window.backward():
                        loss.backward()
                loss = root(torch.ones(1, 512)).sum()
                with root.window.backward():
                    loss.backward()
                root.window.close()
                root.release()
        results[str(rung)] = (measured.peak, root.bytes_held().peak(rung))
    return results


@pytest.mark.parametrize("ranks_per_node", [2, 1])
def test_peaks_are_those_of_the_formula(ranks_per_node: int) -> None:
    """The formula is what may be alive at once; a transfer that ends early frees its memory early."""
    for peaks in run_ranks(2, measured_peaks, ranks_per_node):
        for rung, (measured, formula) in peaks.items():
            assert measured <= 1.05 * formula, rung
            assert measured >= 0.8 * formula, rung
