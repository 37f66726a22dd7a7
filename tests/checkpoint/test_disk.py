"""What a disk can do to a save: each a clear error on every rank, and what was saved before is as it was."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from lightning_mics.checkpoint import Checkpoint, Snapshot
from tests.checkpoint.saved import dump, made, save
from tests.distributed.ranks import run_ranks
from tests.raising import raised

ROOM = 1024 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", path]).returncode:
        pytest.skip("needs root, to mount a small file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def _save_twice(folder: Path, trouble: str) -> str:
    """A first save, then trouble, then a second one; what it raised."""
    module, optimizer = made(width=64)
    path = folder / "x.ckpt"
    save(path, dump(module, optimizer, note="first"), module)
    dist.barrier()
    if dist.get_rank() == 0:
        {"full": _fill, "read-only": _forbid, "vanished": lambda folder: None}[trouble](folder)
    dist.barrier()
    with patch.object(Snapshot, "write_pieces", _vanishing if trouble == "vanished" else Snapshot.write_pieces):
        told = raised(lambda: save(path, dump(module, optimizer, note="second"), module))
    dist.barrier()
    if Checkpoint(path).read()["note"] != "first":
        raise AssertionError("what was saved before is not as it was")
    left = sorted(os.listdir(folder))
    if left != (["ballast", "x.ckpt"] if trouble == "full" else ["x.ckpt"]):
        raise AssertionError(f"left over: {left}")
    return told


def _fill(folder: Path) -> None:
    room = shutil.disk_usage(folder).free
    (folder / "ballast").write_bytes(b"x" * (room - 8 * 1024))


def _forbid(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


_write_pieces = Snapshot.write_pieces


def _vanishing(snapshot: Snapshot, folder: Path) -> object:
    if dist.get_rank() == 1:
        shutil.rmtree(folder)
    return _write_pieces(snapshot, folder)


def test_a_full_disk(disk: Path) -> None:
    for told in run_ranks(2, _save_twice, disk, "full"):
        assert "No space left on device" in told and "x.ckpt" in told


def test_a_file_system_that_is_read_only(disk: Path) -> None:
    for told in run_ranks(2, _save_twice, disk, "read-only"):
        assert "Read-only file system" in told and "x.ckpt" in told


def test_a_directory_that_vanishes_in_the_midst(tmp_path: Path) -> None:
    for told in run_ranks(2, _save_twice, tmp_path / "gone", "vanished"):
        assert "No such file or directory" in told and "x.ckpt" in told
