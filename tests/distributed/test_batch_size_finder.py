"""The batch size finder of several ranks: they choose alike, by the fullest, and train as though they had known."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import callbacks
from torch.utils.data import DataLoader, TensorDataset

from lightning_mics import trials
from lightning_mics.callbacks import BatchSizeFinder
from lightning_mics.refusals import check_callbacks
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import Batch, Batches, Toy, assert_same_training, batch_of, mics, seeded, trainer


class Sized(Toy):
    """Batches of rank 1 need twice the memory of rank 0's."""

    def __init__(self, batch_size: int = 3) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.tried: list[int] = []
        self.last = 0

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*batch_of(0, 0, size=400)), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:  # Lightning's tuner asks for one where there is a validation step
        return DataLoader(TensorDataset(*batch_of(1, 0, size=4)), batch_size=2)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.last = len(batch[0])
        if self.last not in self.tried:
            self.tried.append(self.last)
        return super().training_step(batch, batch_idx)


def _found(budget: int, **options: Any) -> tuple[int | None, list[int]]:
    """The size, and those that were tried, of a training that goes on as one with that size."""
    module, each = seeded(Sized), 10 * (1 + dist.get_rank())
    finder = BatchSizeFinder(memory_budget=budget, margin=0.0, **options)
    run = trainer(mics(), callbacks=[finder], max_steps=4, accumulate_grad_batches=2)
    with (
        patch.object(trials.memory, "in_use", lambda device: 100),
        patch.object(trials.memory, "peak", lambda device: 100 + each * module.last),
    ):
        run.fit(module)
    size = finder.optimal_batch_size
    assert size == module.batch_size
    module.losses = module.losses[-8:]
    known = seeded(Sized, batch_size=size)
    trainer(mics(), max_steps=4, accumulate_grad_batches=2).fit(known)
    assert_same_training(module, known, "as though it had been known", rtol=0.0, atol=0.0)
    return size, module.tried


def _finds() -> list[Any]:
    found = [_found(500), _found(500, mode="binsearch"), _found(10_000, max_val=16), _found(100, init_val=4)]
    for options, fit, what in (
        ({"rung": "auto"}, {}, 'rung="auto" both measure'),
        ({}, {"train_dataloaders": Batches(1)}, "let the module or the data module make them"),
    ):
        with pytest.raises(ValueError, match=what):
            trainer(mics(**options), callbacks=[BatchSizeFinder()]).fit(seeded(Sized), **fit)
    with pytest.raises(ValueError, match="has an attribute 'samples'"):
        trainer(mics(), callbacks=[BatchSizeFinder(batch_arg_name="samples")]).fit(seeded(Sized))
    with pytest.raises(ValueError, match="tries batches of a fit, not of test"):
        trainer(mics(), callbacks=[BatchSizeFinder()]).test(seeded(Sized), Batches(1))
    return found


@pytest.mark.slow
def test_ranks_find_the_same_size_and_none_runs_out_of_memory() -> None:
    """On rank 0 alone, 40 would fit 500 bytes; 20 fit on both, and a trial of more is never begun."""
    for power, binary, limited, least in run_ranks(2, _finds):
        assert power == (16, [2, 4, 8, 16])
        assert binary == (20, [2, 4, 8, 16, 20])
        assert limited[0] == 16
        assert least == (4, [4])


def test_another_strategy_is_told_of_lightnings_own() -> None:
    with pytest.raises(TypeError, match=r"use lightning\.pytorch\.callbacks\.BatchSizeFinder on one rank"):
        pl.Trainer(accelerator="cpu", devices=1, logger=False, callbacks=[BatchSizeFinder()]).fit(Sized())


class Cautious(BatchSizeFinder):
    """A user's own."""


def test_one_that_is_made_of_ours_is_not_refused() -> None:
    check_callbacks([BatchSizeFinder(), Cautious()])
    with pytest.raises(ValueError, match=r"use lightning_mics\.callbacks\.BatchSizeFinder"):
        check_callbacks([type("Theirs", (callbacks.BatchSizeFinder,), {})()])
