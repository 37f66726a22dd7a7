"""The probe on real ranks: who sends to whom, what is written down, and what a link of a known rate turns out to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from benchmarks.cluster import Link, VirtualCluster, unavailable
from lightning_mics import probe as module
from lightning_mics.cross_memory import CrossMemory
from lightning_mics.network import Network, Tier
from lightning_mics.probe import probe
from tests.distributed.ranks import run_ranks

CPU = torch.device("cpu")


def _peers(ranks_per_node: int, cross_memory: bool) -> list[tuple[str, int, int]]:
    """How, whom this rank sent to and received from, in order, each once."""
    pairs: list[tuple[str, int, int]] = []
    real: Callable[..., Any] = dist.batch_isend_irecv

    def seen(operations: list[Any]) -> Any:
        source, to = operations
        if (to.op, source.op) != (dist.isend, dist.irecv) or to.tensor.numel() != source.tensor.numel():
            raise AssertionError(f"{operations} is not one message each way, and the one that comes asked for first")
        pairs.append(("messages", to.peer, source.peer))
        return real(operations)

    offer, take = CrossMemory.offer, CrossMemory.take
    offered: list[int] = []

    def seen_offer(memory: CrossMemory, tensor: torch.Tensor, to: int, tag: int) -> None:
        offered.append(dist.get_global_rank(memory.group, to))
        offer(memory, tensor, to, tag)

    def seen_take(memory: CrossMemory, target: torch.Tensor, source: int, tag: int) -> None:
        pairs.append(("memory", offered.pop(), dist.get_global_rank(memory.group, source)))
        take(memory, target, source, tag)

    with (
        patch.object(dist, "batch_isend_irecv", seen),
        patch.object(CrossMemory, "connect", CrossMemory.connect if cross_memory else lambda *_: None),
        patch.object(CrossMemory, "offer", seen_offer),
        patch.object(CrossMemory, "take", seen_take),
        patch.object(module, "_SIZES", (8,)),
        patch.object(Tier, "fit", lambda _: Tier(1.0, 1.0)),
    ):
        probe(ranks_per_node, CPU)
    return list(dict.fromkeys(pairs))


@pytest.mark.parametrize("cross_memory", [True, False])
@pytest.mark.parametrize(
    ("world", "ranks_per_node", "rank", "peers"),
    [
        (4, 2, 1, [(0, 0), (3, 3)]),
        (6, 3, 4, [(5, 3), (1, 1)]),
        (6, 2, 5, [(4, 4), (1, 3)]),
        (3, 3, 0, [(1, 2)]),
        (3, 1, 0, [(1, 2)]),
    ],
)
def test_rings_inside_nodes_and_then_between_them(
    world: int, ranks_per_node: int, rank: int, peers: list[tuple[int, int]], cross_memory: bool
) -> None:
    expected = [("messages", *pair) for pair in peers]
    if cross_memory and ranks_per_node > 1:
        expected = [("memory", *peers[0]), *expected[1:], expected[0]]
    assert run_ranks(world, _peers, ranks_per_node, cross_memory)[rank] == expected


LATENCY, BANDWIDTH = 2e-3, 50e6


class Clock:
    """Time passes in messages alone; on rank 0 they take twice as long."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def exchange(self, size: int) -> None:
        self.now += (LATENCY + size / BANDWIDTH) / (1 + dist.get_rank())


def _on_a_known_network(ranks_per_node: int) -> Network:
    clock = Clock()
    with patch.object(module, "time", clock), patch.object(module, "_exchange", lambda *_: clock.exchange):
        return probe(ranks_per_node, CPU)


@pytest.mark.parametrize(("ranks_per_node", "measured", "assumed"), [(2, "intra", "inter"), (1, "inter", "intra")])
def test_the_slowest_ranks_line_is_found_and_a_tier_that_is_not_there_is_assumed(
    ranks_per_node: int, measured: str, assumed: str
) -> None:
    ours, theirs = run_ranks(2, _on_a_known_network, ranks_per_node)
    assert ours == theirs
    tier = getattr(ours, measured)
    assert tier.latency == pytest.approx(LATENCY) and tier.bandwidth == pytest.approx(BANDWIDTH)
    assert tier.samples[0][0] == 1024 and tier.samples[-2][1] < 0.3 < tier.samples[-1][1]
    assert getattr(ours, assumed) == getattr(Network.default(ranks_per_node, "cpu"), assumed)
    assert ours.source.startswith("measured ") and ours.source.endswith(f"gloo on cpu; {assumed} assumed")


def _behind_what_passes_at_once(count: int) -> float:
    clock, passed = Clock(), list[int]()

    def exchange(size: int) -> None:
        passed.append(size)
        clock.now += len(passed) > 1

    with patch.object(module, "time", clock):
        return module._timed(exchange, 1, count, CPU)


@pytest.mark.parametrize("count", [1, 4])
def test_what_a_link_lets_pass_at_once_is_not_timed(count: int) -> None:
    assert run_ranks(1, _behind_what_passes_at_once, count) == [1.0]


def _refused() -> str:
    with pytest.raises(ValueError) as refusal:
        probe(2 if dist.get_world_size() > 1 else 1, CPU)
    return str(refusal.value)


def test_what_cannot_be_measured_is_refused() -> None:
    assert run_ranks(1, _refused)[0].startswith("one rank has no network to measure; start several")
    assert all("ranks_per_node=2 does not divide world_size=3" in said for said in run_ranks(3, _refused))


_IN_FEWER_ROUNDS = """
from pathlib import Path

from lightning_mics import probe, probe_command
from lightning_mics.planner import measured

probe._ROUNDS, measured._ROUNDS = 2, 1
probe_command.measure_hosts = lambda *_: {{}}  # the link is what counts here
probe_command.run(Path("{output}"), "cpu", None)
"""


@pytest.mark.slow
def test_ranks_of_a_node_share_a_link_of_a_known_rate(tmp_path: Path) -> None:
    rate = 4e8
    if reason := unavailable():
        pytest.skip(reason)
    file, off = tmp_path / "network.json", list[float]()
    script = tmp_path / "probe.py"
    script.write_text(_IN_FEWER_ROUNDS.format(output=str(file)))
    with VirtualCluster(nodes=2, ranks_per_node=2, link=Link(rate)) as cluster:
        while len(off) < 4 and min(off, default=1.0) > 0.2:  # a busy machine's lines fit badly, either way
            cluster.torchrun(str(script), timeout=900)
            network = Network.load(file)
            off.append(abs(2 * 8 * network.inter.bandwidth / rate - 1))
    assert min(off) < 0.2
    assert network.intra.bandwidth > network.inter.bandwidth
    content = json.loads(file.read_text())
    assert (content["nodes"], content["ranks_per_node"], content["backend"]) == (2, 2, "gloo")
