"""Preemption: a run that is told to stop ends at a boundary, with a checkpoint.

A signal may find the ranks at different places, or find only some of them; whatever a handler sends to the others there
may meet another message of theirs. So the handlers here only note the signal. Before each boundary the ranks ask one
another whether any has heard one, and find the answer after the optimizer's step, so that all stop after the same step.
What is due there (a validation, an epoch's end) is done first; then a checkpoint is written, SLURM is asked to start
the job again if that was the signal's meaning, and the run ends with `SIGTERMException` and exit code 143.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import threading
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import pytorch_lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from pytorch_lightning.plugins.environments import LightningEnvironment as PytorchLightningEnvironment
from torch import Tensor
from typing_extensions import override

from lightning_mics._compat import handlers_before_lightning, set_received_sigterm

EXIT_CODE = 128 + signal.SIGTERM
_HPC = "hpc_ckpt_"  # Lightning resumes from the highest number by itself under SLURM

log = logging.getLogger(__name__)


class Told(IntEnum):
    """What a rank has been told; of several ranks, the largest counts."""

    NOTHING = 0
    STOP = 1
    REQUEUE = 2


class Stopped(SIGTERMException, pytorch_lightning.utilities.exceptions.SIGTERMException):
    """Ends a run at a boundary after a signal, in either tree of Lightning's classes."""


class Preemption(Checkpoint, pytorch_lightning.callbacks.Checkpoint):  # type: ignore[misc]
    """The callback that stops a fit after a signal. `MiCSStrategy` adds it behind all others while a fit runs.

    A checkpoint callback by class, as those come after the module's own hooks at an epoch's end.

    Signals: SIGTERM; and under `SLURMEnvironment(auto_requeue=True)` its `requeue_signal`, where the user has no
    handler for it.

    Collectives: one all-reduce of four bytes for each window, on a gloo group of its own over all ranks, behind the
    last micro-step; and one after each validation, each epoch and all of training.

    Args:
        timeout: of that group. By default torch's.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        super().__init__()
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.get_world_size() > 1 else None
        self._heard = Told.NOTHING  # by this rank
        self._agreed = Told.NOTHING  # by all
        self._question: tuple[Tensor, dist.Work | None] | None = None
        self._step = 0
        self._at_boundary = False
        self._left = False

    @classmethod
    def attach(cls, trainer: pl.Trainer, timeout: timedelta | None) -> Preemption:
        """Behind all callbacks of a Trainer that is about to fit. Collective on the default group."""
        preemption = cls(timeout)
        trainer.callbacks.append(preemption)  # type: ignore[attr-defined]
        return preemption

    def detach(self, trainer: pl.Trainer) -> None:
        """The Trainer is as it was."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [callback for callback in callbacks if callback is not self]

    # -- hearing -----------------------------------------------------------------------------------------------------

    def listen(self, trainer: pl.Trainer) -> None:
        """Put our handlers where Lightning's are; Lightning puts back what it found when the Trainer tears down."""
        if threading.current_thread() is not threading.main_thread():
            return
        before = handlers_before_lightning(trainer)
        self._listen_to(signal.SIGTERM, Told.STOP, before.get(signal.SIGTERM))
        if requeues(trainer):
            signum = trainer.strategy.cluster_environment.requeue_signal  # type: ignore[attr-defined]
            if before.get(signum) in (None, signal.SIG_DFL):
                self._listen_to(signum, Told.REQUEUE, None)

    def _listen_to(self, signum: signal.Signals, told: Told, before: Any) -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            self._heard = max(self._heard, told)
            if callable(before):
                before(number, frame)

        signal.signal(signum, handle)

    # -- agreeing ----------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        if self._question is None:
            flag = torch.tensor([int(self._heard)], dtype=torch.int32)
            grouped = self._group is not None
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True) if grouped else None
            self._question = flag, work

    def _hear_answer(self) -> None:
        if self._question is not None:
            flag, work = self._question
            if work is not None:
                work.wait()
            self._question, self._agreed = None, max(self._agreed, Told(int(flag)))

    # -- hooks -------------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        ends_window = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if ends_window or not pl_module.automatic_optimization:
            self._ask()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._at_boundary, self._step = trainer.global_step != self._step, trainer.global_step
        self._hear_answer()
        if self._agreed and self._at_boundary:
            set_received_sigterm(trainer, True)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning would leave validation after a batch, and a resumed run would not do the rest."""
        set_received_sigterm(trainer, False)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._at_boundary and not trainer.sanity_checking:  # the sums of an open window are in no checkpoint
            self._stop_if_told(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._at_boundary:
            self._stop_if_told(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_if_told(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lightning has raised after the batch, where neither a validation nor an epoch's end was due."""
        if self._agreed and isinstance(exception, Stopped.__bases__):
            self._leave(trainer)
            exception.code = _exit_code(trainer)

    def _stop_if_told(self, trainer: pl.Trainer) -> None:
        self._ask()
        self._hear_answer()
        if self._agreed:
            self._leave(trainer)
            raise Stopped(_exit_code(trainer))

    # -- leaving -----------------------------------------------------------------------------------------------------

    def _leave(self, trainer: pl.Trainer) -> None:
        if self._left:
            return
        self._left = True
        path = save(trainer)
        rank_zero_info(f"stopped by a signal after step {trainer.global_step}; to go on: ckpt_path={path}")
        if self._agreed == Told.REQUEUE and trainer.is_global_zero:
            requeue()
        trainer.strategy.barrier()  # srun may end all ranks when the first leaves


