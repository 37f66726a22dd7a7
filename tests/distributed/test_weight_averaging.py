"""Averages of sharded weights: equal to those that Lightning keeps under DDP, in validation, checkpoints and after."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks import WeightAveraging as OfLightning
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_mics import consolidate
from lightning_mics.averages import Averages
from lightning_mics.callbacks import WeightAveraging
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import (
    Batches,
    Toy,
    assert_close,
    assert_same_losses,
    assert_same_training,
    ddp,
    mics,
    parameters,
    seeded,
    trainer,
)

DECAY, WINDOW = 0.7, 2


def _saves() -> ModelCheckpoint:
    """At the end of each epoch, in the folder of this test."""
    return ModelCheckpoint(".", "{step}", every_n_train_steps=3, save_top_k=-1)


class Every(OfLightning):
    """Lightning's, after the same steps as ours; counted from 0."""

    def __init__(self, every: int, start: int, **options: Any) -> None:
        super().__init__(**options)
        self.every, self.start = every, start - 1

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= self.start and (step_idx - self.start) % self.every == 0


class Checkpointed(Toy):
    """SGD, so that nothing but averages and weights is to be restored."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def _fit(module: Toy, strategy: Any, *added: pl.Callback, epochs: int = 2, path: Any = None, **more: Any) -> Toy:
    """Validates in the midst of a window, and at the end of each epoch."""
    every = {"accumulate_grad_batches": WINDOW, "max_epochs": epochs, "val_check_interval": 3}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in added)
    run = trainer(strategy, callbacks=[*added], enable_checkpointing=saves, **every, **more)
    run.fit(module, Batches(6), Batches(1, first=900), ckpt_path=path)
    return module


WAYS = {
    "p=4, kept whole for a window": {"partition_size": 4, "rung": "window/whole"},
    "optimizer over all ranks": {"optimizer_state": "world"},
}


def _averages() -> None:
    for decay, every, start in ((DECAY, 1, 1), (None, 2, 2)):
        average = {} if decay is None else {"avg_fn": get_ema_avg_fn(decay)}
        theirs = _fit(seeded(Checkpointed), ddp(), Every(every, start, **average), epochs=start)
        for way, options in WAYS.items() if start == 1 else [("p=2", {})]:
            ours = WeightAveraging(decay, every_n_steps=every, start_step=start)
            whole = _fit(seeded(Checkpointed), mics(**options), ours, epochs=start)
            if start == 1:  # before its first update Lightning validates a copy of the first weights
                assert_same_training(whole, theirs, f"decay {decay}, {way}")
            else:
                assert_same_losses(whole.losses, theirs.losses, way, rtol=1e-6)
                assert_close(parameters(whole), parameters(theirs), way, atol=1e-6)


def test_they_equal_those_of_lightning_under_ddp() -> None:
    run_ranks(4, _averages)


def _resumes() -> None:
    whole = _fit(seeded(Checkpointed), mics(), WeightAveraging(DECAY), _saves())
    at = Path("step=3.ckpt")
    resumed = _fit(seeded(Checkpointed, seed=8), mics(4), WeightAveraging(DECAY), path=at)
    assert_same_losses(resumed.losses, whole.losses[6:], "on another partition size", rtol=1e-6)
    assert_same_losses(resumed.validated, whole.validated[2:], "validation", rtol=1e-6)
    assert_close(parameters(resumed), parameters(whole), "resumed", atol=1e-6)

    tested = seeded(Checkpointed, seed=8)
    trainer(mics()).validate(tested, Batches(1, first=900), ckpt_path=at, verbose=False)
    assert_same_losses(tested.validated, whole.validated[1:2], "a checkpoint has the averages in the model's place")

    if torch.distributed.get_rank() == 0:
        consolidate(at, "whole.ckpt")
    torch.distributed.barrier()
    resumed = _fit(seeded(Checkpointed, seed=8), mics(), WeightAveraging(DECAY), path="whole.ckpt")
    assert_close(parameters(resumed), parameters(whole), "from a single file", atol=1e-6)

    says = "holds averaged weights, and training goes on from them"
    with pytest.warns(UserWarning, match=says) if torch.distributed.get_rank() == 0 else nullcontext():
        _fit(seeded(Checkpointed), mics(), path=at)


def test_a_run_goes_on_with_its_weights_and_their_averages() -> None:
    run_ranks(4, _resumes)


def _narrow() -> None:
    """In 16 bits an average that moves by less than half of a last place would stand still."""
    make = partial(_fit, precision="bf16-true")
    callback = WeightAveraging(0.999)
    whole = make(seeded(Checkpointed), mics(), callback, _saves())
    assert callback.averages is not None
    wide = {k: v for k, v in callback.averages._values.items()}
    assert {value.dtype for value in wide.values()} == {torch.float32}
    again = WeightAveraging(0.999)
    resumed = make(seeded(Checkpointed, seed=8), mics(), again, path="step=3.ckpt")
    assert again.averages is not None
    assert_close(parameters(resumed), parameters(whole), "resumed in 16 bits")
    for name, value in again.averages._values.items():
        assert torch.equal(value.to_local(), wide[name].to_local()), name  # type: ignore[attr-defined]


def test_averages_of_16_bit_weights_are_kept_and_saved_in_fp32() -> None:
    run_ranks(2, _narrow)


# -- without processes -------------------------------------------------------------------------------------------------


def test_showing_and_hiding_leaves_every_bit() -> None:
    module = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    averages = Averages(module, 0.9)
    averages.update()
    before = module.weight.detach().clone()
    module.weight.data.add_(1)
    averages.update()
    now = module.weight.detach().clone()
    for _ in range(2):
        averages.show()
    expected = (0.9 * before.float() + 0.1 * now.float()).bfloat16()
    torch.testing.assert_close(module.weight.detach(), expected)
    averages.hide()
    assert torch.equal(module.weight, now)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"decay": 1.0}, r"decay=1\.0 must be between 0 and 1"),
        ({"every_n_steps": 0}, r"every_n_steps=0 must be at least 1"),
        ({"start_step": 0}, r"start_step=0 must be at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WeightAveraging(**options)


def test_another_strategy_is_told_what_to_use() -> None:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    run = pl.Trainer(accelerator="cpu", devices=1, callbacks=[WeightAveraging()], **quiet)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"averages the shards of MiCSStrategy, .*; use .*EMAWeightAveraging"):
        run.fit(seeded(Toy), [])
