"""What collectives cost processors: lines that are kept, found again, and paid for once each."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from lightning_mics.ladder import Rung
from lightning_mics.planner import measured_host, peers
from lightning_mics.planner.activations import trace
from lightning_mics.planner.compute import Compute
from lightning_mics.planner.hardware import Cluster, Device, Tier
from lightning_mics.planner.host import Cost, Host, Line, Part, Thread
from lightning_mics.planner.measured_host import _BYTES, _RUNGS, _TIMES, _WIDTHS, Features, _features, _of_thread
from lightning_mics.planner.model import Model
from lightning_mics.planner.schedule import Case, Kind, schedule
from lightning_mics.planner.state import OptimizerBytes, model_state
from lightning_mics.planner.step import Walker, Work, simulate
from lightning_mics.topology import Topology
from tests.distributed.ranks import run_ranks
from tests.planner.models import gpt2, loss, tokens

LINES = {
    Cost(Part.HOOKS): Line(5e-4),
    Cost(Part.KEEP): Line(3e-4, 1e-10),
    Cost(Part.GATHER): Line(1e-3, 2e-10),
    Cost(Part.GATHER, True): Line(2e-3, 5e-10),
    Cost(Part.HOP_1): Line(4e-4, 3e-10),
    Cost(Part.HOP_1, True): Line(8e-4, 6e-10),
    Cost(Part.HOP_2, True): Line(7e-4, 1e-9),
}


def test_lines_come_back_from_a_probes_file() -> None:
    host = Host({**LINES, Cost(Part.HOP_2, True, Thread.BESIDE): Line(1e-3)})
    assert Host.from_json(json.loads(json.dumps(host.as_json()))) == host
    for wrong in ({"gather": {}}, {"gather, inside, nobody": {}}, {"gather, inside, beside": {"seconds": -1.0}}):
        with pytest.raises(ValueError):
            Host.from_json(wrong)


def test_a_tier_that_was_not_measured_costs_what_the_other_does() -> None:
    host = Host({Cost(Part.GATHER): Line(1.0, 2.0), Cost(Part.HOP_2, True, Thread.BESIDE): Line(3.0)})
    assert host.seconds(Part.GATHER, Thread.COMPUTING, 10, between_nodes=True) == 21
    assert host.seconds(Part.HOP_2, Thread.BESIDE, 10) == 3
    assert host.seconds(Part.GATHER, Thread.BESIDE, 10) == 0 and not host.knows(Part.HOP_1)


def _seconds(features: Features) -> float:
    return sum(n * (LINES[c].seconds if of == _TIMES else LINES[c].per_byte) for (c, of), n in features.items())


def _found_again() -> dict[Cost, Line]:
    """By what a window of each kind would take if those lines were true."""
    samples = []
    for topology in (Topology(4, 2, 2), Topology(4, 2, 4)):
        for width in _WIDTHS:
            for rung in _RUNGS:
                features = _features(schedule, width, topology, rung)
                (own,) = _of_thread([(features, dict.fromkeys(Thread, 0.0))], Thread.COMPUTING)
                samples.append((own[0], _seconds(own[0])))
    return measured_host._solved(samples)


def test_lines_are_found_by_the_seconds_of_windows() -> None:
    found = run_ranks(1, _found_again)[0]
    assert found.keys() == LINES.keys()
    for cost, line in LINES.items():
        assert found[cost].seconds == pytest.approx(line.seconds, rel=1e-3, abs=1e-7), cost
        assert found[cost].of(3e6) == pytest.approx(line.of(3e6), rel=1e-3), cost


def test_what_noise_makes_negative_is_nothing() -> None:
    gather, hop_1 = (Cost(Part.GATHER), _TIMES), (Cost(Part.HOP_1), _TIMES)
    samples = [(Counter({gather: 1}), 1.0), (Counter({gather: 1, hop_1: 1}), 0.9)]
    found = measured_host._solved(samples)
    assert Cost(Part.HOP_1) not in found and found[Cost(Part.GATHER)].seconds == pytest.approx(0.95, rel=0.02)


def test_waiting_is_told_by_the_smallest_blocks() -> None:
    gather = Cost(Part.GATHER, False, Thread.NONE)
    small = Counter({(gather, _TIMES): 4, (gather, _BYTES): 4000})
    large = Counter({(gather, _TIMES): 4, (gather, _BYTES): 4 << 20})
    seconds = dict.fromkeys(Thread, 0.1)
    assert _of_thread([(small, seconds), (large, seconds)], Thread.NONE) == [(Counter({(gather, _TIMES): 4}), 0.1)]


# -- what a step pays --------------------------------------------------------------------------------------------------

MODULE = gpt2(6, 128, 64)
MODEL = Model.of(MODULE)
DEVICE = Device("core", 16e9, 1e10, {"fp32": 1e10}, kernel=1e-6)
AT_ONCE = tuple(Tier(name, 2, 1e18, 1e-15) for name in ("inside", "between"))


def _step(case: Case, walk: Walker, engine: str, lines: dict[Cost, Line]) -> float:
    cluster = Cluster("toy", DEVICE, AT_ONCE, "gloo", messages=AT_ONCE[0], hosts={engine: Host(lines)})
    compute = Compute(DEVICE)
    state = model_state(MODULE, case.topology, optimizer=OptimizerBytes(8), device_type="cpu")
    work = Work.of(trace(MODULE, tokens(2, 64), step=loss), state, compute, recomputes=False)
    return simulate(MODEL, case, cluster, work, compute, walk).seconds


@pytest.mark.parametrize(("walk", "engine"), [(schedule, "mics"), (peers.fsdp2, "fsdp2")])
@pytest.mark.parametrize("thread", [*Thread])
def test_where_nothing_else_takes_time_a_step_takes_longer_by_what_each_gather_costs(
    walk: Walker, engine: str, thread: Thread
) -> None:
    """A second each, so that all else is hidden; what runs beside can hide one gather behind another of two."""
    case = Case(Topology(4, 2, 2), window=2, device_type="cpu")
    gathers = sum(task.kind == Kind.GATHER for task in walk(MODEL, case, 0, 1))
    nothing, cost = Cost(Part.GATHER, False, Thread.COMPUTING), Cost(Part.GATHER, False, thread)
    more = _step(case, walk, engine, {cost: Line(1.0)}) - _step(case, walk, engine, {nothing: Line(0.0)})
    assert more == pytest.approx(gathers, rel=0.01)
    assert _step(case, walk, "another", {cost: Line(1.0)}) < 1, "of another engine"


def test_gradients_that_are_kept_apart_and_hooks_cost_once_a_block_and_micro_step() -> None:
    case = Case(Topology(4, 2, 2), window=3, rung=Rung.parse("block/whole"), device_type="cpu")
    units = len(MODEL.blocks) + 1
    base = _step(case, schedule, "mics", {})
    for part, times in ((Part.HOOKS, 3 * units), (Part.KEEP, 2 * units)):
        assert _step(case, schedule, "mics", {Cost(part): Line(1.0)}) - base == pytest.approx(times, rel=0.01)
    stays = replace(case, rung=Rung.parse("window/whole"))
    kept = _step(stays, schedule, "mics", {Cost(Part.KEEP): Line(1.0)})
    assert kept == _step(stays, schedule, "mics", {}), "with parameters that stay, autograd adds them up"


def test_several_collectives_of_a_channel_are_under_way_on_cpu() -> None:
    """Over two nodes two gathers go ahead of the block that computes, so that all but the first wait in pairs."""
    case = Case(Topology(4, 2, 4), window=2, device_type="cpu")
    gathers = sum(task.kind == Kind.GATHER for task in schedule(MODEL, case, 0, 1))
    waiting = Cost(Part.GATHER, True, Thread.NONE)
    more = _step(case, schedule, "mics", {waiting: Line(1.0)}) - _step(case, schedule, "mics", {waiting: Line(0.0)})
    assert 0.4 * gathers < more < 0.75 * gathers
