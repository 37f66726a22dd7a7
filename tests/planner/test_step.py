"""The time of a step where it can be worked out by hand, and where short windows stand for long ones."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from lightning_mics.ladder import Rung
from lightning_mics.planner import peers, simulator
from lightning_mics.planner.activations import trace
from lightning_mics.planner.compute import Compute
from lightning_mics.planner.costs import Costs, Group, Kind
from lightning_mics.planner.hardware import Cluster, Device, Tier
from lightning_mics.planner.model import Model
from lightning_mics.planner.schedule import Case, schedule
from lightning_mics.planner.schedule import Kind as ScheduleKind
from lightning_mics.planner.state import OptimizerBytes, model_state
from lightning_mics.planner.step import COMPUTING, Pricing, Walker, Work, simulate
from lightning_mics.topology import Topology
from tests.planner.models import gpt2, loss, tokens

DEVICE = Device("slow", 16e9, 1e10, {"fp32": 1e10}, kernel=1e-6)
MODULE = gpt2(6, 128, 64)
MODEL = Model.of(MODULE)
EIGHT = Topology(8, 2, 4)


def cluster(bandwidth: float, latency: float = 1e-6) -> Cluster:
    tiers = (Tier("inside", 2, 10 * bandwidth, latency), Tier("between", 4, bandwidth, latency))
    return Cluster("toy", DEVICE, tiers)


def work(topology: Topology, recomputes: bool = False, factor: float = 1.0) -> Work:
    traced = trace(MODULE, tokens(2, 64), step=loss, activation_checkpointing=recomputes, device_type="cuda")
    state = model_state(MODULE, topology, optimizer=OptimizerBytes(8), device_type="cuda")
    return Work.of(traced, state, Compute(DEVICE, sharing=factor), recomputes)


def seconds(case: Case, on: Cluster, walk: Walker = schedule, factor: float = 1.0) -> float:
    done = work(case.topology, case.activation_checkpointing, factor)
    return simulate(MODEL, case, on, done, Compute(DEVICE, sharing=factor), walk).seconds


def test_on_a_network_that_takes_no_time_a_step_is_what_is_computed() -> None:
    case = Case(EIGHT, window=3)
    step = simulate(MODEL, case, cluster(1e18, 1e-15), work(EIGHT), Compute(DEVICE))
    assert step.seconds == pytest.approx(step.computing, rel=1e-3)
    once = work(EIGHT)
    passes = sum(once.forward) + sum(once.backward) + once.before + once.head + once.loss + once.behind
    assert 3 * passes + once.optimizer <= step.seconds <= 1.1 * (3 * passes + once.optimizer), "and copies"


def test_recomputing_takes_another_forward_of_the_blocks() -> None:
    """But for a block's last operators, whose results backward does not need."""
    plain, again = work(EIGHT), work(EIGHT, recomputes=True)
    assert again.forward == plain.forward
    more = sum(again.forward) + sum(again.backward) - sum(plain.backward)
    assert 0.5 * sum(plain.forward) < more < sum(plain.forward)


def test_where_nothing_is_computed_ddp_takes_its_all_reduces() -> None:
    """Two buckets: what the head has, of at least a MiB, and the rest, of 25 at most."""
    on = cluster(1e6)
    case = Case(replace(EIGHT, partition_size=1), window=2)
    expected = sum(
        Costs(on).best(Kind.ALL_REDUCE, Group(4, 2), task.collective.nbytes)[1].alone()
        for task in peers.ddp(MODEL, case)
        if task.collective is not None
    )
    assert seconds(case, on, peers.ddp, factor=1e-9) == pytest.approx(expected, rel=1e-3)


def test_what_overlaps_takes_less_than_its_parts() -> None:
    on = cluster(2e8)
    case = Case(EIGHT, window=2)
    apart = seconds(case, cluster(1e18, 1e-15)) + seconds(case, on, factor=1e-9)
    assert max(seconds(case, cluster(1e18, 1e-15)), seconds(case, on, factor=1e-9)) < seconds(case, on) < 0.95 * apart


