"""Directories that are whole or not there: written aside, flushed, and put in their place in one move.

    .NAME.partial      being written or deleted, or left over by a process that was killed
    NAME               whole

Who writes holds a lock on what it writes, which the kernel drops with the process, so that what is left over can be
told from what is under way. What stood at NAME before is exchanged with the new one, and then deleted: at no time is
there none. A file system without that move (NFS) takes two, and `restore` mends what was killed between them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PARTIAL, _OLD = ".partial", ".old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NOT_HERE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # of a kernel or a file system without the exchange


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """An empty directory to write into; at the end it stands at `path`, or nothing has changed there.

    Raises:
        OSError: if it cannot be made, flushed or moved.
        FileExistsError: if another process is writing it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = aside(path)
    if new.is_dir() and _is_held(new):
        raise FileExistsError(f"{path} is being written by another process; give each run a folder of its own")
    _delete(new)
    new.mkdir()
    held = os.open(new, os.O_RDONLY)
    try:
        _hold(held)
        yield new
        for folder in (new, *(child for child in new.iterdir() if child.is_dir())):
            flush(folder)
        _put_in_place(new, path)
        flush(path.parent)
    finally:
        os.close(held)
        _delete(new)  # what failed, or what stood there before


def aside(path: Path) -> Path:
    """Where what will be at `path` is written."""
    return _beside(path, _PARTIAL)


def remove(path: Path) -> None:
    """Delete what is at `path`, of which no part is left there if that is interrupted; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        gone = aside(path)
        _delete(gone)
        os.rename(path, gone)
        path = gone
    _delete(path)


def link(target: Path, path: Path) -> None:
    """Make `path` a link to `target`, in one move, whatever is there."""
    new = aside(path)
    _delete(new)
    os.symlink(os.path.relpath(target, path.parent), new)
    if path.is_dir() and not path.is_symlink():
        _put_in_place(new, path)
    else:
        os.replace(new, path)
    flush(path.parent)
    _delete(new)  # a directory that stood there before


def links_to(path: Path) -> list[Path]:
    """The links beside `path` that lead to it; none where it is a link itself."""
    if path.is_symlink():
        return []
    return [other for other in path.parent.glob("*") if other.is_symlink() and other.resolve() == path.resolve()]


def left_over(folder: Path) -> list[Path]:
    """What was being written in `folder` when its process went."""
    found = sorted(folder.glob(f".*{_PARTIAL}"))
    return [path for path in found if path.is_symlink() or (path.is_dir() and not _is_held(path))]


def clean(folder: Path) -> list[Path]:
    """Delete what is left over in `folder`, and return what it was."""
    found = left_over(folder)
    for path in found:
        _delete(path)
    return found


def restore(folder: Path) -> None:
    """Where a process was killed between the two moves that replace a directory, put the old one back."""
    for old in folder.glob(f".*{_OLD}"):
        path = old.with_name(old.name[1 : -len(_OLD)])
        if path.exists():
            _delete(old)
        else:
            os.rename(old, path)


def flush(path: Path) -> None:
    """Return when a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def _put_in_place(new: Path, path: Path) -> None:
    if not os.path.lexists(path):
        os.rename(new, path)
    elif not _exchanged(new, path):
        old = _beside(path, _OLD)
        _delete(old)
        os.rename(path, old)
        os.rename(new, path)
        _delete(old)


def _exchanged(one: Path, other: Path) -> bool:
    """Give each the name of the other in one move; False where the system cannot. Python has no name for it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in _NOT_HERE:
        return False
    raise OSError(number, os.strerror(number), os.fspath(one), None, os.fspath(other))


def _delete(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)


def _is_held(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return not _take(descriptor)
    finally:
        os.close(descriptor)


def _hold(descriptor: int) -> None:
    """Take the lock of a directory, for which only somebody who asks whether it is held can make this wait."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _take(descriptor: int) -> bool:
    """Whether this process holds the lock of a directory now; where the file system has none, anybody does."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
