"""The schedule, call by call, against what the engine and the strategy issue on 8, 64 and 512 ranks of one process.

The groups move nothing, and their backend is not gloo: every collective is `Pipelined`, issued in the caller's thread,
so that the order of all calls is determined, whatever they travel on, and is compared. On gloo, channels are threads:
between two of them there is no order, and within one what leaves at once overtakes what is passed on; there, on real
ranks, the messages of each kind of traffic are compared as a multiset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import cycle, product
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_mics import MiCSStrategy
from lightning_mics.exchange import Exchange
from lightning_mics.groups import Groups
from lightning_mics.ladder import RUNGS, Rung
from lightning_mics.native import Native
from lightning_mics.network import Network, Tier
from lightning_mics.optimizer_shards import OptimizerState
from lightning_mics.pipelined import Pipelined
from lightning_mics.planner.model import Model
from lightning_mics.planner.schedule import Case, Kind, Task, issued, schedule
from lightning_mics.planner.stages import Form, Route, Stage
from lightning_mics.precision import Precision
from lightning_mics.sharding import MiCSModule, shard
from lightning_mics.topology import Topology
from tests.distributed.counting import Call, collectives
from tests.distributed.ranks import run_ranks
from tests.distributed.test_wire import ONE_TIER, TWO_TIERS, traffic
from tests.distributed.toys import Batches, Toy

PER_NODE, WIDTH = 8, 6

Told = list[tuple[str, Any]]
"""What is computed and its block, and calls with what their group is for, in order."""


class Uneven(nn.Module):
    """Blocks of rows that no number of ranks divides, one of them larger and one partly frozen."""

    def __init__(self, blocks: int = 5) -> None:
        super().__init__()
        self.enter = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(Residual(70 if index == 1 else 11) for index in range(blocks))
        self.leave = nn.Linear(WIDTH, 5)
        for param in self.layers[min(2, blocks - 1)].down.parameters():
            param.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x.to(next(self.parameters()).dtype))
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)


class Residual(nn.Module):
    """Says when it computes: the place of its forward and backward among the calls is compared as well."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)
        self.say: Callable[[str], None] = lambda what: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.say("forward")
        inner = torch.tanh(self.up(x))
        inner.register_hook(lambda gradient: self.say("backward"))
        return x + self.down(inner)


@contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_window(root: MiCSModule, window: int, optimizer: torch.optim.Optimizer, key: int) -> None:
    root.window.begin(key)
    for number in range(window):
        loss = root(torch.ones(2, 3)).sum()
        with nullcontext() if number == window - 1 else root.window.hop_1_only(), root.window.backward():
            loss.backward()
    root.window.close()
    optimizer.step()
    root.release()


def named(calls: Sequence[Any], groups: Groups, **more: str) -> Told:
    """Calls as stages, with what their groups are for. What is no call stays as it is."""
    kinds = {groups.partition_group.group_name: "partition", dist.group.WORLD.group_name: "default"}
    kinds = kinds | more | traffic(groups)
    return [
        (kinds[each.group], Stage(each.kind, each.ranks, each.numel, each.dtype, each.to))
        if isinstance(each, Call)
        else each
        for each in calls
    ]


def engine(module: nn.Module, case: Case, windows: int = 1) -> Told:
    """What the engine does on this rank in the first windows."""
    groups = Groups.create(case.topology, "cpu")
    root = shard(
        module,
        groups,
        rung=case.rung,
        precision=case.precision,
        network=case.network,
        activation_checkpointing=case.activation_checkpointing,
    )
    root.one_backward = True
    optimizer = torch.optim.SGD([param for param in root.parameters() if param.requires_grad], lr=0.1)
    if case.optimizer_state == OptimizerState.WORLD:
        root.shard_optimizer(optimizer)
    with collectives() as calls:
        for index, block in enumerate(root.blocks):
            block.module.say = lambda what, index=index: calls.append((what, index))
        for key in range(windows):
            run_window(root, case.window, optimizer, key)
        root.finish_updates()  # over gloo they go on behind
    return named(calls, groups)


def told(tasks: Sequence[Task]) -> Told:
    """What the schedule says of the same; a block's forward that is computed again is a forward."""
    names = {Kind.FORWARD: "forward", Kind.RECOMPUTE: "forward", Kind.BACKWARD: "backward"}
    computed_or_sent = [
        [(names[task.kind], task.unit)] if task.kind in names and task.unit is not None else issued([task])
        for task in tasks
    ]
    return [each for some in computed_or_sent for each in some]


def assert_as_planned(module: Callable[[], nn.Module], case: Case, rank: int, windows: int = 1) -> None:
    with fake_world(case.topology.world_size, rank):
        done = engine(module(), case, windows)
    assert [each for each in done if isinstance(each[1], Stage)] or case.topology.world_size == 1
    assert told(schedule(Model.of(module()), case, rank, windows)) == done


