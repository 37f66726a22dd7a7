"""A directory is whole or not there, whatever kills who writes it and whatever the file system can do."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mics_tools import atomic


def _fill(path: Path, content: str) -> None:
    with atomic.written_aside(path) as folder:
        (folder / "file").write_text(content)


@pytest.fixture(params=["exchange", "two moves"])
def moves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two moves":
        monkeypatch.setattr(atomic, "_exchanged", lambda one, other: False)
    return request.param


def test_it_is_there_when_all_is_written_and_replaces_what_stood_there(tmp_path: Path, moves: str) -> None:
    path = tmp_path / "deep" / "x.ckpt"
    for content in ("first", "second"):
        with atomic.written_aside(path) as folder:
            (folder / "file").write_text(content)
            assert path.exists() == (content == "second")
            assert not path.exists() or (path / "file").read_text() == "first"
        assert (path / "file").read_text() == content
        assert os.listdir(path.parent) == ["x.ckpt"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_a_file_or_a_link_is_replaced_and_what_it_names_stays(tmp_path: Path, moves: str, kind: str) -> None:
    path, other = tmp_path / "last.ckpt", tmp_path / "other.ckpt"
    _fill(other, "other")
    if kind == "file":
        path.write_text("a file")
    else:
        path.symlink_to("other.ckpt" if kind == "link" else "nowhere")
    _fill(path, "new")
    assert (path / "file").read_text() == "new" and not path.is_symlink()
    assert (other / "file").read_text() == "other"
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "other.ckpt"]


def test_what_fails_leaves_what_stood_there(tmp_path: Path, moves: str) -> None:
    path = tmp_path / "x.ckpt"
    _fill(path, "whole")
    with pytest.raises(OSError, match="no space"), atomic.written_aside(path):
        raise OSError(errno.ENOSPC, "no space")
    assert (path / "file").read_text() == "whole" and os.listdir(tmp_path) == ["x.ckpt"]


def test_the_exchange_is_used_where_there_is_one(tmp_path: Path) -> None:
    """Else nothing below tells the two apart: at no time is the name without a directory."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    (one / "in one").touch()
    if not atomic._exchanged(one, other):
        pytest.skip("this file system has no exchange of two names")
    assert os.listdir(other) == ["in one"] and os.listdir(one) == []
    with pytest.raises(FileNotFoundError):
        atomic._exchanged(tmp_path / "none", other)


_WRITER = """
import os, signal, sys
from pathlib import Path
from mics_tools import atomic
with atomic.written_aside(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_told_from_what_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        assert atomic.left_over(tmp_path) == [] == atomic.clean(tmp_path)
        with pytest.raises(FileExistsError, match="is being written by another process"):
            _fill(path, "mine")
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    assert atomic.left_over(tmp_path) == [atomic.aside(path)]
    assert not path.exists()
    assert atomic.clean(tmp_path) == [atomic.aside(path)]
    assert os.listdir(tmp_path) == []


def test_a_process_killed_between_two_moves_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.ckpt"
    _fill(path, "whole")
    monkeypatch.setattr(atomic, "_exchanged", lambda one, other: False)
    rename, moved = os.rename, []

    def killed(source: Path, target: Path) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        _fill(path, "new")
    assert not path.exists()
    monkeypatch.setattr(os, "rename", rename)
    atomic.restore(tmp_path)
    assert (path / "file").read_text() == "whole" and os.listdir(tmp_path) == ["x.ckpt"]
    (tmp_path / ".x.ckpt.old").mkdir()
    atomic.restore(tmp_path)
    assert (path / "file").read_text() == "whole" and os.listdir(tmp_path) == ["x.ckpt"]


def test_what_is_removed_is_never_there_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.ckpt"
    _fill(path, "whole")
    with monkeypatch.context() as patched:
        patched.setattr(atomic, "_delete", lambda path: None)  # as though killed before anything was deleted
        atomic.remove(path)
    assert os.listdir(tmp_path) == [atomic.aside(path).name]
    atomic.clean(tmp_path)
    assert os.listdir(tmp_path) == []
    atomic.remove(path)  # nothing there
