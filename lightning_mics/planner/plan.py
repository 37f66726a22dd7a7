"""Plan: which partition size, memory rung and micro-batch to take, what each costs, and why.

Of everything that fits in memory, that whose optimizer step is the shortest; of partition sizes that are as good as
equal, the smallest. For each partition size the largest
micro-batch that fits is looked for, and the next smaller one, which may leave room for a faster rung; of the rungs that
fit, those are simulated that no other one keeps more than.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mics.blocks import BlockChoice
from lightning_mics.ladder import RUNGS, Gradients, Parameters, Rung
from lightning_mics.offload import Offload
from lightning_mics.optimizer_shards import OptimizerState
from lightning_mics.planner import schedule
from lightning_mics.planner.activations import Activations, loss_of, trace
from lightning_mics.planner.activations import Step as TrainingStep
from lightning_mics.planner.compute import Compute
from lightning_mics.planner.hardware import Cluster
from lightning_mics.planner.memory import MemoryBytes, peak
from lightning_mics.planner.model import Model
from lightning_mics.planner.schedule import Case
from lightning_mics.planner.state import ModelState, OptimizerBytes, model_state
from lightning_mics.planner.step import Step, Walker, Work, simulate
from lightning_mics.precision import Precision
from lightning_mics.topology import Topology, allowed_partition_sizes, divisors

_AS_GOOD = 1.02  # of the shortest step: less than what a prediction is sure of
_SIZES_SIMULATED = 4  # of partitions that fit, from the smallest up: larger ones gather from further away

ADAMW = OptimizerBytes(per_value=8, step_per_value=4)
"""fp32 moments, and what its foreach form makes on its way."""


class DoesNotFit(ValueError):
    """A model that fits nowhere on a cluster; says what is missing, and what would do."""


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        module: on the meta device or any other; it is not changed.
        batch: makes an example of a micro-batch of so many samples; see `trace`.
        step: from module and batch to the loss.
        blocks: see `find_blocks`.
        precision: dtypes on the wire, and of what computes.
        optimizer: what it keeps, by default AdamW's; see `OptimizerBytes.measure`.
        optimizer_state: over which ranks it is sharded.
        activation_checkpointing: whether blocks compute their forward again in backward.
        offload: what is in the host's memory.
    """

    module: nn.Module
    batch: Callable[[int], Any]
    step: TrainingStep = loss_of
    blocks: BlockChoice = None
    precision: Precision = field(default_factory=Precision)
    optimizer: OptimizerBytes = ADAMW
    optimizer_state: OptimizerState = OptimizerState.PARTITION
    activation_checkpointing: bool = False
    offload: Offload | None = None


def token_batches(seq_len: int) -> Callable[[int], dict[str, Tensor]]:
    """A workload's batches of language: `input_ids` and `labels`, both int64 of shape (samples, seq_len)."""

    def batch(size: int) -> dict[str, Tensor]:
        ids = torch.zeros(size, seq_len, dtype=torch.long)
        return {"input_ids": ids, "labels": ids}

    return batch


@dataclass(frozen=True)
class Choice:
    """One way to train.

    Attributes:
        partition_size: p.
        rung: what stays whole.
        micro_batch: samples of a rank in a micro-step.
        window: micro-steps of an optimizer step.
        memory: of a rank at its peak.
        fits: whether that is within the budget.
        step: as simulated; None if it was not.
        collective: how gathers travel, for people.
    """

    partition_size: int
    rung: Rung
    micro_batch: int
    window: int
    memory: MemoryBytes
    fits: bool
    step: Step | None = None
    collective: str = ""

    @property
    def seconds(self) -> float:
        """Of an optimizer step; infinite if it was not simulated."""
        return self.step.seconds if self.step is not None else math.inf


@dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
        cluster: on which.
        budget: bytes that a rank may use.
        best: the fastest of what fits.
        considered: the best of each partition size, in ascending order; one that does not fit with the least that it
            could do with.
    """

    cluster: Cluster
    budget: int
    best: Choice
    considered: tuple[Choice, ...]

    def lines(self) -> list[str]:
        """A line for each partition size, the chosen one first."""
        rest = [each for each in self.considered if each.partition_size != self.best.partition_size]
        return [self._line(each) for each in (self.best, *rest)]

    def _line(self, choice: Choice) -> str:
        held = f"p={choice.partition_size}"
        if not choice.fits:
            return f"{held} does not fit: {size(choice.memory.total)}"
        text = f"{held}: {size(choice.memory.total)} of {size(self.budget)}"
        if choice.step is None:
            return f"{text}, not simulated"
        how = f"rung {choice.rung}, micro-batch {choice.micro_batch} x {choice.window}"
        return f"{text}, {choice.seconds:.3g} s/step, {how}"


class Planner:
    """Knows what a workload costs on a cluster; remembers what it has worked out.

    Args:
        workload: what is trained.
        cluster: where.
        memory_budget: bytes (an int), or a share of the device's memory (a float).
        compute: the device; by default the cluster's.

    Raises:
        ValueError: for a budget that is neither.
    """

    def __init__(
        self,
        workload: Workload,
        cluster: Cluster,
        *,
        memory_budget: int | float = 0.9,
        compute: Compute | None = None,
    ) -> None:
        share = isinstance(memory_budget, float) and 0 < memory_budget <= 1
        if not share and not (isinstance(memory_budget, int) and memory_budget > 1):
            raise ValueError(
                f"memory_budget={memory_budget!r} must be a number of bytes (an int), or a share of the device's "
                "memory between 0 and 1 (a float)"
            )
        self.workload, self.cluster = workload, cluster
        self.budget = int(memory_budget * cluster.device.memory_bytes) if share else int(memory_budget)
        self._compute = compute or Compute(cluster.device)
        self._traced: dict[int, Activations] = {}
        self._states: dict[Topology, ModelState] = {}

    def on(self, nodes: int) -> Planner:
        """The same on so many nodes; both know what either has worked out.

        Raises:
            ValueError: if so many do not fill the cluster's units.
        """
        other = Planner(self.workload, self.cluster.with_nodes(nodes), memory_budget=self.budget, compute=self._compute)
        other._traced, other._states = self._traced, self._states
        return other

    @property
    def device_type(self) -> str:
        """Whose kernels and schedule are meant."""
        return "cpu" if self.cluster.backend == "gloo" else "cuda"

    @cached_property
    def model(self) -> Model:
        """The module's parameters, as they travel together."""
        return Model.of(self.workload.module, self.workload.blocks)

    def activations(self, micro_batch: int) -> Activations:
        """Of a micro-step."""
        if micro_batch not in self._traced:
            work = self.workload
            self._traced[micro_batch] = trace(
                work.module,
                work.batch(micro_batch),
                step=work.step,
                blocks=work.blocks,
                activation_checkpointing=work.activation_checkpointing,
                precision=work.precision,
                device_type=self.device_type,
            )
        return self._traced[micro_batch]

    def flops(self, micro_batch: int) -> float:
        """Floating-point operations of a rank's micro-step, what is computed twice among them."""
        return sum(op.flops for stretch in self.activations(micro_batch).stretches for op in stretch.operators)

    def throughput(self, micro_batch: int, window: int, seconds: float) -> tuple[float, float]:
        """Of an optimizer step that takes so many seconds: samples a second, and each rank's operations a second.

        Operations are those of `flops`.
        """
        samples = self.cluster.devices * micro_batch * window
        return samples / seconds, self.flops(micro_batch) * window / seconds

    def state(self, topology: Topology) -> ModelState:
        """What a rank holds of the model."""
        if topology not in self._states:
            work = self.workload
            self._states[topology] = model_state(
                work.module,
                topology,
                optimizer=work.optimizer,
                optimizer_state=work.optimizer_state,
                precision=work.precision,
                blocks=work.blocks,
                device_type=self.device_type,
                offload=work.offload,
            )
        return self._states[topology]

    def topology(self, partition_size: int, nodes: int | None = None) -> Topology:
        """The cluster's ranks, in partition groups of this size."""
        per_node = self.cluster.devices_per_node
        return Topology((nodes or self.cluster.nodes) * per_node, per_node, partition_size)

    def memory(self, topology: Topology, rung: Rung, micro_batch: int, window: int) -> MemoryBytes:
        """The most that a rank holds."""
        return peak(self.state(topology), self.activations(micro_batch), rung, window)

    def case(self, topology: Topology, rung: Rung, window: int) -> Case:
        """How it is trained."""
        work = self.workload
        return Case(
            topology,
            window,
            rung,
            work.precision,
            work.optimizer_state,
            work.activation_checkpointing,
            self.device_type,
            network=self.cluster.network,
            shards_on_host=self.state(topology).shards_on_host,
        )

    def step(
        self, topology: Topology, rung: Rung, micro_batch: int, window: int, walk: Walker = schedule.schedule
    ) -> Step:
        """An optimizer step, ours or a peer's."""
        recomputes = self.workload.activation_checkpointing
        work = Work.of(self.activations(micro_batch), self.state(topology), self._compute, recomputes)
        return simulate(self.model, self.case(topology, rung, window), self.cluster, work, self._compute, walk)

    # -- choosing ------------------------------------------------------------------------------------------------------

    def plan(
        self,
        *,
        global_batch: int | None = None,
        micro_batch: int | None = None,
        window: int | None = None,
        partition_size: int | None = None,
        rung: Rung | None = None,
    ) -> Plan:
        """Choose what is not given.

        Args:
            global_batch: samples of an optimizer step, of all ranks. Without it, `micro_batch` and `window`.
            micro_batch: samples of a rank in a micro-step.
            window: micro-steps of an optimizer step; by default what the others make it, or 1.
            partition_size: p.
            rung: what stays whole.

        Raises:
            DoesNotFit: if nothing fits in memory.
            ValueError: for batches that do not divide, or a `partition_size` that is not allowed.
        """
        batches = self._batches(global_batch, micro_batch, window)
        sizes = self._partition_sizes(partition_size)
        rungs = [*RUNGS] if rung is None else [rung]
        considered: list[Choice] = []
        simulated = 0
        for size in sizes:
            topology = self.topology(size)
            candidates = [*self._fitting(topology, rungs, batches)]
            if not candidates:
                least = batches[0]
                held = min((self.memory(topology, each, *least) for each in rungs), key=lambda each: each.total)
                considered.append(Choice(size, rungs[0], *least, held, fits=False))
                continue
            if simulated < _SIZES_SIMULATED:
                candidates = [self._simulated(topology, each) for each in candidates]
            simulated += 1
            considered.append(min(candidates, key=_cost))
        fastest = min((each.seconds for each in considered if each.fits), default=None)
        if fastest is None:
            raise DoesNotFit(self._why_not(considered, rungs, batches[0]))
        best = next(each for each in considered if each.fits and each.seconds <= _AS_GOOD * fastest)
        return Plan(self.cluster, self.budget, best, tuple(considered))

    def _batches(self, whole: int | None, micro_batch: int | None, window: int | None) -> list[tuple[int, int]]:
        """Micro-batches with their windows, from the smallest up."""
        for name, value in (("global_batch", whole), ("micro_batch", micro_batch), ("window", window)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be a positive integer")
        if whole is None:
            if micro_batch is None:
                raise ValueError(
                    "global_batch and micro_batch are both unknown; give one: samples of a step, or of a rank"
                )
            return [(micro_batch, window or 1)]
        n = self.cluster.devices
        each, rest = divmod(whole, n * (window or 1) * (micro_batch or 1))
        if rest or (each > 1 and window and micro_batch):
            parts = f"{n} ranks" + f" x {window} micro-steps" * bool(window) + f" x {micro_batch}" * bool(micro_batch)
            raise ValueError(
                f"global_batch={whole} must be {'' if window and micro_batch else 'a multiple of '}{parts}"
            )
        if micro_batch:
            return [(micro_batch, window or each)]
        return [(size, window) for size in [each]] if window else [(size, each // size) for size in divisors(each)]

    def _partition_sizes(self, wanted: int | None) -> Sequence[int]:
        allowed = allowed_partition_sizes(self.cluster.devices, self.cluster.devices_per_node)
        if wanted is not None and wanted not in allowed:
            raise ValueError(f"partition_size={wanted} does not fit {self.cluster.name}; choose of {allowed}")
        return allowed if wanted is None else [wanted]

    def _fitting(
        self, topology: Topology, rungs: Sequence[Rung], batches: Sequence[tuple[int, int]]
    ) -> Iterator[Choice]:
        """The two largest micro-batches that fit, each on the rungs than which no other one that fits keeps more."""
        found: list[list[Choice]] = []
        for micro_batch, window in batches:
            held = [(rung, self.memory(topology, rung, micro_batch, window)) for rung in rungs]
            fits = [
                Choice(topology.partition_size, rung, micro_batch, window, memory, fits=True)
                for rung, memory in held
                if memory.total <= self.budget
            ]
            if not fits:
                break
            found.append([each for each in fits if not any(_keeps_more(other.rung, each.rung) for other in fits)])
        return (choice for choices in found[-2:] for choice in choices)

    def _simulated(self, topology: Topology, choice: Choice) -> Choice:
        step = self.step(topology, choice.rung, choice.micro_batch, choice.window)
        return replace(choice, step=step, collective=self._collective(topology))

    def _collective(self, topology: Topology) -> str:
        """How the largest block is gathered."""
        if topology.partition_size == 1:
            return "none"
        tasks = schedule.schedule(self.model, self.case(topology, Rung(), 1))
        gathers = [task.collective for task in tasks if task.kind == schedule.Kind.GATHER and task.collective]
        largest = max(gathers, key=lambda each: each.nbytes)
        if not topology.spans_nodes:
            return "inside nodes"
        return "hierarchical" if len(largest.nodes) > 1 else "flat over nodes"

    # -- what fits nowhere -------------------------------------------------------------------------------------------

    def _why_not(self, considered: Sequence[Choice], rungs: Sequence[Rung], batch: tuple[int, int]) -> str:
        least = min(considered, key=lambda each: each.memory.total)
        missing = least.memory.total - self.budget
        text = (
            f"the model does not fit {self.cluster.nodes} nodes of {self.cluster.name}: the least is "
            f"{size(least.memory.total)} a rank (p={least.partition_size}, micro-batch {least.micro_batch}, at the "
            f"{least.memory.moment}), {size(missing)} more than the {size(self.budget)} that a rank may use"
        )
        nodes, held = self._more_nodes(rungs, batch)
        if held.total <= self.budget:
            return f"{text}; {nodes} nodes would do, with p={nodes * self.cluster.devices_per_node}"
        kinds = ", ".join(f"{name} {size(part)}" for name, part in held.by_kind.items() if part > 0.05 * held.total)
        hint = "" if self.workload.activation_checkpointing else "activation checkpointing, "
        return (
            f"{text}; no number of nodes would do, as {size(held.total)} are left on {nodes} ({kinds}): try {hint}"
            "smaller blocks, or shorter samples"
        )

    def _more_nodes(self, rungs: Sequence[Rung], batch: tuple[int, int]) -> tuple[int, MemoryBytes]:
        """The fewest nodes, in one partition group, on which the smallest micro-batch fits; or else the best number."""

        def held(nodes: int) -> MemoryBytes:
            topology = self.topology(nodes * self.cluster.devices_per_node, nodes)
            return min((self.memory(topology, rung, *batch) for rung in rungs), key=lambda each: each.total)

        low = high = self.cluster.nodes
        while (now := held(high)).total > self.budget:
            if held(2 * high).total >= now.total:  # parts of a row cannot be sharded
                return high, now
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if held(middle).total <= self.budget else (middle, high)
        return high, held(high)


def _cost(choice: Choice) -> tuple[float, int]:
    """Of equally fast ones, that which holds least is better."""
    return choice.seconds, choice.memory.total


def _keeps_more(one: Rung, other: Rung) -> bool:
    """Whether a rung keeps whole what another does, and more."""
    if one == other:
        return False
    parameters, gradients = [*Parameters], [*Gradients]
    return parameters.index(one.parameters) >= parameters.index(other.parameters) and gradients.index(
        one.gradients
    ) >= gradients.index(other.gradients)


def size(nbytes: float) -> str:
    """Memory for people: "21.4 GiB"; in MiB where it is less than one."""
    unit, name = (1 << 30, "GiB") if nbytes >= 1 << 30 else (1 << 20, "MiB")
    return f"{nbytes / unit:.1f} {name}"
