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
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_mics.preemption import Preemption
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


def _fit(
    module: Toy, callbacks: list[Any], ckpt_path: Any = None, *, async_save: bool = False, **options: Any
) -> pl.Trainer:
    torch.manual_seed(1234 + dist.get_rank() if ckpt_path is None else 4321)
    defaults = {
        "accumulate_grad_batches": WINDOW if module.automatic_optimization else 1,
        "max_epochs": EPOCHS,
        "val_check_interval": 4,
        "num_sanity_val_steps": 1,
        "enable_checkpointing": True,
    }
    run = trainer(
        options.pop("strategy", None) or mics(async_save=async_save), callbacks=callbacks, **(defaults | options)
    )
    validation = DataLoader(TensorDataset(*batch_of(50, 0, size=2 * len(ALL))))
    run.fit(module, Batches(BATCHES), validation, ckpt_path=ckpt_path)
    return run


def _module(cls: type[Stoppable], seed: int = 7) -> Any:
    return seeded(cls, seed, dropout=0.3)


def _stopped(
    module: Stoppable, signals: Signals, fit: Callable[[], Any], codes: tuple[int | None, ...] = (143, None)
) -> int:
    """How many micro-steps the run had when it stopped, the same on all ranks; then handlers are as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    module.signals = signals
    with pytest.raises(SIGTERMException) as stop:
        fit()
    _is(stop.value.code, codes[dist.get_rank()], "the exit code")
    for number, handler in before.items():
        _is(signal.getsignal(number), handler, f"the handler of {number.name} afterwards")
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, len(module.losses))
    _is(len(set(counts)), 1, f"micro-steps on the ranks, {counts}")
    return int(counts[0])


def _resumes(path: Path, cls: type[Stoppable], cases: dict[str, tuple[Signals, int]], options: dict[str, Any]) -> None:
    """For each case: where the run stops, and that the resumed run trains and validates what was left."""
    whole = _module(cls)
    _fit(whole, [_saves(path / "whole")], **options)
    for number, (what, (signals, micro_steps)) in enumerate(cases.items()):
        fit = partial(_fit, callbacks=[_saves(path / str(number))], **options)
        first, second = _module(cls), _module(cls, seed=99)
        _is(_stopped(first, signals, partial(fit, first)), micro_steps, what)
        fit(second, ckpt_path="last")
        _is(len(second.losses), EPOCHS * BATCHES - micro_steps, f"{what}: micro-steps after the resume")
        _same(whole, first, second, what)


def _same(whole: Toy, first: Toy, second: Toy, what: str) -> None:
    assert_same_losses(first.losses + second.losses, whole.losses, what)
    assert_same_losses(first.validated + second.validated, whole.validated, f"{what}, validation")
    assert_close(parameters(second), parameters(whole), what)


def _saves(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=2)


# -- who hears it ------------------------------------------------------------------------------------------------------


def test_all_ranks_stop_after_the_same_step_whoever_got_the_signal(tmp_path: Path) -> None:
    """In the first micro-step of a window of two its question is not asked yet; in the second it is."""
    cases = {
        "rank 1": (Signals("training_step", 3, ranks=(1,)), 4),
        "rank 1, too late for that window": (Signals("training_step", 8, ranks=(1,)), 10),
        "twice": (Signals("training_step", 7, numbers=(signal.SIGTERM, signal.SIGTERM)), 8),
    }
    run_ranks(2, _resumes, tmp_path, Stoppable, cases, {"limit_val_batches": 0})


# -- when it comes -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wherever_the_signal_comes_no_step_is_lost(tmp_path: Path) -> None:
    """Validation runs after the fourth batch of each epoch of six, for two batches; the sanity check for one."""
    cases = {
        "sanity check": (Signals("validation_step", 1, ranks=(1,)), 2),
        "in a validation": (Signals("validation_step", 3, ranks=(1,)), 4),
        "between a step and a validation": (Signals("on_train_batch_end", 4, ranks=(0,)), 4),
        "an epoch's last window": (Signals("training_step", 5), 6),
        "at an epoch's end": (Signals("on_train_epoch_end", 1, ranks=(1,)), 6),
        "in a save": (Signals("on_save_checkpoint", 2), 10),
        "after all steps": (Signals("on_train_epoch_end", 2, ranks=(0,)), 12),
    }
    run_ranks(2, _resumes, tmp_path, Stoppable, cases, {})
    within = {"in a validation within a window": (Signals("validation_step", 2), 4)}
    run_ranks(2, _resumes, tmp_path / "within", Stoppable, within, {"val_check_interval": 3})


def test_manual_optimization_stops_after_a_batch_that_stepped(tmp_path: Path) -> None:
    cases = {"first of two": (Signals("training_step", 3), 4), "second of two": (Signals("training_step", 8), 10)}
    run_ranks(2, _resumes, tmp_path, Manual, cases, {"limit_val_batches": 0})


# -- SLURM -------------------------------------------------------------------------------------------------------------


def _requeued(path: Path, async_save: bool) -> list[str]:
    """Preempted twice, each time resumed by Lightning's own search, then cancelled; what scontrol was asked for."""
    os.environ["SLURM_PROCID"] = os.environ["SLURM_LOCALID"] = str(dist.get_rank())
    options = {"default_root_dir": path, "limit_val_batches": 0, "async_save": async_save}
    whole, parts = _module(Stoppable), []
    _fit(whole, [_saves(path / "whole")], **options)
    if dist.get_rank() == 0:
        (path / ".preempted.ckpt.partial" / "rng").mkdir(parents=True)  # of a save that was killed
    requeue, cancel = (signal.SIGUSR1,), (signal.SIGTERM,)
    for ranks, numbers, micro_steps in ((1,), requeue, 2), (ALL, requeue, 4), (ALL, cancel, 2):
        part = _module(Stoppable, seed=7 if not parts else 99)
        fit = partial(_fit, part, [], **options)
        _is(_stopped(part, Signals("training_step", micro_steps - 1, ranks, numbers), fit, (143, 143)), micro_steps, "")
        parts.append(part)
    last = _module(Stoppable, seed=98)
    _fit(last, [], **options)
    assert_same_losses([loss for part in (*parts, last) for loss in part.losses], whole.losses, "four jobs")
    assert_close(parameters(last), parameters(whole), "four jobs")
    dist.barrier()
    return sorted(os.listdir(path))