@pytest.mark.parametrize("rung", ["block/sharded", "micro_step/sharded", "window/whole"])
@pytest.mark.parametrize("bandwidth", [1e7, 1e9])
def test_of_a_long_window_four_micro_steps_tell_the_rest(
    rung: str, bandwidth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(EIGHT, window=9, rung=Rung.parse(rung))
    short = seconds(case, cluster(bandwidth))
    monkeypatch.setattr("lightning_mics.planner.step._ALIKE_FROM", 9)
    assert short == pytest.approx(seconds(case, cluster(bandwidth)), rel=1e-3)


def test_fewer_bytes_between_nodes_take_less_time_there() -> None:
    on = cluster(1e7)
    case = Case(EIGHT, window=1)
    narrow = replace(case, precision=replace(case.precision, between_nodes=torch.bfloat16))
    assert 0.5 < seconds(narrow, on) / seconds(case, on) < 0.9


def test_ranks_that_share_cores_share_them_with_their_messages() -> None:
    """On CPU, a tier inside a node is the cores: what is copied there takes time from what is computed."""
    topology = Topology(2, 2, 2)
    case = Case(topology, device_type="cpu")
    on = replace(cluster(1e7), backend="gloo").with_nodes(1)
    computed = seconds(case, replace(cluster(1e18, 1e-15), backend="gloo").with_nodes(1))
    sent = seconds(case, on, factor=1e-9)
    assert seconds(case, on) == pytest.approx(computed + sent, rel=0.02)


def test_a_collective_keeps_processors_from_what_is_computed_beside_it() -> None:
    """One of four: a computation as long as the collective takes a quarter more, and the collective takes no more."""
    on = replace(cluster(1e8, 1e-9), device=replace(DEVICE, processors=4), channels=1)
    pricing = Pricing(on, Case(EIGHT), work(EIGHT), Compute(on.device), MODEL)
    (gather, *_) = (task for task in schedule(MODEL, Case(EIGHT)) if task.kind == ScheduleKind.GATHER)
    stage = max(pricing.tasks((gather,))[0], key=lambda each: sum(each.loads.values()))
    (alone,) = simulator.simulate([replace(stage, after=())], pricing.rates)
    computed = simulator.Task("computed", COMPUTING, 0.0, {COMPUTING: alone.ended})
    beside = simulator.simulate([replace(stage, after=()), computed], pricing.rates)
    assert [span.ended for span in beside] == pytest.approx([alone.ended, 1.25 * alone.ended], rel=1e-3)


def test_what_a_list_takes_is_waited_for_first() -> None:
    pricing = Pricing(cluster(1e8), Case(EIGHT), work(EIGHT), Compute(DEVICE), MODEL)
    (gather, *_) = (task for task in schedule(MODEL, Case(EIGHT)) if task.kind == ScheduleKind.GATHER)
    (plain, *_), (listed, *_) = (pricing.tasks((each,))[0] for each in (gather, replace(gather, pieces=16)))
    assert listed.seconds - plain.seconds == pytest.approx(16 * DEVICE.kernel)


def test_what_is_on_the_host_takes_the_time_of_its_copies() -> None:
    """A step there, and of shards a copy in each gather, hop 1 and hop 2, at the device's link."""
    slow = replace(DEVICE, host_link=1e6, host_memory=1e6)
    of: Any = partial(model_state, MODULE, EIGHT, optimizer=OptimizerBytes(8), device_type="cuda")
    traced = trace(MODULE, tokens(2, 64), step=loss, device_type="cuda")
    plain, optimizer, parameters = (of(offload=each) for each in (None, "optimizer", "parameters"))
    step = {each.copied: Work.of(traced, each, Compute(slow), False).optimizer for each in (optimizer, parameters)}
    assert step == pytest.approx({3 * plain.stepped: (plain.work + 3 * plain.stepped) / 1e6, 0: plain.work / 1e6})
    on, case = replace(cluster(1e18, 1e-15), device=slow), Case(EIGHT, window=2, rung=Rung.parse("window/whole"))
    done = Work.of(traced, plain, Compute(slow), False)
    there = replace(case, shards_on_host=True)
    without, with_copies = (simulate(MODEL, each, on, done, Compute(slow)).seconds for each in (case, there))
    shards = sum(bucket.shards for bucket in (*plain.blocks, plain.outside))
    sums = sum(bucket.sums for bucket in (*plain.blocks, plain.outside))
    assert with_copies - without == pytest.approx((shards + 3 * sums) / 1e6, rel=0.01)
