"""Planning: `partition_size="auto"` and `micro_batch="auto"`, decided when a fit begins.

Rank 0 plans from the LightningModule's training step on fake tensors, an example of a batch, what the devices do when
all ranks are at work, and what is known of the network; all ranks take what it says. Nothing is taken out of the
training data; see `Example`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr, lightning_setattr
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, IterableDataset

from lightning_mics._compat import FakeTensor, train_loader
from lightning_mics.ladder import Rung
from lightning_mics.network import Network
from lightning_mics.planner.block_call import BlockCall
from lightning_mics.planner.hardware import Cluster
from lightning_mics.planner.measured import busy, measure
from lightning_mics.planner.measured_host import measure_hosts
from lightning_mics.planner.plan import Planner, Workload

_BATCH_SIZE = "batch_size"
_STEPS = 3  # of each sample of what collectives cost
_INSTEAD = 'choose partition_size="node" or a number, and no micro_batch'


@dataclass(frozen=True)
class Decision:
    """What a fit is to do.

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
    """What a strategy asks for; None is what is to be chosen.

    Attributes:
        partition_size: p.
        rung: what stays whole.
        changes_batch: whether the micro-batch may become another, with as many samples in an optimizer step.
        memory_budget: bytes (an int), or a share of the device's memory (a float).
    """

    partition_size: int | None
    rung: Rung | None
    changes_batch: bool
    memory_budget: int | float


def decide(
    trainer: Any,
    workload: Workload,
    asked: Asked,
    device: torch.device,
    nodes: int,
    ranks_per_node: int,
    network: Network | None,
    computing: Callable[[], AbstractContextManager[Any]],
) -> Decision:
    """Measure the devices, and plan on rank 0, for all. Collective on the default group.

    Args:
        trainer: whose fit begins; its loaders are not made yet.
        workload: with the LightningModule; batch and step are filled in here.
        asked: what is given.
        device: this rank's.
        nodes: how many.
        ranks_per_node: k.
        network: as measured by `mics probe`; by default what is assumed of one.
        computing: the context of a training step (its precision's).

    Raises:
        ValueError: on all ranks alike, with the reason for which rank 0 could not plan.
    """
    told: list[Decision | str | None] = [None]
    question = Question.of(trainer, workload, asked, computing)
    cluster = _cluster_at_hand(question, device, nodes, ranks_per_node, network)
    if dist.get_rank() == 0:
        try:
            told[0] = question.answer(trainer, cluster)
        except Exception as error:  # the others wait for it
            told[0] = f"{error}"
            if not isinstance(error, ValueError):
                told[0] = f"the training step cannot be planned: {type(error).__name__}: {error}; {_INSTEAD}"
    dist.broadcast_object_list(told, src=0, device=device)
    decision = told[0]
    if not isinstance(decision, Decision):
        raise ValueError(str(decision))
    return decision


def apply_batch(trainer: Any, decision: Decision) -> None:
    """Give the Trainer's data another batch size, and the Trainer as many micro-steps as keep the samples of a step."""
    lightning_setattr(trainer.lightning_module, _BATCH_SIZE, decision.micro_batch)
    trainer.accumulate_grad_batches = decision.window


@dataclass(frozen=True)
class Question:
    """What is to be planned.

    Attributes:
        asked: what is given.
        size: samples of a micro-batch of the data.
        workload: the LightningModule's shapes and its training step; or the error for which there is none.
    """

    asked: Asked
    size: int
    workload: Workload | Exception

    @classmethod
    def of(
        cls, trainer: Any, workload: Workload, asked: Asked, computing: Callable[[], AbstractContextManager[Any]]
    ) -> Question:
        """That of a fit which begins. Raises nothing, as the other ranks go on."""
        try:
            with isolate_rng():
                example = _checked_example(trainer, asked)
                module = _shapes(trainer.lightning_module, trainer)
        except Exception as error:
            return cls(asked, 0, error)
        own = replace(workload, module=module, batch=example.batch, step=_training_step(computing))
        return cls(asked, example.size, own)

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

    def answer(self, trainer: Any, cluster: Cluster) -> Decision:
        """Plan it.

        Raises:
            Exception: that for which there is no workload, or what planning it raises.
        """
        if isinstance(self.workload, Exception):
            raise self.workload
        planner = Planner(self.workload, cluster, memory_budget=self.asked.memory_budget)
        window = trainer.accumulate_grad_batches
        of_step: dict[str, int] = {"micro_batch": self.size, "window": window}
        if self.asked.changes_batch:
            of_step = {"global_batch": self.size * window * cluster.devices}
        plan = planner.plan(partition_size=self.asked.partition_size, rung=self.asked.rung, **of_step)
        best = plan.best
        return Decision(best.partition_size, best.micro_batch, best.window, best.rung, tuple(plan.lines()))


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