def requeues(trainer: pl.Trainer) -> bool:
    """Whether SLURM is to start the job again, by Lightning's `SLURMEnvironment`."""
    return bool(getattr(trainer.strategy.cluster_environment, "auto_requeue", False))  # type: ignore[attr-defined]


def _exit_code(trainer: pl.Trainer) -> int | None:
    """143; except for the processes that Lightning's launcher started: it kills the first if another fails."""
    environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    launched = (LightningEnvironment, PytorchLightningEnvironment)
    return None if isinstance(environment, launched) and environment.local_rank() else EXIT_CODE


# -- where checkpoints go ----------------------------------------------------------------------------------------------


def save(trainer: pl.Trainer) -> Path | None:
    """Save where a Lightning user's next run looks. Collective on the default group.

    Under SLURM with automatic requeue `<default_root_dir>/hpc_ckpt_<n>.ckpt`, which the requeued job finds by itself;
    otherwise `last.ckpt` in the directory of the first ModelCheckpoint, which `ckpt_path="last"` finds, under the
    name that its `save_last` would give; without one, `<default_root_dir>/last.ckpt`.

    Returns:
        Where; None under `fast_dev_run`, which saves nothing.
    """
    if trainer.fast_dev_run:
        return None
    if requeues(trainer):
        return _save_for_requeue(trainer)
    callbacks = [c for c in trainer.checkpoint_callbacks if hasattr(c, "last_model_path")]
    path = _last_of(callbacks[0], trainer) if callbacks else str(Path(trainer.default_root_dir) / "last.ckpt")
    _save_and_wait(trainer, path)
    return Path(path)


def _save_and_wait(trainer: pl.Trainer, path: str | Path) -> None:
    """It is on the disk when this returns, under `async_save` too."""
    trainer.save_checkpoint(path)
    trainer.strategy.saver.wait()  # type: ignore[attr-defined]


def _last_of(callback: Any, trainer: pl.Trainer) -> str:
    """The callback's own last checkpoint, to be replaced, or a free name for one; another run's is left alone."""
    path, version = callback.last_model_path, 0
    while not path:
        metrics = {"epoch": torch.tensor(trainer.current_epoch), "step": torch.tensor(trainer.global_step)}
        name = callback.format_checkpoint_name(metrics, callback.CHECKPOINT_NAME_LAST, ver=version or None)
        path, version = "" if callback.file_exists(name, trainer) else name, version + 1
    callback.last_model_path = path  # before the save: it is part of the checkpoint
    return str(path)


def _save_for_requeue(trainer: pl.Trainer) -> Path:
    """Under another name first: Lightning would take the leftovers of a killed save for the newest checkpoint."""
    folder = Path(trainer.default_root_dir)
    aside = folder / "preempted.ckpt"
    _save_and_wait(trainer, aside)
    path = aside
    if trainer.is_global_zero:
        numbers = [int(found[1]) for name in os.listdir(folder) if (found := re.search(rf"{_HPC}(\d+)", name))]
        path = aside.rename(folder / f"{_HPC}{max(numbers, default=0) + 1}.ckpt")
    return Path(trainer.strategy.broadcast(path))


def requeue() -> None:
    """Ask SLURM to start this job, or this task of a job array, again."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        log.warning("SLURM was not asked to start job %s again: %s; submit it again by hand", job, error)
        return
    if done.returncode:
        log.warning("SLURM did not requeue job %s: %s; submit it again by hand", job, done.stderr.strip())
