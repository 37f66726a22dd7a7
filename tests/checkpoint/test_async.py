"""Saves beside training: what is written is of the moment of the save, and nothing goes before it has committed.

Rank 0's writing waits at a gate that training opens some batches later; were it not beside training, nobody would.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mics.checkpoint import Checkpoint, Snapshot, saver
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import (
    Batches,
    Toy,
    assert_close,
    assert_same_losses,
    mics,
    optimizer_state,
    parameters,
    seeded,
    trainer,
)

PATIENCE = 200  # seconds, of a gate that nobody opens


class Gate:
    """Stands before rank 0's writing, and lets `free` writes pass first."""

    def __init__(self, free: int = 0, error: Exception | None = None) -> None:
        self.free, self.error = free, error
        self.open = threading.Event()

    @contextmanager
    def installed(self) -> Iterator[None]:
        write = Snapshot.write_pieces

        def gated(snapshot: Snapshot, folder: Path) -> Any:
            self.free -= 1
            if self.free < 0 and dist.get_rank() == 0:
                if not self.open.wait(PATIENCE):
                    raise TimeoutError("the gate was not opened: training waits for the save")
                if self.error is not None:
                    raise self.error
            return write(snapshot, folder)

        with patch.object(Snapshot, "write_pieces", gated):
            yield


class Opens(pl.Callback):
    """Opens a gate before a batch, or at the end, after a look at the folder."""

    def __init__(self, gate: Gate, batch: int | None, folder: Path, epoch: int = 0) -> None:
        self.gate, self.batch, self.folder, self.epoch = gate, batch, folder, epoch
        self.seen: list[str] = []

    def _look(self) -> None:
        if not self.gate.open.is_set():
            self.seen = _names(self.folder)
            self.gate.open.set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            self._look()
            trainer.strategy.saver._under_way.join()  # so that it is known which batch sees it ended

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.batch is None:
            self._look()


class Remembers(pl.Callback):
    """Parameters and optimizer state after each optimizer step."""

    def __init__(self) -> None:
        self.at: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.at[trainer.global_step] = parameters(pl_module), optimizer_state(trainer.optimizers[0])


def _names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith(".")) if folder.exists() else []


