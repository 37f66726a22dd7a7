"""The lower bound against numbers worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.bound import ModelSize, bytes_leaving_a_node
from lightning_mics.ladder import RUNGS, Rung
from lightning_mics.topology import Topology

# 120 bytes of parameters, all in blocks.
_SIZE = ModelSize(blocks=(10,) * 12, outside=0)


def _bound(nodes: int, k: int, p: int, window: int, rung: str) -> float:
    return bytes_leaving_a_node(_SIZE, Topology(nodes * k, k, p), window, Rung.parse(rung))


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("rung", map(str, RUNGS))
@pytest.mark.parametrize("window", [1, 4])
def test_within_a_node_only_hop_2_leaves_it(p: int, rung: str, window: int) -> None:
    # Whatever p <= k, window and rung: one all-reduce of 120 bytes over 3 nodes, 2 * 2/3 * 120.
    assert _bound(3, 4, p, window, rung) == pytest.approx(160)


@pytest.mark.parametrize(
    ("rung", "expected"),
    [
        # 2x2, p = n = 4: a node lacks half of everything, so each pass over the 120 bytes costs 60. Window 4.
        # Of twelve blocks three stay at each of the seven turns between forwards and backwards; or at three of them.
        ("block/sharded", (8 + 4) * 60 - 7 * 15),
        ("block/whole", (8 + 1) * 60 - 7 * 15),
        ("micro_step/sharded", (4 + 4) * 60 - 3 * 15),
        ("micro_step/whole", (4 + 1) * 60 - 3 * 15),
        ("window/sharded", (1 + 4) * 60),
        ("window/whole", (1 + 1) * 60),
    ],
)
def test_one_replica_over_all_nodes(rung: str, expected: float) -> None:
    assert _bound(2, 2, 4, 4, rung) == pytest.approx(expected)


def test_one_node_sends_nothing() -> None:
    assert _bound(1, 4, 4, 4, "block/sharded") == 0


def test_replicas_that_span_nodes() -> None:
    # 4x2, p = 4: a replica lies on 2 nodes, and there are 2. Two gathers (but three blocks of twelve stay in between)
    # and a reduce-scatter of 60 a micro-step; then each node holds half of the sums, 60, which it shares with one
    # other: 2 * 1/2 * 60.
    assert _bound(4, 2, 4, 1, "block/sharded") == pytest.approx(3 * 60 - 15 + 60)
    # Reduced once, it is what reducing over all 4 nodes (3/4 * 120) and handing one more quarter on (30) costs, beside
    # a gather of 60.
    assert _bound(4, 2, 4, 4, "window/whole") == pytest.approx(60 + 90 + 30)


def test_what_lies_outside_the_blocks_is_gathered_once_a_micro_step() -> None:
    size = ModelSize(blocks=(20,) * 5, outside=20)
    # 2x2, p = 4, window 2: gathers 4 * 50 - 3 turns * 30 + 2 * 10, reduce-scatters 2 * 60.
    assert bytes_leaving_a_node(size, Topology(4, 2, 4), 2, Rung()) == pytest.approx(110 + 20 + 120)


def test_fewer_blocks_than_may_be_whole_are_gathered_once() -> None:
    size = ModelSize(blocks=(40, 80), outside=0)
    assert bytes_leaving_a_node(size, Topology(4, 2, 4), 4, Rung()) == pytest.approx(60 + 4 * 60)
