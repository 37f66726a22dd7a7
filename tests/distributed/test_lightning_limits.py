"""Where Lightning itself draws a line: what it refuses is refused before training, what it changes is followed."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from tests.distributed.ranks import run_ranks
from tests.distributed.toys import Batch, Batches, Toy, mics, seeded, trainer


class Scales(Toy):
    """Has all that the finder asks for, and is never trained."""

    batch_size = 2

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.zeros(64, 8), batch_size=self.batch_size)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        raise AssertionError("it trains")


def _batch_size_finder() -> None:
    with pytest.raises(MisconfigurationException, match="not supported with distributed strategies"):
        trainer(mics(), callbacks=[BatchSizeFinder(max_trials=1)]).fit(seeded(Scales))
    with pytest.raises(ValueError, match="not supported with distributed strategies"):
        pl.tuner.Tuner(trainer(mics())).scale_batch_size(seeded(Scales), max_trials=1)


def test_the_batch_size_finder_is_refused_as_under_ddp() -> None:
    run_ranks(2, _batch_size_finder)


def _sixteen_mixed() -> list[torch.dtype | None]:
    found = []
    for options in ({"precision": "16-mixed"}, {"plugins": [MixedPrecision("16-mixed", "cpu")]}):
        run = trainer(mics(), **options)
        run.fit(seeded(Toy), Batches(2))
        found.append(run.strategy.mics.precision.param_dtype)  # type: ignore[attr-defined]
    return found


def test_parameters_travel_in_the_16_bits_that_lightning_computes_in() -> None:
    """On a CPU it takes bf16 for "16-mixed"; a plugin that is given is left as it is."""
    assert run_ranks(2, _sixteen_mixed)[0] == [torch.bfloat16, torch.float16]