def _is(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise AssertionError(f"{what}: {found!r}, expected {expected!r}")


def _run(callbacks: list[Any], gate: Gate, *, asynchronous: bool = True, **options: Any) -> Toy:
    module = seeded(Toy, dropout=0.2)
    torch.manual_seed(dist.get_rank())
    with gate.installed():
        run = trainer(mics(async_save=asynchronous, **options), callbacks=callbacks, enable_checkpointing=True)
        run.fit(module, Batches(8))
    return module


def _of_the_moment(path: Path, optimizer: str) -> None:
    gate, remembers = Gate(), Remembers()
    opens = Opens(gate, 5, path / "async")
    saves = ModelCheckpoint(path / "async", "{step}", every_n_train_steps=3, save_top_k=-1)
    module = _run([remembers, saves, opens], gate, optimizer_state=optimizer)
    _is(opens.seen, [], "what is there while it is being written")
    _is(_names(path / "async"), ["step=3.ckpt", "step=6.ckpt"], "what is there in the end")
    plain = _run([ModelCheckpoint(path / "sync", "{step}", every_n_train_steps=3)], Gate(free=99), asynchronous=False)
    assert_same_losses(module.losses, plain.losses, "beside saves")
    for step in (3, 6):
        found = Checkpoint(path / "async" / f"step={step}.ckpt").read()
        state, expected = remembers.at[step]
        assert_close(found["state_dict"], state, f"parameters of step {step}")
        states = found["optimizer_states"][0]["state"].values()  # in the order of the parameters
        held = {(i, field): value for i, its in enumerate(states) for field, value in its.items()}
        assert_close(held, expected, f"optimizer state of step {step}")


@pytest.mark.slow
def test_what_is_written_is_of_the_moment_of_the_save(tmp_path: Path) -> None:
    for optimizer in ("partition", "world"):
        run_ranks(4, _of_the_moment, tmp_path / optimizer, optimizer)


def _replaced(path: Path) -> None:
    gate = Gate(free=1)
    opens = Opens(gate, 6, path)
    _run([ModelCheckpoint(path, "{step}", every_n_train_steps=3, save_top_k=1, save_last="link"), opens], gate)
    _is(opens.seen, ["last.ckpt", "step=3.ckpt"], "while the second is being written")
    _is(_names(path), ["last.ckpt", "step=6.ckpt"], "in the end")
    _is(os.readlink(path / "last.ckpt"), "step=6.ckpt", "the link")


def _not_replaced(path: Path) -> tuple[str, str]:
    """The second save fails, so that the first and the link to it stay."""
    gate, remembers = Gate(free=1, error=OSError(28, "No space left on device")), Remembers()
    opens = Opens(gate, 6, path)
    saves = ModelCheckpoint(path, "{step}", every_n_train_steps=3, save_top_k=1, save_last="link")
    try:
        _run([remembers, saves, opens], gate)
    except Exception as error:
        told = "; ".join([str(error), *getattr(error, "__notes__", ())])
    else:
        told = "nothing"
    _is(sorted(remembers.at), [1, 2, 3, 4, 5, 6], "steps taken before it was told")
    dist.barrier()
    _is(_names(path), ["last.ckpt", "step=3.ckpt"], "after a save that failed")
    _is(os.readlink(path / "last.ckpt"), "step=3.ckpt", "the link")
    _is([name for name in os.listdir(path) if name.endswith(".partial")], [], "left over")
    Checkpoint(path / "last.ckpt").read()
    return told, "step=3.ckpt" in opens.seen and "step=6.ckpt" not in opens.seen


def test_what_is_replaced_goes_after_what_replaces_it_has_committed(tmp_path: Path) -> None:
    run_ranks(4, _replaced, tmp_path / "replaced")


def test_a_save_that_fails_beside_training_ends_it_on_every_rank_and_leaves_what_was_there(tmp_path: Path) -> None:
    for told, kept in run_ranks(4, _not_replaced, tmp_path / "kept"):
        assert "step=6.ckpt was not saved: " in told and "No space left on device" in told
        assert "What was saved before is as it was" in told
        assert kept


def _in_validation(path: Path) -> None:
    gate = Gate()
    opens = Opens(gate, 2, path, epoch=1)
    saves = ModelCheckpoint(path, "{epoch}", save_on_train_epoch_end=False, save_top_k=-1)
    with gate.installed():
        run = trainer(mics(async_save=True), callbacks=[saves, opens], enable_checkpointing=True, max_epochs=2)
        run.fit(seeded(Toy), Batches(4), Batches(1, first=900))
    _is(opens.seen, [], "in the second epoch")
    _is(_names(path), ["epoch=0.ckpt", "epoch=1.ckpt"], "in the end")


def test_training_goes_on_beside_the_save_of_a_validation(tmp_path: Path) -> None:
    run_ranks(2, _in_validation, tmp_path / "validation")


def _ended(path: Path) -> None:
    gate = Gate()
    opens = Opens(gate, None, path)
    _run([ModelCheckpoint(path, "{step}", every_n_train_steps=8), opens], gate)
    _is(opens.seen, [], "at the end of training")
    _is(_names(path), ["step=8.ckpt"], "when fit returns")


def _ended_badly(path: Path) -> None:
    gate = Gate(error=OSError(28, "No space left on device"))
    saves = ModelCheckpoint(path, "{step}", every_n_train_steps=8)
    with pytest.raises(RuntimeError, match=r"step=8.ckpt was not saved: .*No space left on device"):
        _run([saves, Opens(gate, None, path)], gate)


def test_the_end_of_training_waits_for_the_save(tmp_path: Path) -> None:
    run_ranks(2, _ended, tmp_path / "ended")
    run_ranks(2, _ended_badly, tmp_path / "badly")


def _by_hand(path: Path) -> None:
    module = seeded(Toy)
    run = trainer(mics(async_save=True))
    run.fit(module, Batches(2))
    run.save_checkpoint(path / "after.ckpt")
    Checkpoint(path / "after.ckpt").read()


def test_a_save_by_hand_after_training_is_there_when_it_returns(tmp_path: Path) -> None:
    run_ranks(2, _by_hand, tmp_path)


class Fails(pl.Callback):
    """Training fails on rank 1 while the others go on."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4 and dist.get_rank() == 1:
            raise ValueError("a bad batch")


def _others_do_not_write(path: Path, told: Path) -> None:
    """Rank 0's writing waits for ever, as rank 1's would if rank 0's had failed; rank 1 tells, and is gone."""
    saves = ModelCheckpoint(path, "{step}", every_n_train_steps=3)
    with patch.object(saver, "PATIENCE", 0.5), pytest.raises(Exception) as raised:
        _run([saves, Fails()], Gate())
    told.write_text("; ".join([str(raised.value), *getattr(raised.value, "__notes__", ())]))
    os._exit(1)


def test_a_rank_that_failed_does_not_wait_for_ever_for_the_others_part_of_a_save(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 1:\nthe process died"):
        run_ranks(2, _others_do_not_write, tmp_path, tmp_path / "told", timeout=100)
    told = (tmp_path / "told").read_text()
    assert told.startswith("a bad batch; ") and "step=3.ckpt may not have been saved" in told
