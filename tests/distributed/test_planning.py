"""partition_size="auto" and micro_batch="auto" on real ranks: one plan for all, nothing lost, errors everywhere."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning_utilities.core import rank_zero
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_mics import MiCSStrategy, planning
from lightning_mics.planner import measured
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import Batch, Toy, batch_of, seeded, trainer
from tests.raising import raised

SAMPLES = 64
MIB = 1 << 20


class Samples(Dataset[Batch]):
    """Numbers that are drawn when they are asked for, as augmentations are."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Batch:
        x, y = batch_of(index, 0, size=1)
        return x[0] + 0.01 * torch.randn(8).to(x.device), y[0]


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(Samples(), batch_size=self.batch_size, shuffle=True)


class Endless(IterableDataset[Batch]):
    def __iter__(self) -> Any:
        return (batch_of(index, dist.get_rank(), size=1) for index in range(SAMPLES))


class Told(Data):
    """A stream that tells what a batch is like."""

    def train_dataloader(self) -> Any:
        return DataLoader(Endless(), batch_size=self.batch_size)

    def example_batch(self, size: int) -> Batch:
        return batch_of(0, 0, size)


class Logging(Toy):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def hurry(hosts: bool = False) -> None:
    """In a process of its own, so that nobody else is measured as badly; what collectives cost only if `hosts`."""
    if not hosts:
        planning.measure_hosts = lambda *_: {}  # type: ignore[assignment]
    measured._ROUNDS, measured._SECONDS_OF_A_SAMPLE, measured._SECONDS_BUSY, planning._STEPS = 1, 0.002, 0.01, 1


def auto(hosts: bool = False, **kwargs: Any) -> MiCSStrategy:
    hurry(hosts)
    return MiCSStrategy(ranks_per_node=2, **kwargs)


def _told(strategy: MiCSStrategy) -> tuple[Any, ...]:
    """What each rank has taken."""
    taken: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(taken, (strategy.topology.partition_size, strategy.mics.groups.topology.partition_size))
    return tuple(taken)


def _plans() -> None:
    """As pinned by hand afterwards: the same losses, so that planning took no sample and drew no random number."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    rank_zero.log.addHandler(handler)
    planned, strategy = seeded(Logging), auto(partition_size="auto", hosts=True)
    trainer(strategy, accumulate_grad_batches=2).fit(planned, datamodule=Data())
    sizes = _told(strategy)
    assert len({*sizes}) == 1 and len({*sizes[0]}) == 1, sizes
    pinned = seeded(Logging)
    trainer(auto(partition_size=sizes[0][0]), accumulate_grad_batches=2).fit(pinned, datamodule=Data())
    assert planned.losses == pinned.losses, (planned.losses, pinned.losses)
    table = [text for text in told if text.startswith("planned: ")]
    assert len(table) == (dist.get_rank() == 0), told
    for text in table:
        assert f"planned: p={sizes[0][0]}: " in text and text.count("p=") == 3, text


def _keeps_the_samples_of_a_step() -> None:
    data, strategy = Data(batch_size=4), auto(partition_size="auto", micro_batch="auto", rung="auto")
    module, runner = seeded(Logging), trainer(strategy, accumulate_grad_batches=2)
    runner.fit(module, datamodule=data)
    assert data.batch_size * runner.accumulate_grad_batches == 8
    assert (data.batch_size, runner.accumulate_grad_batches) == (8, 1), "one micro-step takes the fewest collectives"
    climb = strategy.mics.window.climb
    assert climb is not None and strategy.mics.rung == climb.first == strategy._planned_rung
    assert runner.global_step == SAMPLES // (8 * dist.get_world_size())


def _refuses() -> None:
    cases: list[tuple[dict[str, Any], Any, str]] = [
        ({"partition_size": "auto", "memory_budget": 1000}, DataLoader(Samples(), 2), "the model does not fit 2 nodes"),
        ({"partition_size": "auto"}, DataLoader(Endless(), 2), "gives one only by taking it out of the training data"),
        ({"micro_batch": "auto"}, DataLoader(Samples(), 2), "sets `batch_size` of the LightningModule or the"),
    ]
    for arguments, loader, message in cases:
        fit = trainer(auto(**arguments)).fit
        error = raised(partial(fit, seeded(Toy), loader))
        assert error.startswith("ValueError: ") and message in error, error


def _by_example() -> None:
    strategy = auto(partition_size="auto")
    module = seeded(Toy)
    trainer(strategy).fit(module, datamodule=Told())
    assert len({*_told(strategy)}) == 1
    assert len(module.losses) == SAMPLES // 2, "nothing was taken"


def _only_when_fitting() -> None:
    strategy = auto(partition_size="auto")
    trainer(strategy).test(seeded(Toy), DataLoader(Samples(), 2), verbose=False)
    assert strategy.topology.partition_size == 2


@pytest.mark.slow
def test_all_ranks_take_one_plan_and_lose_nothing() -> None:
    run_ranks(4, _plans)


def _other_fits() -> None:
    _keeps_the_samples_of_a_step()
    _by_example()
    _only_when_fitting()


def test_batches_streams_and_what_is_no_fit() -> None:
    run_ranks(4, _other_fits)


def test_what_cannot_be_planned_is_refused_on_all_ranks() -> None:
    run_ranks(4, _refuses)


def test_a_number_is_for_the_loader() -> None:
    with pytest.raises(ValueError, match='micro_batch=4 must be None or "auto"; a number is for the data loader'):
        MiCSStrategy(micro_batch=4)  # type: ignore[arg-type]