def _checked_example(trainer: Any, asked: Asked) -> Example:
    module = trainer.lightning_module
    if not module.automatic_optimization:
        raise ValueError(f"a training step that optimizes by itself cannot be planned; {_INSTEAD}")
    if asked.changes_batch and not lightning_hasattr(module, _BATCH_SIZE):
        raise ValueError(
            'micro_batch="auto" sets `batch_size` of the LightningModule or the LightningDataModule, and neither has '
            "it; read it in train_dataloader(), or leave micro_batch out"
        )
    return Example.of(trainer)


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
    def of(cls, trainer: Any) -> Example:
        """That of a fit: by `example_batch(size)` of its data module or module, or by its loader's first sample.

        Raises:
            ValueError: if there is neither, as a batch could then be had only by taking it out of the training data.
        """
        module = trainer.lightning_module
        known = (getattr(owner, "example_batch", None) for owner in (trainer.datamodule, module))
        make = next((each for each in known if each is not None), None)
        if make is not None and lightning_hasattr(module, _BATCH_SIZE):
            return cls(int(lightning_getattr(module, _BATCH_SIZE)), make)
        loader = train_loader(trainer)
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise ValueError(
                f"an example of a batch is needed, and {type(loader).__name__} gives one only by taking it out of the "
                "training data; give the LightningModule or the LightningDataModule a method example_batch(size) and "
                f"an attribute batch_size, or {_INSTEAD}"
            )
        first, collate = loader.dataset[0], loader.collate_fn
        if loader.batch_sampler is None:  # samples are batches
            return cls(1, lambda size: first)
        size = loader.batch_size or getattr(loader.batch_sampler, _BATCH_SIZE, None) or 1
        return cls(size, make or (lambda size: collate([first] * size)))


def _training_step(computing: Callable[[], AbstractContextManager[Any]]) -> Callable[[nn.Module, Any], Tensor]:
    """From a LightningModule and a batch to the loss, as the Trainer has it, but that nothing is logged."""

    def step(module: Any, batch: Any) -> Tensor:
        wants_index = len(inspect.signature(module.training_step).parameters) > 1
        with _silent(module), computing(), _Values():
            output = module.training_step(batch, 0) if wants_index else module.training_step(batch)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise ValueError(f"training_step returned {type(loss).__name__} for an example, not a loss; {_INSTEAD}")
        return loss

    return step


def _shapes(module: nn.Module, trainer: Any) -> nn.Module:
    """A copy without the values of its parameters: whatever else a training step changes stays as it is."""
    kept = {id(trainer): trainer, **{id(buffer): buffer for buffer in module.buffers()}}
    shapes = {
        id(param): nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        for param in module.parameters()
    }
    return copy.deepcopy(module, kept | shapes)


class _Values(TorchFunctionMode):
    """Numbers that are read off tensors without values, to be kept or shown, are 0."""

    _READS: ClassVar = {Tensor.item: float, Tensor.__float__: float, Tensor.__int__: int, Tensor.__bool__: bool}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._READS and isinstance(args[0], FakeTensor):
            return self._READS[func](0)
        return func(*args, **(kwargs or {}))


@contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    """What is logged here would be shown as training's."""
    names = ("log", "log_dict", "print")
    before = {name: vars(module)[name] for name in names if name in vars(module)}
    vars(module).update(dict.fromkeys(names, lambda *args, **kwargs: None))
    try:
        yield
    finally:
        for name in names:
            del vars(module)[name]
        vars(module).update(before)
