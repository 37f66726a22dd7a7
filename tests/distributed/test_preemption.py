"""A run that gets a signal stops on all ranks after the same step, and goes on as though it had not stopped.

Each test compares three runs: one that nothing stops, one that a rank's own `os.kill` stops at a known place, and one
that resumes. What the last two train and validate, one after the other, is what the first does, bit for bit.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.ranks import run_ranks
from tests.distributed.toys import (
    Batch,
    Batches,
    Toy,
    assert_close,
    assert_same_losses,
    batch_of,
    mics,
    parameters,
    seeded,
    trainer,
)

EPOCHS, BATCHES, WINDOW = 2, 6, 2
ALL = (0, 1)


def _is(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise AssertionError(f"{what}: {found!r}, expected {expected!r}")


@dataclass(frozen=True)
class Signals:
    """Sent by some ranks to themselves, when a hook is entered for the n-th time."""

    hook: str
    count: int
    ranks: Collection[int] = ALL
    numbers: tuple[signal.Signals, ...] = (signal.SIGTERM,)

    def send(self) -> None:
        for number in self.numbers if dist.get_rank() in self.ranks else ():
            os.kill(os.getpid(), number)


class Stoppable(Toy):
    """With dropout and a falling learning rate, so that a draw or a step more or less would show."""

    signals: Signals | None = None

    def _enter(self, hook: str) -> None:
        counts = self.__dict__.setdefault("entered", {})
        counts[hook] = counts.get(hook, 0) + 1
        if self.signals is not None and (hook, counts[hook]) == (self.signals.hook, self.signals.count):
            self.signals.send()

    def on_train_start(self) -> None:
        self._enter("on_train_start")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._enter("training_step")
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._enter("on_train_batch_end")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._enter("validation_step")
        if not self.trainer.sanity_checking:
            super().validation_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self._enter("on_train_epoch_end")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._enter("on_save_checkpoint")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Manual(Stoppable):
    """A step in every second batch."""

    automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer, boundary = self.optimizers(), batch_idx % 2 == 1
        self._enter("training_step")
        loss = self.loss(batch)
        self.losses.append(loss.item())
        with optimizer.toggle_model(sync_grad=boundary):
            self.manual_backward(loss)
        if boundary:
            optimizer.step()
            optimizer.zero_grad()


def _fit(module: Toy, callbacks: list[Any], ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    torch.manual_seed(1234 + dist.get_rank() if ckpt_path is None else 4321)
    defaults = {
        "accumulate_grad_batches": WINDOW if module.automatic_optimization else 1,
        "max_epochs": EPOCHS,
        "val_check_interval": 4,
        "num_sanity_val_steps": 1,
        "enable_checkpointing": True,
    }
    run = trainer(options.pop("strategy", None) or mics(), callbacks=callbacks, **(defaults | options))
    validation = DataLoader(TensorDataset(*batch_of(50, 0, size=2 * len(ALL))))
    run.fit(module, Batches(BATCHES), validation, ckpt_path=ckpt_path)
    return run


def _module(cls: type[Stoppable], seed: int = 7) -> Any:
    return seeded(cls, seed, dropout=0.3)


def _stopped(module: Stoppable, signals: Signals, fit: Callable[[], Any]) -> int:
    """How many micro-steps the run had when it stopped, on every rank; with exit code 143, handlers as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    module.signals = signals
    with pytest.raises(SIGTERMException) as stop:
        fit()
    _is(stop.value.code, 143 if dist.get_rank() == 0 else None, "the exit code under Lightning's own environment")
    for number, handler in before.items():
        _is(signal.getsignal(number), handler, f"the handler of {number.name} afterwards")
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, len(module.losses))
    _is(len(set(counts)), 1, f"micro-steps on the ranks, {counts}")
    return int(counts[0])


def _resumes(path: Path, cls: type[Stoppable], cases: dict[str, tuple[Signals, int]], options: dict[str, Any]) -> None:
    """For each case: where the run stops, and that the resumed run trains and validates what was left."""
    whole = _module(cls)
    _fit(whole, [ModelCheckpoint(path / "whole")], **options)
    for number, (what, (signals, micro_steps)) in enumerate(cases.items()):
        saves = [partial(ModelCheckpoint, path / str(number), every_n_epochs=EPOCHS)] * 2
        first, second = _module(cls), _module(cls, seed=99)
        _is(_stopped(first, signals, lambda: _fit(first, [saves[0]()], **options)), micro_steps, what)  # noqa: B023
        _fit(second, [saves[1]()], "last", **options)
        _is(len(second.losses), EPOCHS * BATCHES - micro_steps, f"{what}: micro-steps after the resume")
        assert_same_losses(first.losses + second.losses, whole.losses, what)
        assert_same_losses(first.validated + second.validated, whole.validated, f"{what}, validation")
        assert_close(parameters(second), parameters(whole), what)


# -- who hears it ------------------------------------------------------------------------------------------------------


def test_all_ranks_stop_after_the_same_step_whoever_got_the_signal(tmp_path: Path) -> None:
    """In the first micro-step of a window of two its question is not asked yet; in the second it is."""
    cases = {
        "all ranks": (Signals("training_step", 3), 4),
        "rank 0": (Signals("training_step", 3, ranks=(0,)), 4),
        "rank 1": (Signals("training_step", 3, ranks=(1,)), 4),
        "rank 1, too late for that window": (Signals("training_step", 8, ranks=(1,)), 10),
        "twice": (Signals("training_step", 7, numbers=(signal.SIGTERM, signal.SIGTERM)), 8),
    }
    run_ranks(2, _resumes, tmp_path, Stoppable, cases, {"limit_val_batches": 0})


# -- when it comes -----------------------------------------------------------------------------------------------------


def test_wherever_the_signal_comes_no_step_is_lost(tmp_path: Path) -> None:
    """Validation runs after the fourth batch of each epoch of six, for two batches; the sanity check for one."""
    cases = {
        "sanity check": (Signals("validation_step", 1), 2),
        "before the first step": (Signals("on_train_start", 1, ranks=(1,)), 2),
        "a validation is due after that window": (Signals("training_step", 3), 4),
        "in a validation": (Signals("validation_step", 3, ranks=(1,)), 4),
        "between a step and a validation": (Signals("on_train_batch_end", 4, ranks=(0,)), 4),
        "an epoch's last window": (Signals("training_step", 5), 6),
        "at an epoch's end": (Signals("on_train_epoch_end", 1), 8),
        "the last window of all": (Signals("training_step", 11), 12),
    }
    run_ranks(2, _resumes, tmp_path, Stoppable, cases, {})


def test_manual_optimization_stops_after_a_batch_that_stepped(tmp_path: Path) -> None:
    cases = {"first of two": (Signals("training_step", 3), 4), "second of two": (Signals("training_step", 8), 10)}
    run_ranks(2, _resumes, tmp_path, Manual, cases, {"limit_val_batches": 0})
