"""Schedule: what one rank computes and sends in an optimizer step, task by task, as the engine issues it.

The order of tasks is that in which the rank comes to them. Each names what it waits for; a channel carries its tasks in
order, and everything that computes is one lane. With durations for what computes and a price for each collective, that
is all that a step's time follows from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

from lightning_mics.accounting import gathered, summed, sums_dtype
from lightning_mics.comms import padded_numel, whole_at_a_time
from lightning_mics.ladder import Gradients, Parameters, Rung
from lightning_mics.network import Network
from lightning_mics.optimizer_shards import OptimizerState, room
from lightning_mics.planner.model import Model
from lightning_mics.planner.stages import Collective, Form, Route, Stage
from lightning_mics.precision import Precision
from lightning_mics.topology import RankGroups, Topology


class Kind(StrEnum):
    """What a task does."""

    FORWARD = "forward"
    RECOMPUTE = "recompute"
    """A block's forward once more, for its backward."""
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    GATHER = "gather"
    HOP_1 = "hop 1"
    HOP_2 = "hop 2"
    USAGE = "usage"
    """Who used which parameter: a number for each, in the partition group and over the replicas."""
    UPDATE = "update"
    """What the replicas have stepped."""
    FLAG = "flag"
    """Lightning's and the strategy's own, about signals."""


COMPUTES = frozenset({Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD, Kind.OPTIMIZER})


class Channel(StrEnum):
    """What carries a task beside the computation, in order.

    Those that begin together end in order: on CPU up to `lightning_mics.channels.MOST_UNDER_WAY` of one channel.
    """

    GATHER = "gather"
    HOP_1 = "hop 1"
    HOP_2 = "hop 2"
    PARTITION = "partition"
    """The engine's group of the partition, apart from those of gathers and hop 1. Over all ranks it is the default."""
    DEFAULT = "default"
    PREEMPTION = "preemption"


_LOWEST, _UNCHANGED = Rung(), Precision()


