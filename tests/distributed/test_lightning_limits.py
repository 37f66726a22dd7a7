"""What Lightning decides: what it refuses is refused before training, what it asks for or changes is followed."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from tests.distributed.ranks import run_ranks
from tests.distributed.toys import Batch, Batches, Toy, local, mics, seeded, trainer


class Scales(Toy):
    """Has all that the finder asks for, and is never trained."""

    batch_size = 2

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.zeros(64, 8), batch_size=self.batch_size)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        raise AssertionError("it trains")


def _batch_size_finder() -> None:
    with pytest.raises(ValueError, match=r'callbacks.BatchSizeFinder\(\), .* MiCSStrategy\(micro_batch="auto"\)'):
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


# -- accumulation ------------------------------------------------------------------------------------------------------


class Watches(Toy):
    """After each backward, notes whether the gradients are those of the other replicas."""

    def on_train_start(self) -> None:
        self.same: list[bool] = []

    def on_after_backward(self) -> None:
        group = self.trainer.strategy.mics.groups.replication_group  # type: ignore[attr-defined]
        mine = local(self.leave.bias.grad)
        all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(all_of_them, mine, group=group)
        self.same.append(all(torch.equal(other, mine) for other in all_of_them))


class WatchesManually(Watches):
    automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer, boundary = self.optimizers(), batch_idx in (3, 5)
        with optimizer.toggle_model(sync_grad=boundary):
            self.manual_backward(self.loss(batch))
        if boundary:
            optimizer.step()
            optimizer.zero_grad()


def _same(module: type[Watches], window: int) -> list[bool]:
    watches = seeded(module)
    trainer(mics(1), accumulate_grad_batches=window).fit(watches, Batches(6))
    return watches.same


@pytest.mark.parametrize(("module", "window"), [(Watches, 4), (WatchesManually, 1)])
def test_replicas_meet_where_lightning_says_so_and_nowhere_else(module: type[Watches], window: int) -> None:
    """At each fourth batch and at the last; averaging more often gives the same numbers, for more bytes."""
    assert run_ranks(2, _same, module, window) == [[False, False, False, True, False, True]] * 2
