"""Step: how long an optimizer step takes, from a rank's schedule and what computing and collectives cost.

All ranks are taken to do the same at the same time. What a rank computes is one stream and each channel another; the
ports of the cluster's tiers are links, which collectives share. So are a device's processors: NCCL's kernels keep some
of them while a collective is under way, and those that compute have the rest. On CPU, ranks and what carries their
messages share the cores, and a tier inside a node is nothing but cores copying memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lightning_mics.channels import MOST_UNDER_WAY
from lightning_mics.ladder import Gradients, Parameters, Phase
from lightning_mics.planner import costs, peers, simulator
from lightning_mics.planner.activations import Activations
from lightning_mics.planner.compute import Compute
from lightning_mics.planner.costs import Algorithm, Costs, Group, Transfer
from lightning_mics.planner.hardware import Cluster
from lightning_mics.planner.host import Host, Part, Thread
from lightning_mics.planner.model import Model
from lightning_mics.planner.schedule import COMPUTES, Case, Channel, Kind, Task, schedule
from lightning_mics.planner.simulator import Span
from lightning_mics.planner.stages import Collective, Form
from lightning_mics.planner.state import ModelState

Walker = Callable[[Model, Case, int, int], tuple[Task, ...]]
"""From model, case, rank and steps to a schedule: `schedule`, or one of `peers`."""

COMPUTING = "compute"
"""The stream of what is computed, and the link that a device's processors are."""
_ALGORITHMS = {
    Form.EXCHANGE: Algorithm.EXCHANGE,
    Form.NATIVE: Algorithm.HIERARCHICAL,
    Form.PIPELINED: Algorithm.PIPELINED,
}
_ENGINES: dict[Any, str] = {schedule: "mics", peers.fsdp2: "fsdp2"}
PARTS = {Kind.GATHER: Part.GATHER, Kind.HOP_1: Part.HOP_1, Kind.HOP_2: Part.HOP_2, Kind.UPDATE: Part.GATHER}
"""Of a host's costs, that of a task."""
_ALIKE_FROM = 4  # micro-steps of a window from which on each one more takes as long as the one before