@dataclass(frozen=True)
class Task:
    """One thing that a rank does.

    Attributes:
        kind: what.
        micro_step: in which, from 0; the optimizer's step and what follows it belong to the last.
        backward: whether it belongs to a backward.
        unit: index of the block; None for what lies outside the blocks, or for all.
        after: places in the schedule of what must be over before it begins, beside what its channel carries before it.
        collective: what it sends; None if it computes.
        channel: what carries it; None if it computes.
        share: of what it computes, where that is cut into several tasks.
        pieces: operators that its channel needs for what it carries beforehand, each as long as a kernel.
    """

    kind: Kind
    micro_step: int
    backward: bool
    unit: int | None
    after: tuple[int, ...]
    collective: Collective | None = None
    channel: Channel | None = None
    share: float = 1.0
    pieces: int = 0

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The calls of `torch.distributed` that it is made of."""
        return self.collective.stages if self.collective is not None else ()


@dataclass(frozen=True)
class Case:
    """What is trained how, beside the model.

    Attributes:
        topology: who shards with whom.
        window: micro-steps of an optimizer step.
        rung: what stays whole.
        precision: dtypes on the wire.
        optimizer_state: over which ranks it is sharded.
        activation_checkpointing: whether each block's forward is computed again in backward. It gathers nothing more.
        device_type: "cpu", or anything else for an accelerator, on which more is issued ahead.
        form: of the collectives; by default that of gloo on CPU, and of NCCL elsewhere.
        network: decides between hierarchical and flat; by default `Network.default`.
        in_trainer: whether Lightning runs it, and sends flags of its own.
        shards_on_host: whether they are in another memory than what is gathered.

    Raises:
        ValueError: for a window of no micro-steps.
    """

    topology: Topology
    window: int = 1
    rung: Rung = _LOWEST
    precision: Precision = _UNCHANGED
    optimizer_state: OptimizerState = OptimizerState.PARTITION
    activation_checkpointing: bool = False
    device_type: str = "cuda"
    form: Form | None = None
    network: Network | None = None
    in_trainer: bool = False
    shards_on_host: bool = False

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be a positive number of micro-steps")

    @property
    def on_cpu(self) -> bool:
        """Whether ranks compute on CPU."""
        return self.device_type == "cpu"

    @property
    def network_or_default(self) -> Network:
        """The network, or what is assumed of it."""
        return self.network or Network.default(self.topology.ranks_per_node, self.device_type)

    def route(self, nodes: RankGroups, rank: int, between_nodes: torch.dtype | None = None) -> Route | None:
        """How collectives go among `nodes`; None where there is one rank."""
        if len(nodes) == len(nodes[0]) == 1:
            return None
        form = self.form or (Form.EXCHANGE if self.on_cpu else Form.PIPELINED)
        return Route(nodes, rank, form, self.network_or_default, between_nodes)


def schedule(model: Model, case: Case, rank: int = 0, steps: int = 1) -> tuple[Task, ...]:
    """What `rank` does in so many optimizer steps, one behind the other.

    Args:
        model: from `Model.of`.
        case: how it is trained, with micro-steps of one forward and one backward (automatic optimization).
        rank: whose schedule.
        steps: windows; with more than one, the first forward of a later one awaits what the step before it has updated.
    """
    return _MiCS(model, case, rank).steps(steps)


class Walk:
    """A rank on its way through its steps: it computes, hands collectives to channels, and waits for some of them.

    What it sends in between is said by the methods that do nothing here.

    Args:
        model: from `Model.of`.
        case: how it is trained.
        rank: whose way.
    """

    def __init__(self, model: Model, case: Case, rank: int) -> None:
        self.tasks: list[Task] = []
        self.model, self.case, self.rank = model, case, rank
        self.units = model.units
        self.blocks = range(len(model.blocks))
        self.micro_step = 0
        self.boundary = self.backward = False
        self.sent: list[int] = []
        """What the end of a backward waits for."""
        self._reached: tuple[int, ...] = ()

    def steps(self, count: int) -> tuple[Task, ...]:
        """So many optimizer steps, one behind the other."""
        for _ in range(count):
            for number in range(self.case.window):
                self.micro_step, self.boundary = number, number == self.case.window - 1
                self._forward()
                self._backward()
            self.before_step()
            self.compute(Kind.OPTIMIZER)
            self.after_step()
        return tuple(self.tasks)

    def _forward(self) -> None:
        self.backward = False
        self.before_forward(None)
        self.compute(Kind.FORWARD)
        for block in self.blocks:
            self.before_forward(block)
            self.compute(Kind.FORWARD, block)
            self.after_forward(block)
        self.compute(Kind.FORWARD)

    def _backward(self) -> None:
        self.backward = True
        self.before_backward(None)
        self.compute(Kind.BACKWARD)
        self.behind_blocks()
        for block in reversed(self.blocks):
            self.before_backward(block)
            if self.case.activation_checkpointing:
                self.compute(Kind.RECOMPUTE, block)
            self.compute(Kind.BACKWARD, block)
            self.after_backward(block)
        self.compute(Kind.BACKWARD)
        self.after_backward(None)
        self.wait(*self.sent)
        self.sent.clear()

    def before_forward(self, unit: int | None) -> None:
        """Before a block's forward, or all of it."""

    def after_forward(self, block: int) -> None:
        """Behind a block's forward."""

    def before_backward(self, unit: int | None) -> None:
        """Before a block's backward, or all of it."""

    def behind_blocks(self) -> None:
        """Backward has come to the last block."""

    def after_backward(self, unit: int | None) -> None:
        """Behind a block's backward, or all of it."""

    def before_step(self) -> None:
        """Before the optimizer's step."""

    def after_step(self) -> None:
        """Behind it."""

    def compute(self, kind: Kind, unit: int | None = None, share: float = 1.0) -> None:
        """The rank computes, or a share of it, and is then behind it."""
        self._reached = (self._issue(kind, unit, self._reached, share=share),)

    def send(
        self,
        kind: Kind,
        channel: Channel,
        collective: Collective,
        unit: int | None = None,
        after: tuple[int, ...] = (),
        pieces: int = 0,
    ) -> int:
        """The rank hands a collective to a channel, to begin when what it has reached and `after` are over."""
        carried = {"collective": collective, "channel": channel, "pieces": pieces}
        return self._issue(kind, unit, (*self._reached, *after), **carried)

    def wait(self, *places: int) -> None:
        """The rank goes no further before these are over."""
        self._reached = (*self._reached, *(place for place in places if place not in self._reached))

    def _issue(self, kind: Kind, unit: int | None, after: tuple[int, ...], **carried: Any) -> int:
        self.tasks.append(Task(kind, self.micro_step, self.backward, unit, after, **carried))
        return len(self.tasks) - 1