@pytest.mark.parametrize("array", [{}, {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}], ids=["job", "array"])
def test_slurm_starts_the_job_again_where_it_stopped(tmp_path: Path, array: dict[str, str]) -> None:
    root, bin_first = tmp_path / "root", tmp_path / "bin"
    root.mkdir()
    bin_first.mkdir()
    (bin_first / "scontrol").write_text(
        f'#!/bin/sh\nls {root} | grep -c hpc >> {tmp_path}/asked\necho "$@" >> {tmp_path}/asked\n'
    )
    (bin_first / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "PATH": f"{bin_first}{os.pathsep}{os.environ['PATH']}"}
    left = run_ranks(2, _requeued, root, bool(array), **job, **array)[0]
    assert [name for name in left if "ckpt" in name] == [f"hpc_ckpt_{i}.ckpt" for i in (1, 2, 3)]
    name = "70_3" if array else "4242"
    # By the time of the question the checkpoint is there; a cancelled job is not started again.
    assert (tmp_path / "asked").read_text().splitlines() == ["1", f"requeue {name}", "2", f"requeue {name}"]


# -- where the checkpoint goes -----------------------------------------------------------------------------------------


def _places(path: Path) -> None:
    once = Signals("training_step", 3)
    options = {"limit_val_batches": 0}

    def stop(callbacks: list[Any], **more: Any) -> None:
        module = _module(Stoppable)
        _stopped(module, once, partial(_fit, module, callbacks, **options, **more))

    def names(folder: Path) -> list[str]:
        dist.barrier()
        return sorted(name for name in os.listdir(folder) if name.startswith("last"))

    stop([], default_root_dir=path / "none", enable_checkpointing=False)
    _is(names(path / "none"), ["last.ckpt"], "without a ModelCheckpoint")
    for number, options_of_callback in enumerate(({}, {"save_last": True}, {"save_last": "link"})):
        folder = path / str(number)
        if dist.get_rank() == 0:
            (folder / "last.ckpt").mkdir(parents=True)
            (folder / "last.ckpt" / "of another run").touch()
        dist.barrier()
        kinds = partial(ModelCheckpoint, folder, every_n_train_steps=2, **options_of_callback)
        stop([kinds()])
        _is(names(folder), ["last-v1.ckpt", "last.ckpt"], f"{options_of_callback}")
        _is(os.listdir(folder / "last.ckpt"), ["of another run"], f"{options_of_callback}: what was there")
        stop([kinds()], ckpt_path=folder / "last-v1.ckpt")  # again, two steps later
        _is(names(folder), ["last-v1.ckpt", "last.ckpt"], f"{options_of_callback}, a second time")
        resumed = _module(Stoppable)
        _fit(resumed, [kinds()], folder / "last-v1.ckpt", **options)
        _is(len(resumed.losses), EPOCHS * BATCHES - 8, f"{options_of_callback}: what was left")


def test_the_checkpoint_is_the_runs_last_and_replaces_no_other_runs(tmp_path: Path) -> None:
    run_ranks(2, _places, tmp_path)


# -- handlers ----------------------------------------------------------------------------------------------------------


def _handlers(path: Path) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    module = _module(Stoppable)
    _stopped(module, Signals("training_step", 3, ranks=(1,)), partial(_fit, module, [_saves(path)]))
    _is(heard, [signal.SIGTERM] * dist.get_rank(), "what the user's handler heard")
    again = _module(Stoppable)
    run = _fit(again, [_saves(path / "again")])
    _is([callback for callback in run.callbacks if isinstance(callback, Preemption)], [], "callbacks afterwards")

    elsewhere = _module(Stoppable)
    thread = threading.Thread(target=_fit, args=(elsewhere, [_saves(path / "elsewhere")]))
    thread.start()
    thread.join()
    assert_same_losses(elsewhere.losses, again.losses, "in another thread, which can have no handlers")


def test_handlers_of_the_users_are_called_and_stay(tmp_path: Path) -> None:
    run_ranks(2, _handlers, tmp_path)


def _by_pytorch_lightning(path: Path) -> None:
    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.toy = seeded(Toy)
            self.count = 0

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            self.count += 1
            if self.count == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.toy.loss(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, saves = Module(), pytorch_lightning.callbacks.ModelCheckpoint(path)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = pytorch_lightning.Trainer(accelerator="cpu", devices=2, strategy="mics", callbacks=[saves], **quiet)
    with pytest.raises(pytorch_lightning.utilities.exceptions.SIGTERMException):
        run.fit(module, Batches(6))
    _is((module.count, run.global_step, Path(saves.last_model_path)), (4, 4, path / "last.ckpt"), "pytorch_lightning")


def test_pytorch_lightning_stops_too(tmp_path: Path) -> None:
    run_ranks(2, _by_pytorch_lightning, tmp_path)
