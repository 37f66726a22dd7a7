"""Planning: what is "auto" is decided before the model is sharded.

Rank 0 plans from a training step on fake tensors, an example of a batch, what the devices do when all ranks are at
work, and what is known of the network; all ranks take what it says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, IterableDataset

from lightning_mics._compat import FakeTensor
from lightning_mics.ladder import Rung
from lightning_mics.network import Network
from lightning_mics.planner.block_call import BlockCall
from lightning_mics.planner.hardware import Cluster
from lightning_mics.planner.measured import busy, measure
from lightning_mics.planner.measured_host import measure_hosts
from lightning_mics.planner.plan import Planner, Workload

_Told = TypeVar("_Told")

_BATCH_SIZE = "batch_size"
_STEPS = 3  # of each sample of what collectives cost


@dataclass(frozen=True)
class Decision:
    """What a training is to do.

    Attributes:
        partition_size: p.
        micro_batch: samples of a rank in a micro-step.
        window: micro-steps of an optimizer step.
        rung: what stays whole.
        lines: the plan for people, what was chosen first.
    """

    partition_size: int
    micro_batch: int
    window: int
    rung: Rung
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """What a training asks for; None is what is to be chosen.

    Attributes:
        partition_size: p.
        rung: what stays whole.
        window: micro-steps of an optimizer step, as it is.
        changes_batch: whether the micro-batch may become another, with as many samples in an optimizer step.
        memory_budget: bytes (an int), or a share of the device's memory (a float).
    """

    partition_size: int | None
    rung: Rung | None
    window: int
    changes_batch: bool
    memory_budget: int | float


@dataclass(frozen=True)
class Example:
    """What a micro-batch is like.

    Attributes:
        size: its samples.
        batch: makes one of so many samples.
    """

    size: int
    batch: Callable[[int], Any]

    @classmethod
    def of(cls, loader: object, instead: str, make: Callable[[int], Any] | None = None) -> Example:
        """Copies of a loader's first sample: nothing is taken out of the data.

        Args:
            loader: a `DataLoader` over samples that can be had by their number.
            instead: what else a user can do, for the error.
            make: makes a batch of so many samples, if something does.

        Raises:
            ValueError: for a loader whose samples can be had only by taking them.
        """
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise ValueError(
                f"an example of a batch is needed, and {type(loader).__name__} gives one only by taking it out of the "
                f"training data; {instead}"
            )
        first, collate = loader.dataset[0], loader.collate_fn
        if loader.batch_sampler is None:  # samples are batches
            return cls(1, lambda size: first)
        size = loader.batch_size or getattr(loader.batch_sampler, _BATCH_SIZE, None) or 1
        return cls(size, make or (lambda size: collate([first] * size)))


@dataclass(frozen=True)
class Question:
    """What is to be planned.

    Attributes:
        asked: what is given.
        size: samples of a micro-batch of the data.
        workload: the model's shapes and its training step; or the error for which there is none.
        instead: what else a user can do, for errors.
    """

    asked: Asked
    size: int
    workload: Workload | Exception
    instead: str

    @classmethod
    def of(cls, asked: Asked, make: Callable[[], tuple[int, Workload]], instead: str) -> Question:
        """With the size and the workload that `make` makes. Raises nothing, as the other ranks go on."""
        try:
            with isolate_rng():
                size, workload = make()
        except Exception as error:
            return cls(asked, 0, error, instead)
        return cls(asked, size, workload, instead)

    def block(self, device: torch.device) -> BlockCall | None:
        """One that can be timed on `device`; None if none can, by itself. Collective on the default group."""
        made: BlockCall | None = None
        try:
            if isinstance(work := self.workload, Workload):
                made = BlockCall.of(work.module, work.batch(self.size), work.step, device, work.blocks, work.precision)
        except (
            Exception
        ):  # a tiny one is timed instead, and what is wrong with the training step is told by planning it
            made = None
        everywhere = torch.tensor(made is not None, dtype=torch.int32, device=device)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return made if everywhere.item() else None

    def check(self) -> None:
        """Raises:
        Exception: that for which there is no workload.
        """
        if isinstance(self.workload, Exception):
            raise self.workload

    def answer(self, cluster: Cluster) -> Decision:
        """Plan it.

        Raises:
            Exception: what planning it raises.
        """
        assert isinstance(self.workload, Workload)  # as checked
        planner = Planner(self.workload, cluster, memory_budget=self.asked.memory_budget)
        window = self.asked.window
        of_step: dict[str, int] = {"micro_batch": self.size, "window": window}
        if self.asked.changes_batch:
            of_step = {"global_batch": self.size * window * cluster.devices}
        plan = planner.plan(partition_size=self.asked.partition_size, rung=self.asked.rung, **of_step)
        best = plan.best
        return Decision(best.partition_size, best.micro_batch, best.window, best.rung, tuple(plan.lines()))


def decide(
    question: Question, device: torch.device, nodes: int, ranks_per_node: int, network: Network | None
) -> Decision:
    """Measure the devices, and plan on rank 0, for all. Collective on the default group.

    Args:
        question: what is to be planned.
        device: this rank's.
        nodes: how many.
        ranks_per_node: k.
        network: as measured by `mics probe`; by default what is assumed of one.

    Raises:
        ValueError: on all ranks alike, with the reason for which rank 0 could not plan.
    """
    _told_by_rank_zero(question.check, question.instead, device)  # before anything is measured
    cluster = _cluster_at_hand(question, device, nodes, ranks_per_node, network)
    return _told_by_rank_zero(lambda: question.answer(cluster), question.instead, device)


def _told_by_rank_zero(make: Callable[[], _Told], instead: str, device: torch.device) -> _Told:
    """What rank 0 makes of it, or why it cannot, on all ranks. Collective on the default group."""
    told: list[tuple[_Told | None, str | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            told[0] = make(), None
        except ValueError as error:  # the others wait for it
            told[0] = None, f"{error}"
        except Exception as error:
            told[0] = None, f"the training step cannot be planned: {type(error).__name__}: {error}; {instead}"
    dist.broadcast_object_list(told, src=0, device=device)
    made, why_not = told[0]
    if why_not is not None:
        raise ValueError(why_not)
    return made  # type: ignore[return-value]


def _cluster_at_hand(
    question: Question, device: torch.device, nodes: int, ranks_per_node: int, network: Network | None
) -> Cluster:
    """What the ranks measure together. Collective on the default group."""
    network = network or Network.default(ranks_per_node, device.type)
    with isolate_rng():
        at_hand = measure(device, ranks_per_node, question.block(device))
        cluster = Cluster.from_probe(network, at_hand, nodes, ranks_per_node)
        if device.type != "cpu":
            return cluster
        hosts = measure_hosts(ranks_per_node, busy(), ("mics",), _STEPS)
    return replace(cluster, backend="gloo", hosts=hosts)


def shapes_of(module: nn.Module, *, kept: tuple[object, ...] = ()) -> nn.Module:
    """A copy without the values of its parameters: whatever else a training step changes stays as it is.

    Args:
        module: on any device.
        kept: what it refers to and is not copied, beside its buffers.
    """
    same = {id(each): each for each in (*kept, *module.buffers())}
    shapes = {
        id(param): nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        for param in module.parameters()
    }
    return copy.deepcopy(module, same | shapes)


class Values(TorchFunctionMode):
    """Numbers that are read off tensors without values, to be kept or shown, are 0."""

    _READS: ClassVar = {Tensor.item: float, Tensor.__float__: float, Tensor.__int__: int, Tensor.__bool__: bool}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._READS and isinstance(args[0], FakeTensor):
            return self._READS[func](0)
        return func(*args, **(kwargs or {}))