@dataclass
class Gathers:
    """Which units are whole, and which are on their way.

    Attributes:
        walk: where gathers are issued.
        slots: of each unit, the elements of a rank's shard, and the dtype in which they travel; none of what has no
            parameters, or is whole anyway.
        at_once: whether a gather is waited for where it is issued.
        channel: what carries gathers.
    """

    walk: Walk
    slots: dict[int | None, tuple[int, torch.dtype]]
    at_once: bool = False
    channel: Channel = Channel.GATHER
    whole: set[int | None] = field(default_factory=set)
    _under_way: dict[int | None, int] = field(default_factory=dict)

    def issue(self, unit: int | None, route: Route) -> None:
        """Begin the gather of a unit, unless it is whole or has begun."""
        if unit in self.slots and unit not in self.whole:
            self._under_way[unit] = self.walk.send(Kind.GATHER, self.channel, route.all_gather(*self.slots[unit]), unit)
            self.whole.add(unit)
            if self.at_once:
                self.walk.wait(self._under_way.pop(unit))

    def need(self, unit: int | None, following: list[int], route: Route | None) -> None:
        """Before a unit computes: it is whole, and those that follow are on their way."""
        if route is None:
            return
        self.issue(unit, route)
        if unit in self._under_way:
            self.walk.wait(self._under_way.pop(unit))
        for each in following:
            self.issue(each, route)


