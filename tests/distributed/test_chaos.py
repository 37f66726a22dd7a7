"""A training that is killed, wherever it is, loses no checkpoint and goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.chaos import torment
from lightning_mics.checkpoint import Checkpoint, Snapshot
from mics_tools import atomic
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import Batches, Toy, mics, seeded, trainer

WINDOW = 2


@pytest.mark.slow
def test_killed_twice(tmp_path: Path) -> None:
    campaign = torment(2, seed=3, place=tmp_path)
    assert len(campaign.kills) == 2 and campaign.compared > 0
    assert (campaign.lost, campaign.mismatches, campaign.left_behind) == ([], [], [])


def _fit(folder: Path, steps: int, **options: object) -> None:
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
    run = trainer(mics(), callbacks=[saves], enable_checkpointing=True, max_steps=steps, accumulate_grad_batches=WINDOW)
    run.fit(seeded(Toy), Batches(20), **options)


def _saved_after_resume(folder: Path) -> list[int]:
    """The steps at which a run saves that goes on from the second to the fourth."""
    saved = []

    def write(self: Checkpoint, snapshot: Snapshot, *group: Any) -> None:
        saved.append(snapshot.step)
        writing(self, snapshot, *group)

    _fit(folder, 2)
    writing = Checkpoint.write
    with patch.object(Checkpoint, "write", write):
        _fit(folder, 4, ckpt_path="last")
    return saved


def test_what_was_resumed_from_is_not_saved_anew_within_a_window(tmp_path: Path) -> None:
    """Gradients of the micro-steps before would not be in it."""
    assert run_ranks(2, _saved_after_resume, tmp_path)[0] == [4, 4]  # and as "last"


def _led_elsewhere(folder: Path, async_save: bool) -> list[bool]:
    """At each deletion, whether the link leads to another checkpoint that is there."""
    seen = []

    def remove(path: Path) -> None:
        seen.append((folder / "last.ckpt").resolve(strict=True) != path.resolve())
        removing(path)

    removing = atomic.remove
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_last="link")
    run = trainer(mics(async_save=async_save), callbacks=[saves], enable_checkpointing=True, max_steps=4)
    with patch.object(atomic, "remove", remove):
        run.fit(seeded(Toy), Batches(20))
    dist.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step=4.ckpt"]
    return seen


@pytest.mark.parametrize("async_save", [False, True])
def test_what_the_link_names_goes_after_it_has_moved(tmp_path: Path, async_save: bool) -> None:
    assert run_ranks(2, _led_elsewhere, tmp_path, async_save)[0] == [True] * 3


def test_a_link_moves_whatever_a_kill_has_left(tmp_path: Path) -> None:
    old, new, last = (tmp_path / name for name in ("step=2.ckpt", "step=4.ckpt", "last.ckpt"))
    old.mkdir()
    new.mkdir()
    atomic.link(old, last)
    assert atomic.links_to(old) == [last] and atomic.links_to(new) == atomic.links_to(last) == []
    (tmp_path / ".last.ckpt.partial").symlink_to("step=3.ckpt")  # moving, as a kill left it, and to what has gone
    assert atomic.clean(tmp_path) == [tmp_path / ".last.ckpt.partial"]
    atomic.link(new, last)
    assert last.resolve() == new and sorted(tmp_path.iterdir()) == [last, old, new]


def test_a_link_takes_the_place_of_a_copy(tmp_path: Path) -> None:
    new, last = tmp_path / "step=4.ckpt", tmp_path / "last.ckpt"
    new.mkdir()
    (last / "within").mkdir(parents=True)
    atomic.link(new, last)
    assert last.is_symlink() and sorted(tmp_path.iterdir()) == [last, new]