@dataclass(frozen=True)
class Work:
    """What a micro-step computes, and how much memory the optimizer's step goes through.

    Attributes:
        forward: seconds of each block's forward, by index.
        backward: likewise, without the forward that is computed again.
        before, head: of what lies outside the blocks, in a forward.
        behind, loss: likewise in a backward: of what is before the blocks, and of the head.
        optimizer: of its step.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    before: float
    head: float
    loss: float
    behind: float
    optimizer: float

    @classmethod
    def of(cls, activations: Activations, state: ModelState, compute: Compute, recomputes: bool) -> Work:
        """That of a traced micro-step.

        Args:
            activations: from `trace`.
            state: from `model_state`.
            compute: the device.
            recomputes: whether blocks compute their forward again in backward; as `activations` was traced.
        """
        seconds: defaultdict[tuple[Phase, int | None], float] = defaultdict(float)
        for stretch in activations.stretches:
            seconds[stretch.phase, stretch.block] += compute.seconds(stretch.operators)
        blocks = range(1 + max((each.block for each in activations.stretches if each.block is not None), default=-1))
        forward = tuple(seconds[Phase.FORWARD, block] for block in blocks)
        backward = tuple(seconds[Phase.BACKWARD, block] - (forward[block] if recomputes else 0.0) for block in blocks)
        return cls(
            forward=forward,
            backward=tuple(max(0.0, each) for each in backward),
            before=seconds[Phase.FORWARD, None],
            head=seconds[Phase.HEAD, None],
            loss=seconds[Phase.LOSS, None],
            behind=seconds[Phase.BACKWARD, None],
            optimizer=_step_seconds(state, compute),
        )

    def of_kind(self, kind: Kind, unit: int | None, first: bool) -> float:
        """Seconds of a task; outside the blocks, of the `first` such in its forward or backward or the second."""
        if kind == Kind.OPTIMIZER:
            return self.optimizer
        if unit is None:
            outside = (self.before, self.head) if kind == Kind.FORWARD else (self.loss, self.behind)
            return outside[not first]
        return self.backward[unit] if kind == Kind.BACKWARD else self.forward[unit]


def _step_seconds(state: ModelState, compute: Compute) -> float:
    """Parameters and state are read and written, gradients are read."""
    if not state.host:
        return compute.moving(state.work + 2 * state.copied)
    return state.work / compute.device.host_memory + state.copied / compute.device.host_link


@dataclass(frozen=True)
class Step:
    """An optimizer step as it is simulated.

    Attributes:
        seconds: it takes, among others.
        computing: of these, those in which the rank computes.
        tasks: of the steps that were simulated, for a timeline.
        spans: when each was under way.
    """

    seconds: float
    computing: float
    tasks: tuple[simulator.Task, ...]
    spans: tuple[Span, ...]


class Pricing:
    """What the tasks of a schedule cost on a cluster.

    Args:
        cluster: whose figures are used.
        case: how collectives are formed.
        work: what is computed.
        compute: of the same device, for the copies that come with collectives.
        model: what is trained.
        host: what collectives cost the processors, where they compute; by default they cost what `compute` and the
            cluster's tiers say.
    """

    def __init__(
        self, cluster: Cluster, case: Case, work: Work, compute: Compute, model: Model, host: Host | None = None
    ) -> None:
        self._costs = Costs(cluster)
        self._host, self._case = host or Host(), case
        self._trained = {unit: sum(p.nbytes for p in each.trainable) for unit, each in model.units.items()}
        self._per_node = case.topology.ranks_per_node
        self._form = case.form or (Form.EXCHANGE if case.on_cpu else Form.PIPELINED)
        self._on_cpu = case.on_cpu
        self._sent: Counter[Channel | None] = Counter()
        self._work, self._compute = work, compute
        self._tiers = [tier.name for tier in cluster.tiers]
        self._kept = min(1.0, cluster.channels / cluster.device.processors)  # of the processors, by a collective
        self._known: dict[tuple[str, int, int, int, int, float], Transfer] = {}

    @cached_property
    def rates(self) -> dict[str, float]:
        """Of each link; loads are the seconds for which a task alone keeps it busy."""
        return dict.fromkeys((COMPUTING, *self._tiers), 1.0)

    def tasks(self, plan: Sequence[Task]) -> tuple[list[simulator.Task], list[int]]:
        """What the simulator runs, and for each task of `plan` the place of its end."""
        made: list[simulator.Task] = []
        ends: list[int] = []
        arrived: defaultdict[int | None, float] = defaultdict(float)  # seconds in which what came is yet to be laid out
        outside: tuple[int, bool, bool] | None = None
        for task in plan:
            after = tuple(ends[place] for place in task.after)
            if task.kind in COMPUTES:
                first = False
                if task.unit is None and task.kind != Kind.OPTIMIZER:
                    here = task.micro_step, task.backward, True
                    first, outside = outside != here, here if outside != here else None
                seconds = task.share * self._work.of_kind(task.kind, task.unit, first)
                if task.unit is not None or first:
                    seconds += self._handling(task)
                seconds += arrived.pop(task.unit, 0.0)
                made.append(self._computing(_said(task), seconds, after))
            else:
                assert task.collective is not None
                if task.kind == Kind.GATHER:
                    arrived[task.unit] += self._laid_out(task, task.collective)
                if task.kind == Kind.HOP_1:  # gradients are laid out for it
                    seconds = self._laid_out(task, task.collective)
                    made.append(self._computing(f"{_said(task)}, laid out", seconds, after))
                    after = (len(made) - 1,)
                if task.kind == Kind.HOP_2 and self._case.shards_on_host:
                    seconds = self._over_link(2 * task.collective.nbytes)
                    made.append(self._computing(f"{_said(task)}, from the host and back", seconds, after))
                    after = (len(made) - 1,)
                made.extend(self._sending(task, task.collective, after, len(made)))
            ends.append(len(made) - 1)
        return made, ends

    def _handling(self, task: Task) -> float:
        """What the engine does in a block's forward or backward, beside the block's own, but for collectives."""
        nbytes = self._trained[task.unit]
        seconds = 0.0
        if task.kind in (Kind.FORWARD, Kind.BACKWARD):
            seconds = self._host.seconds(Part.HOOKS, Thread.COMPUTING, nbytes) / 2
        if keeps_apart(self._case) and task.kind == Kind.BACKWARD and task.micro_step < self._case.window - 1:
            seconds += self._host.seconds(Part.KEEP, Thread.COMPUTING, nbytes)
        if self._case.topology.partition_size == 1:  # what is gathered, and its gradients, otherwise say so themselves
            seconds += self._over_link(nbytes * (2 if task.kind == Kind.BACKWARD else 1))
        return seconds

    def _over_link(self, nbytes: float) -> float:
        """Seconds of a copy between the device and the host, which waits for it, where shards are there."""
        return nbytes / self._compute.device.host_link if self._case.shards_on_host else 0.0

    def _laid_out(self, task: Task, collective: Collective) -> float:
        """Seconds of the rank's own thread for what comes or goes."""
        part = PARTS[task.kind]
        if not self._host.knows(part):
            own = collective.nbytes / self._case.topology.partition_size
            return self._compute.moving(2 * collective.nbytes) + self._over_link(own)
        between = collective.nodes_joined(self._per_node) > 1
        return self._host.seconds(part, Thread.COMPUTING, collective.nbytes, between)

    def _carried(self, task: Task, collective: Collective) -> costs.Stage | None:
        """Waiting, and work beside the rank's own thread; None if the tiers tell. Hop 2 is all beside."""
        part = PARTS.get(task.kind)
        if part is None or not self._host.knows(part):
            return None
        between = collective.nodes_joined(self._per_node) > 1
        seconds = {each: self._host.seconds(part, each, collective.nbytes, between) for each in Thread}
        own = seconds[Thread.COMPUTING] if task.kind in (Kind.HOP_2, Kind.UPDATE) else 0.0
        return costs.Stage(seconds[Thread.NONE], (own + seconds[Thread.BESIDE],))

    def _computing(self, what: str, seconds: float, after: tuple[int, ...]) -> simulator.Task:
        processors = self._tiers[0] if self._on_cpu else COMPUTING  # on CPU cores, which ranks share
        return simulator.Task(what, COMPUTING, 0.0, {processors: seconds}, after)

    def _sending(self, task: Task, collective: Collective, after: tuple[int, ...], place: int) -> list[simulator.Task]:
        stages = self.transfer(collective).stages or (costs.Stage(0.0, ()),)
        if (carried := self._carried(task, collective)) is not None:
            first = costs.Stage(carried.latency, (*carried.busy, *stages[0].busy[1:]))
            stages = (first, *(costs.Stage(0.0, (0.0, *each.busy[1:])) for each in stages[1:]))
        links = COMPUTING, *self._tiers
        stream = self._stream(task)
        before = task.pieces * self._compute.device.kernel
        return [
            simulator.Task(
                _said(task),
                stream,
                stage.latency if index else before + stage.latency,
                {link: load for link, load in zip(links, self._loads(stage), strict=False) if load},
                after if not index else (place + index - 1,),
            )
            for index, stage in enumerate(stages)
        ]

    def _stream(self, task: Task) -> str:
        """Its channel; on CPU, of one that carries several at a time, each of these in turn."""
        if not self._on_cpu:
            return str(task.channel)
        self._sent[task.channel] += 1
        return f"{task.channel}, {self._sent[task.channel] % MOST_UNDER_WAY + 1}"

    def _loads(self, stage: costs.Stage) -> tuple[float, ...]:
        """On the device's processors, and on the tiers' ports."""
        return self._kept * stage.alone() if stage.busy else 0.0, *stage.busy

    def transfer(self, collective: Collective) -> Transfer:
        """What a collective costs. The ranks of each node of its group are taken to be alike."""
        ranks = [rank for node in collective.nodes for rank in node]
        nodes = collective.nodes_joined(self._per_node)
        narrowed = min((stage.dtype.itemsize for stage in collective.stages), default=0) / collective.dtype.itemsize
        key = collective.operation, collective.nbytes, len(collective.nodes), nodes, len(ranks), narrowed
        if key not in self._known:
            transfer = self._priced(collective, Group(nodes, max(1, len(ranks) // nodes)))
            self._known[key] = _narrow(transfer, narrowed) if narrowed < 1 else transfer
        return self._known[key]

    def _priced(self, collective: Collective, group: Group) -> Transfer:
        kind = costs.Kind(collective.operation)
        if len(collective.nodes) > 1 and group.per_node > 1:
            return self._costs.collective(kind, _ALGORITHMS[self._form], group, collective.nbytes)
        if self._ours(collective):
            return self._costs.collective(kind, Algorithm.DIRECT, group, collective.nbytes)
        return self._costs.best(kind, group, collective.nbytes)[1]

    def _ours(self, collective: Collective) -> bool:
        """Whether it is made of messages."""
        return any(stage.kind == "send" for stage in collective.stages)


def keeps_apart(case: Case) -> bool:
    """Whether a micro-step that ends no window leaves gradients whole, and not the parameters that they are of."""
    whole = case.topology.partition_size > 1 and case.rung.gradients == Gradients.WHOLE
    return whole and case.rung.parameters != Parameters.WINDOW


def _host(cluster: Cluster, walk: Any) -> Host | None:
    """Of the engine whose schedule it is."""
    return cluster.hosts.get(_ENGINES.get(getattr(walk, "func", walk), ""))


def _narrow(transfer: Transfer, share: float) -> Transfer:
    """The same where only a share of the bytes crosses between nodes."""
    stages = (replace(each, busy=(each.busy[0], *(share * busy for busy in each.busy[1:]))) for each in transfer.stages)
    return Transfer(tuple(stages))


def _said(task: Task) -> str:
    return str(task.kind) if task.unit is None else f"{task.kind} of block {task.unit}"


def simulate(
    model: Model, case: Case, cluster: Cluster, work: Work, compute: Compute, walk: Walker = schedule, *, rank: int = 0
) -> Step:
    """An optimizer step in the midst of training.

    Of long windows fewer micro-steps are simulated: from the fourth on, each takes as long as the one before.

    Args:
        model: from `Model.of`.
        case: how it is trained.
        cluster: with as many devices at least as the case's topology has ranks.
        work: from `Work.of`, for the same.
        compute: the device.
        walk: whose schedule: ours, or a peer's.
        rank: whose step; all are alike but for what they pad.
    """
    short = [_ALIKE_FROM - 1, _ALIKE_FROM] if case.window > _ALIKE_FROM else [case.window]
    steps = [_simulated(model, replace(case, window=window), cluster, work, compute, walk, rank) for window in short]
    if len(steps) == 1:
        return steps[0]
    more = case.window - short[-1]
    last, before = steps[-1], steps[0]
    return replace(
        last,
        seconds=last.seconds + more * (last.seconds - before.seconds),
        computing=last.computing + more * (last.computing - before.computing),
    )


def _simulated(
    model: Model, case: Case, cluster: Cluster, work: Work, compute: Compute, walk: Walker, rank: int
) -> Step:
    """Two steps, of which the second one counts: its first forward may wait for what the first one has updated."""
    pricing = Pricing(cluster, case, work, compute, model, _host(cluster, walk))
    plan = walk(model, case, rank, 2)
    tasks, ends = pricing.tasks(plan)
    spans = simulator.simulate(tasks, pricing.rates)
    first, second = (ends[place] for place, task in enumerate(plan) if task.kind == Kind.OPTIMIZER)
    computing = sum(
        span.ended - span.began
        for place, (task, span) in enumerate(zip(tasks, spans, strict=True))
        if first < place <= second and task.stream == COMPUTING
    )
    return Step(spans[second].ended - spans[first].ended, computing, tuple(tasks), tuple(spans))