class _MiCS(Walk):
    """Two hops and the memory ladder, as `lightning_mics.sharding` and `two_hop` issue them."""

    def __init__(self, model: Model, case: Case, rank: int) -> None:
        super().__init__(model, case, rank)
        topology, precision = case.topology, case.precision
        p, self._replicas = topology.partition_size, topology.replicas
        self._partition = topology.partition_groups[topology.replica_of(rank)]
        partition = topology.by_node(self._partition)
        replicas = topology.by_node(topology.replication_groups[topology.shard_of(rank)])
        self._gather = case.route(partition, rank, precision.between_nodes)
        self._hop_1 = case.route(partition, rank)
        self._hop_2 = case.route(replicas, rank, precision.between_nodes)
        self._whole = whole_at_a_time(topology, case.device_type)
        self._ahead = self._whole - 1 if p > 1 else 0
        sharded = {unit: each.parameters for unit, each in self.units.items() if each.parameters and p > 1}
        slots = {unit: gathered(params, p, precision) for unit, params in sharded.items()}
        self._gathers = Gathers(self, slots)
        self._reducing: list[int] = []
        self._hop_1_of: dict[int | None, int] = {}
        self._updates: dict[int | None, int] = {}
        self._waiting: list[int] = []  # blocks whose hop 2 is due
        self._told: list[int] = []

    # -- forward and backward ----------------------------------------------------------------------------------------

    def before_forward(self, unit: int | None) -> None:
        first = 0 if unit is None else unit + 1
        following = [*self.blocks[first : first + self._ahead]]
        if unit is None:
            self._flag()
        read = following if self.case.on_cpu or unit is not None else self.blocks
        self.wait(*(self._updates.pop(each) for each in (unit, *read) if each in self._updates))
        self._gathers.need(unit, following, self._gather)

    def after_forward(self, block: int) -> None:
        if self.case.rung.parameters == Parameters.BLOCK and block < len(self.blocks) - self._whole:
            self._gathers.whole.discard(block)

    def before_backward(self, unit: int | None) -> None:
        if unit is not None:
            self._gathers.need(unit, [*self.blocks[max(0, unit - self._ahead) : unit]][::-1], self._gather)

    def behind_blocks(self) -> None:
        self._reducing.clear()
        self._waiting = [*reversed(self.blocks)] if self.boundary else []

    def after_backward(self, unit: int | None) -> None:
        parameters = self.case.rung.parameters
        stays = parameters == Parameters.WINDOW or (unit is not None and unit < self._whole)
        if self.boundary or not stays:
            self._gathers.whole.discard(unit)
        if self.boundary or self.case.rung.gradients == Gradients.SHARDED:
            self._reduce(unit)
        if unit is not None:
            # Of a block that takes no gradient, it is not known before the end that all have come.
            while self._waiting and self._waiting[0] >= unit and self.units[self._waiting[0]].trainable:
                self._average(self._waiting.pop(0))
        elif self.boundary:
            self._synchronize()

    def _reduce(self, unit: int | None) -> None:
        """Hop 1, once there is room for one more block's gradients."""
        trainable = self.units[unit].trainable
        if self._hop_1 is None or not trainable:
            return
        while len(self._reducing) > self._whole - 2:
            self.wait(self._reducing.pop(0))
        slot = summed(trainable, self.case.topology.partition_size, self.case.precision)
        place = self.send(Kind.HOP_1, Channel.HOP_1, self._hop_1.reduce_scatter(*slot), unit)
        self._hop_1_of[unit] = place
        self._reducing.append(place)
        self.sent.append(place)

    # -- the boundary ------------------------------------------------------------------------------------------------

    def _synchronize(self) -> None:
        """Hop 2 of whatever has not begun it."""
        usage = len(self.model.registered) + 1, torch.float32
        if len(self._partition) > 1:
            channel = Channel.PARTITION if self._replicas > 1 else Channel.DEFAULT
            self.wait(self.send(Kind.USAGE, channel, _one_call("all_reduce", self._partition, *usage)))
        for block in self._waiting:
            self._average(block)
        if self._hop_2 is not None:
            self.sent.append(self.send(Kind.USAGE, Channel.HOP_2, self._hop_2.all_reduce(*usage)))
        self._average(None)
        self._hop_1_of.clear()

    def _average(self, unit: int | None) -> None:
        """Hop 2, behind hop 1: an all-reduce, or the reduce half of one."""
        trainable = self.units[unit].trainable
        if self._hop_2 is None or not trainable:
            return
        topology, dtype = self.case.topology, sums_dtype(trainable, self.case.precision)
        if self.case.optimizer_state == OptimizerState.WORLD:
            numel = sum(room(param, topology) for param in trainable)
            collective = self._hop_2.reduce_scatter(numel, dtype, exact=True)
        else:
            numel = sum(padded_numel(param, topology.partition_size) for param in trainable)
            collective = self._hop_2.all_reduce(numel, dtype)
        after = (self._hop_1_of[unit],) if unit in self._hop_1_of else ()
        self.sent.append(self.send(Kind.HOP_2, Channel.HOP_2, collective, unit, after))

    def after_step(self) -> None:
        if self.case.optimizer_state == OptimizerState.WORLD and self._hop_2 is not None:
            for unit, each in self.units.items():  # the gather half, in the order of a forward
                if trainable := each.trainable:
                    numel = sum(room(param, self.case.topology) for param in trainable)
                    collective = self._hop_2.all_gather(numel, trainable[0].dtype, exact=True)
                    self._updates[unit] = self.send(Kind.UPDATE, Channel.HOP_2, collective, unit)
        self.wait(*self._told)
        self._told.clear()

    def _flag(self) -> None:
        """Before each micro-step one of Lightning's; before the last one the strategy's, heard behind the step."""
        everyone = tuple(range(self.case.topology.world_size))
        if not self.case.in_trainer or len(everyone) == 1:
            return
        self.wait(self.send(Kind.FLAG, Channel.DEFAULT, _one_call("broadcast", everyone, 1, torch.int64)))
        if self.boundary:
            flag = _one_call("all_reduce", everyone, 1, torch.int32)
            self._told.append(self.send(Kind.FLAG, Channel.PREEMPTION, flag))


def _one_call(kind: str, ranks: tuple[int, ...], numel: int, dtype: torch.dtype) -> Collective:
    return Collective(kind, numel, dtype, (ranks,), (Stage(kind, ranks, numel, dtype),))


def issued(tasks: Iterable[Task]) -> Iterator[tuple[str, Stage]]:
    """Every call of `torch.distributed` in `tasks`, in order, and the channel that it travels on."""
    for task in tasks:
        for stage in task.stages:
            yield str(task.channel), stage
