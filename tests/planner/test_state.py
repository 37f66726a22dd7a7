"""State without process groups: the same as the engine's own account, and as the tensors that it holds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mics import Topology
from lightning_mics.exchange import reduction_bytes
from lightning_mics.groups import Groups
from lightning_mics.ladder import ModelBytes, Whole
from lightning_mics.planner.state import ModelState, OptimizerBytes, model_state
from lightning_mics.precision import Precision
from lightning_mics.sharding import shard
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import local

ADAMW = OptimizerBytes(per_value=8, per_parameter=4, step_per_value_of_largest=8)
MIXED = Precision(torch.bfloat16, torch.float32)


class Model(nn.Module):
    """Odd shapes, a frozen parameter, a weight outside the blocks that is registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(7, 9, bias=False)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(9, 13), nn.Tanh(), nn.Linear(13, 9)) for _ in range(4))
        self.leave = nn.Linear(7, 9, bias=False)
        self.leave.weight = self.enter.weight
        self.layers[1][0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return x


CASES = [
    (Topology(4, 4, 1), Precision()),
    (Topology(4, 4, 1), MIXED),
    (Topology(4, 4, 2), Precision()),
    (Topology(4, 1, 2), MIXED),
    (Topology(4, 2, 4), MIXED),
]


def _held() -> list[tuple[ModelBytes, int, int]]:
    """By case: the engine's account, and bytes of optimizer state over the partition group, and over all."""
    results = []
    for topology, precision in CASES:
        groups = Groups.create(topology, "cpu")
        states = []
        for wide in (False, True):
            root = shard(Model(), groups, precision=precision)
            root.one_backward = True
            optimizer = torch.optim.AdamW([param for param in root.parameters() if param.requires_grad])
            if wide:
                root.shard_optimizer(optimizer)
            with root.window.backward():
                root(torch.ones(2, 7, dtype=precision.param_dtype)).sum().backward()
            root.window.close()
            optimizer.step()
            root.finish_updates()
            states.append(sum(local(v).nbytes for each in optimizer.state.values() for v in each.values()))
        results.append((root.bytes_held(), *states))
    return results


def test_it_is_the_account_of_the_engine_and_the_state_of_the_optimizer() -> None:
    first, *others = run_ranks(4, _held)
    for index, (topology, precision) in enumerate(CASES):
        of: Any = partial(model_state, _meta(), topology, precision=precision, optimizer=ADAMW)
        account, partition, world = first[index]
        assert of().model == account, (topology, precision)
        assert of().optimizer == partition
        assert of(optimizer_state="world").optimizer == world
        assert all(rank[index][1] <= partition and rank[index][2] <= world for rank in others)


def _meta() -> nn.Module:
    with torch.device("meta"):
        return Model()


def test_by_hand() -> None:
    """p and r are 2: 13 rows make shards of 7, and 9 rows of 5, of which the larger pieces are 4 and 3."""
    state: ModelState = model_state(_meta(), Topology(4, 4, 2), optimizer=ADAMW, optimizer_state="world")
    layer = 4 * (7 * 9 + 7 + 5 * 13 + 5)
    assert [block.shards for block in state.blocks] == [layer] * 4
    assert [block.sums for block in state.blocks] == [layer, layer - 4 * 7, layer, layer]
    assert state.outside.shards == state.outside.sums == 4 * 5 * 7
    pieces = [4 * 9 + 4 + 3 * 13 + 3, 4 * 9 + 3 * 13 + 3]
    assert state.pieces == (4 * pieces[0], 4 * pieces[1], 4 * pieces[0], 4 * pieces[0], 4 * 3 * 7)
    values = 3 * pieces[0] + pieces[1] + 3 * 7
    assert state.optimizer == 8 * values + 4 * (15 + 1)
    assert state.step == 8 * 3 * 13
    assert state.stepped == 4 * values


def test_what_is_whole_by_hand() -> None:
    block = Whole(4 * 2 * (63 + 7 + 65 + 5), 4 * (117 + 13 + 117 + 9), 4 * 2 * (63 + 7 + 65 + 5))
    for ranks_per_node, device, whole in ((4, "cpu", 2), (1, "cpu", 3), (1, "cuda", 2)):
        state = model_state(_meta(), Topology(4, ranks_per_node, 2), optimizer=ADAMW, device_type=device)
        assert state.model.blocks[0] == block and state.model.whole == whole
    kept = model_state(_meta(), Topology(4, 4, 1), optimizer=ADAMW)
    assert kept.kept_whole and set(kept.model.blocks) == {Whole(0, 0, 0)}
    assert kept.hop_2 == max(bucket.sums for bucket in kept.blocks)


def test_what_is_on_the_host_by_hand() -> None:
    """On an accelerator it leaves the device; where both are one memory, what offloading adds is there on top."""
    topology, values = Topology(4, 4, 2), 4 * (7 * 9 + 7 + 5 * 13 + 5) + 5 * 7 - 7
    of: Any = partial(model_state, _meta(), topology, optimizer=OptimizerBytes(8))
    plain, optimizer, parameters = (of(device_type="cuda", offload=each) for each in (None, "optimizer", "parameters"))
    assert (plain.optimizer, plain.stepped, plain.host) == (8 * values, 4 * values, 0)
    assert (optimizer.optimizer, optimizer.step, optimizer.stepped) == (0, 0, 4 * values)
    assert optimizer.parameters == plain.parameters and optimizer.model == plain.model
    assert optimizer.host == 8 * values + 2 * 4 * values, "state, and copies of parameters and gradients"
    assert (parameters.optimizer, parameters.stepped, parameters.parameters, sum(parameters.sums)) == (0, 0, 0, 0)
    assert parameters.model == replace(plain.model, shards=0)
    assert parameters.host == 8 * values + plain.model.shards
    assert parameters.hop_2 == max(bucket.sums for bucket in (*plain.blocks, plain.outside))
    here, there = of(), of(offload="optimizer")
    assert (there.optimizer, there.step) == (here.optimizer + 4 * values, here.step + 4 * values)
    assert there.work == here.work == plain.work == optimizer.work == parameters.work
    assert of(offload="parameters").model == here.model
    alone = model_state(_meta(), Topology(4, 4, 1), optimizer=ADAMW, offload="parameters", device_type="cuda")
    assert not alone.kept_whole and alone.model.blocks[0].parameters == 4 * (117 + 13 + 117 + 9)


def test_what_comes_in_a_reduction_by_hand() -> None:
    """In chunks of 1 MiB, of which two are under way inside a node, and three between nodes; or all there is."""
    mib = 2**20
    assert reduction_bytes(8 * mib, nodes=1, per_node=4) == 3 * 2 * mib
    assert reduction_bytes(8 * mib, nodes=3, per_node=1) == 2 * 3 * mib
    assert reduction_bytes(8 * mib, nodes=2, per_node=2) == 2 * mib + 3 * mib
    assert reduction_bytes(1000, nodes=1, per_node=4) == 3000


@pytest.mark.parametrize(
    ("make", "per_value", "per_parameter"),
    [
        (torch.optim.AdamW, 8, 4),
        (torch.optim.SGD, 0, 0),
        (partial(torch.optim.SGD, momentum=0.9), 4, 0),
        (partial(torch.optim.AdamW, amsgrad=True), 12, 4),
    ],
)
def test_what_an_optimizer_keeps(make: Any, per_value: float, per_parameter: float) -> None:
    measured = OptimizerBytes.measure(make)
    assert (measured.per_value, measured.per_parameter) == (per_value, per_parameter)


def test_what_a_step_makes_grows_with_all_or_with_the_largest() -> None:
    loop, foreach = (OptimizerBytes.measure(torch.optim.AdamW, device_type=device) for device in ("cpu", "cuda"))
    assert loop.step_per_value == 0 and loop.step_per_value_of_largest >= 4
    assert foreach.step_per_value >= 4
    assert loop.step([1000] * 10) == loop.step([1000]) < foreach.step([1000] * 10) == 10 * foreach.step([1000])
    assert OptimizerBytes.measure(torch.optim.AdamW, torch.bfloat16).per_value == 4


def test_a_word_that_names_no_group_of_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer_state='node' is not understood; choose one of partition, world"):
        model_state(_meta(), Topology(4, 4, 2), optimizer=ADAMW, optimizer_state="node")