def fake(topology: Topology, **more: Any) -> Case:
    """As the fake backend has it: on CPU, where blocks are gathered ahead, and in the form that is not gloo's."""
    return Case(topology, device_type="cpu", form=Form.PIPELINED, **more)


RUNG_AND_WINDOW = [*product((RUNGS[0], Rung.parse("micro_step/sharded"), RUNGS[-1]), (1, 3))]
SIZES = [(world, p) for world, sizes in ((8, (1, 4, 8)), (64, (1, 8, 64)), (512, (1, 8, 64, 512))) for p in sizes]


@pytest.mark.parametrize(
    ("world", "partition_size", "rung", "window"),
    [
        *((64, 16, rung, window) for rung, window in RUNG_AND_WINDOW),
        *((*size, *each) for size, each in zip(SIZES, cycle(RUNG_AND_WINDOW), strict=False)),
    ],
    ids=str,
)
def test_every_call_of_a_window(world: int, partition_size: int, rung: Rung, window: int) -> None:
    """Rungs and windows at one size, over two tiers; and the sizes with one rung and window after the other."""
    topology = Topology(world, PER_NODE, partition_size)
    for rank, optimizer_state in zip((0, world // 2 + 3), OptimizerState, strict=True):
        case = fake(topology, rung=rung, window=window, optimizer_state=optimizer_state)
        assert_as_planned(Uneven, case, rank)


def in_bf16() -> nn.Module:
    return Uneven().bfloat16()


def of_two_dtypes() -> nn.Module:
    """What is frozen is narrower, and travels with the rest as bytes."""
    module = Uneven()
    module.layers[2].down.bfloat16()
    module.layers[2].down.forward = lambda x: nn.functional.linear(x, module.layers[2].down.weight.float())
    return module


def with_a_frozen_block() -> nn.Module:
    """Its gradient is never known to be complete, so that hop 2 of those before it comes after all of backward."""
    module = Uneven()
    module.layers[3].requires_grad_(False)
    return module


def of_few_blocks() -> nn.Module:
    return Uneven(2)


def of_nothing_else() -> nn.Module:
    """All of it in blocks, and none of it in what lies outside."""
    module = Uneven()
    module.enter, module.leave = Zeros(), nn.Identity()
    return module


class Zeros(nn.Module):
    """An input that takes a gradient, without a parameter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(2, WIDTH, requires_grad=True)


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("module", "more"),
    [
        pytest.param(Uneven, {"precision": Precision(between_nodes=BF16)}, id="bf16 between nodes"),
        pytest.param(Uneven, {"precision": Precision(between_nodes=BF16), "network": ONE_TIER}, id="bf16, slow"),
        pytest.param(Uneven, {"precision": Precision(BF16, torch.float32)}, id="mixed"),
        pytest.param(Uneven, {"precision": Precision(BF16, BF16)}, id="mixed, sums in 16 bits"),
        pytest.param(in_bf16, {}, id="bf16"),
        pytest.param(of_two_dtypes, {}, id="two dtypes"),
        pytest.param(with_a_frozen_block, {}, id="a frozen block"),
        pytest.param(of_few_blocks, {}, id="two blocks"),
        pytest.param(of_nothing_else, {}, id="nothing outside"),
        pytest.param(Uneven, {"network": ONE_TIER}, id="flat"),
        pytest.param(Uneven, {"network": TWO_TIERS}, id="hierarchical"),
        pytest.param(Uneven, {"activation_checkpointing": True}, id="activation checkpointing"),
        *(pytest.param(Uneven, {"rung": rung}, id=str(rung)) for rung in RUNGS),
    ],
)
def test_every_call_of_two_windows(module: Callable[[], nn.Module], more: dict[str, Any]) -> None:
    """The second begins where the first ends, with nothing whole and updates on their way."""
    for partition_size, optimizer_state in zip((1, 4, 16, 64), cycle(reversed(OptimizerState)), strict=False):
        case = fake(Topology(64, PER_NODE, partition_size), window=2, optimizer_state=optimizer_state, **more)
        assert_as_planned(module, case, rank=42, windows=2)


# -- each form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(1, 8), (8, 1), (2, 8), (3, 4), (64, 8)], ids=str)
@pytest.mark.parametrize("form", Form)
def test_every_call_of_a_collective(form: Form, ranks: tuple[int, int]) -> None:
    """Each form by itself, on each tier and on both; of sizes that make no chunk, several, and uneven slots."""
    nodes, per_node = ranks
    size = nodes * per_node
    topology = Topology(size, per_node, size)
    rank = size // 2 + 1
    with fake_world(size, rank):
        tiers = Groups.create(topology, "cpu").gather
        for network, narrow in product((ONE_TIER, TWO_TIERS), (None, BF16)):
            route = Route(topology.by_node(range(size)), rank, form, network, narrow)
            collective = FORMS[form](tiers, network, narrow)
            for slot in (5, 100_000) if size < 100 else (5,):
                for numel in (slot * size, slot * size + 3):
                    buffer, floats = torch.ones(numel), torch.float32
                    with collectives() as calls:
                        collective.all_reduce(buffer)
                    assert stages(calls) == list(route.all_reduce(numel, floats).stages)
                buffer = torch.ones(slot * size)
                with collectives() as calls:
                    collective.all_gather(buffer)
                assert stages(calls) == list(route.all_gather(slot, floats).stages)
                with collectives() as calls:
                    collective.exact().reduce_scatter(buffer)
                assert stages(calls) == list(route.reduce_scatter(slot, floats, exact=True).stages)


# A network on which both ways take as long for slots of 40 bytes, of messages, or 960, of rings.
NEITHER = Network(Tier(240e-9, 1e15), Tier(0.0, 1e9))


@pytest.mark.parametrize("form", Form)
def test_tiers_are_chosen_alike(form: Form) -> None:
    nodes, taken = Topology(12, 4, 12).by_node(range(12)), set[int]()
    with fake_world(12, 7):
        collective = FORMS[form](Groups.create(Topology(12, 4, 12), "cpu").gather, NEITHER)
        for numel in (*range(100, 140), *range(2860, 2900)):
            with collectives() as calls:
                collective.all_reduce(torch.ones(numel))
            planned = Route(nodes, 7, form, NEITHER).all_reduce(numel, torch.float32)
            assert stages(calls) == list(planned.stages)
            taken.add(len(planned.nodes))
    assert taken == {1, 3}


def stages(calls: Sequence[Call]) -> list[Stage]:
    return [Stage(call.kind, call.ranks, call.numel, call.dtype, call.to) for call in calls]


FORMS = {Form.EXCHANGE: Exchange, Form.NATIVE: Native, Form.PIPELINED: Pipelined}


# -- the strategy ------------------------------------------------------------------------------------------------------


class Cluster(ClusterEnvironment):
    """One rank of a cluster of eight a node; what Lightning asks of a launcher."""

    creates_processes_externally, main_address, main_port = True, "127.0.0.1", 29500

    def __init__(self, world_size: int, rank: int) -> None:
        self._world_size, self._rank = world_size, rank

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return self._world_size

    def set_world_size(self, size: int) -> None:
        assert size == self._world_size

    def global_rank(self) -> int:
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        assert rank == self._rank

    def local_rank(self) -> int:
        return self._rank % PER_NODE

    def node_rank(self) -> int:
        return self._rank // PER_NODE


class Windows(pl.Callback):
    """Where in `calls` each batch ends."""

    def __init__(self) -> None:
        self.ends: list[int] = []
        self.calls: list[Call] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(len(self.calls))


@pytest.fixture(autouse=True)
def _rank_zero_tells_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer that is another rank keeps the process from telling anything, and so the tests behind it."""
    monkeypatch.setattr(rank_zero_only, "rank", rank_zero_only.rank)


def trained(case: Case, rank: int) -> Told:
    """The calls of the second of two windows of a Trainer's fit on one rank of a fake world.

    The strategy asks for a gloo group, to hear of signals, and is given a fake one. Objects are not sent: those that
    Lightning sends would come as whatever is in memory.
    """
    gloo: list[str] = []

    def new_group(*args: Any, backend: str | None = None, **kwargs: Any) -> dist.ProcessGroup:
        group = made(*args, **kwargs)
        gloo.extend([group.group_name] * (backend == "gloo"))
        return group

    windows, made = Windows(), dist.new_group
    strategy = MiCSStrategy(
        case.topology.partition_size, ranks_per_node=PER_NODE, rung=case.rung, optimizer_state=case.optimizer_state
    )
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=PER_NODE,
        num_nodes=case.topology.nodes,
        plugins=[Cluster(case.topology.world_size, rank)],
        accumulate_grad_batches=case.window,
        max_epochs=1,
        callbacks=[windows],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with (
        fake_world(case.topology.world_size, rank),
        patch.object(dist, "new_group", new_group),
        patch.object(dist, "broadcast_object_list"),
        collectives() as windows.calls,
    ):
        trainer.fit(Toy(), train_dataloaders=Batches(2 * case.window))
        begins, ends = windows.ends[case.window - 1], windows.ends[-1]
        return named(windows.calls[begins:ends], strategy.mics.groups, **dict.fromkeys(gloo, "preemption"))


@pytest.mark.parametrize(
    ("world", "partition_size", "rung", "optimizer_state"),
    [
        (8, 4, RUNGS[0], "partition"),
        (8, 8, RUNGS[-1], "partition"),
        (64, 16, RUNGS[0], "world"),
        (512, 8, RUNGS[0], "partition"),
        (512, 64, RUNGS[0], "world"),
        (512, 512, RUNGS[-1], "partition"),
    ],
)
def test_every_call_of_the_strategy(world: int, partition_size: int, rung: Rung, optimizer_state: str) -> None:
    """With what Lightning sends by itself: a flag before each batch, and the strategy's, about signals."""
    for rank in (0, world // 2 + 3):
        state = OptimizerState.parse(optimizer_state, "optimizer_state")
        topology = Topology(world, PER_NODE, partition_size)
        case = fake(topology, window=2, rung=rung, optimizer_state=state, in_trainer=True)
        assert trained(case, rank) == [*issued(schedule(Model.of(Toy()), case, rank))]


# -- what waits for what -----------------------------------------------------------------------------------------------


def before(tasks: Sequence[Task]) -> list[set[int]]:
    """For each task, all that must be over before it begins, but for what its channel alone demands."""
    over: list[set[int]] = []
    for task in tasks:
        over.append(set(task.after).union(*(over[place] for place in task.after)))
    return over


def places(tasks: Sequence[Task], kind: Kind, unit: int | None, micro_step: int) -> list[int]:
    wanted = kind, unit, micro_step
    return [place for place, task in enumerate(tasks) if (task.kind, task.unit, task.micro_step) == wanted]


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("rung", RUNGS, ids=str)
@pytest.mark.parametrize("optimizer_state", OptimizerState)
def test_what_waits_for_what(device_type: str, rung: Rung, optimizer_state: OptimizerState) -> None:
    topology = Topology(64, PER_NODE, 16)
    case = Case(topology, window=2, rung=rung, optimizer_state=optimizer_state, device_type=device_type)
    tasks = schedule(Model.of(Uneven(6)), case, rank=42, steps=2)
    over = before(tasks)
    for place, task in enumerate(tasks):
        assert all(each < place for each in task.after)
        earlier = [each for each in range(place) if tasks[each].unit == task.unit]
        if task.kind in (Kind.FORWARD, Kind.BACKWARD):  # what it computes with is there
            gathers = [each for each in earlier if tasks[each].kind in (Kind.GATHER, Kind.UPDATE)]
            assert over[place].issuperset(gathers)
        if task.kind == Kind.HOP_2:
            assert over[place].issuperset(each for each in earlier if tasks[each].kind == Kind.HOP_1)
        if task.kind == Kind.OPTIMIZER:
            reduced = [each for each in range(place) if tasks[each].kind in (Kind.HOP_1, Kind.HOP_2, Kind.USAGE)]
            assert over[place].issuperset(reduced)


@pytest.mark.parametrize(("device_type", "ahead"), [("cpu", 2), ("cuda", 1)])
def test_what_goes_on_beside_the_computation(device_type: str, ahead: int) -> None:
    """A gather beside the blocks ahead; hop 1 beside the next blocks' backward; updates beside the next forward."""
    topology = Topology(64, PER_NODE, 16)
    case = Case(topology, optimizer_state=OptimizerState.WORLD, device_type=device_type)
    tasks = schedule(Model.of(Uneven(6)), case, rank=42, steps=2)
    over = before(tasks)

    def forward(block: int) -> int:
        return places(tasks, Kind.FORWARD, block, 0)[0]

    for block in range(ahead + 1, 6):
        (gather, *_) = places(tasks, Kind.GATHER, block, 0)
        assert forward(block - ahead - 1) in over[gather] and forward(block - ahead) not in over[gather]
    for block in range(5):
        (hop_1, _), (backward, _) = places(tasks, Kind.HOP_1, block + 1, 0), places(tasks, Kind.BACKWARD, block, 0)
        assert hop_1 not in over[backward]
    (_, second), (update, _) = places(tasks, Kind.FORWARD, 0, 0), places(tasks, Kind.UPDATE, 5, 0)
    assert (update in over[second]) == (device_type != "cpu")  # an accelerator's stream waits once, for all


# -- on real ranks -----------------------------------------------------------------------------------------------------


def _sent(case: Case) -> list[Counter[Any]]:
    calls = engine(Uneven(), case, windows=2)
    return [Counter(each for each in calls if isinstance(each[1], Stage) and each[1].numel)]


@pytest.mark.parametrize("partition_size", [1, 2, 4])
@pytest.mark.parametrize("optimizer_state", OptimizerState)
def test_every_message_over_gloo(partition_size: int, optimizer_state: OptimizerState) -> None:
    topology = Topology(4, 2, partition_size)
    case = Case(topology, window=2, optimizer_state=optimizer_state, device_type="cpu", network=TWO_TIERS)
    for rank, (sent,) in enumerate(run_ranks(4, _sent, case)):
        assert sent == Counter(issued(schedule(Model.of(Uneven()), case, rank, steps=2)))
