"""Saving beside training: at most one save under way, and what depends on it waits for it.

A save is two things: a snapshot, taken while training stands still, and the writing of it. Asynchronously a thread does
the writing, on a process group of its own. Until it has committed, nothing that it is to replace goes: checkpoints that
Lightning deletes or links meanwhile are deleted and linked after it, and not at all if it fails.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import nn

from lightning_mics.checkpoint.agreement import together
from lightning_mics.checkpoint.directory import Checkpoint
from lightning_mics.checkpoint.pieces import Writers
from lightning_mics.checkpoint.snapshot import HostMemory, Snapshot
from lightning_mics.shards import outside_inference_mode
from lightning_mics.topology import Topology

PATIENCE = 60.0
"""Seconds that a rank whose training has failed waits for the others' part of a save, or as long as its own took."""
_OFTEN = 0.05  # seconds


class Saver:
    """Saves the checkpoints of one run.

    Args:
        topology: of the run.
        writers: which ranks write.
        asynchronous: write while training goes on.
    """

    def __init__(self, topology: Topology, writers: Writers, *, asynchronous: bool) -> None:
        self._topology = topology
        self._writers = writers
        self.asynchronous = asynchronous
        self._memory = HostMemory() if asynchronous else None
        self._group: dist.ProcessGroup | None = None
        self._under_way: _Writing | None = None
        self._given_up: _Writing | None = None
        self._afterwards: list[Callable[[], None]] = []

    @outside_inference_mode
    def save(
        self,
        path: Path,
        checkpoint: dict[str, Any],
        module: nn.Module,
        rng: Mapping[str, Any] | None = None,
        *,
        loaders: Sequence[Any] | None = None,
        wait: bool = False,
    ) -> None:
        """Save `checkpoint`, as Lightning dumps it. Collective on the default group; the first time it makes one.

        Args:
            path: of the directory; the same on every rank.
            checkpoint: see `Snapshot.take`.
            module: see `Snapshot.take`.
            rng: see `Snapshot.take`.
            loaders: see `Snapshot.take`.
            wait: return when it is on the disk, though this saver is asynchronous.

        Raises:
            RuntimeError, OSError: on every rank if any rank failed, in this save or in the one before.
        """
        self.wait()
        if self._given_up is not None:
            self._given_up.join()
        self.prepare()
        memory = None if wait else self._memory
        take = partial(Snapshot.take, checkpoint, module, self._topology, rng=rng, loaders=loaders)
        take = partial(take, writers=self._writers, memory=memory)
        snapshot = together(take, f"cannot save {path}", self._group)
        if memory is None:
            Checkpoint(path).write(snapshot, self._group)
            return
        self._under_way = _Writing(path, snapshot, self._group)
        self._under_way.start()

    def prepare(self) -> None:
        """Make the process group that saves go by, if there is none yet. Collective on the default group."""
        if self._group is None:
            self._group = dist.new_group(backend="fake" if dist.get_backend() == "fake" else "gloo")

    def afterwards(self, action: Callable[[], None]) -> None:
        """Run `action` when the save that is under way has committed, or now if there is none."""
        if self._under_way is None:
            action()
        else:
            self._afterwards.append(action)

    def look(self) -> None:
        """If the save that was under way has ended, end it. Does not wait.

        Raises:
            RuntimeError: if it failed.
        """
        if self._under_way is not None and not self._under_way.is_alive():
            self.wait()

    def wait(self) -> None:
        """Return when no save is under way.

        Raises:
            RuntimeError: if it failed.
        """
        if self._under_way is not None:
            self._under_way.join()
            self._end()

    def wait_after_failure(self) -> None:
        """As `wait`, where training has failed on this rank, and others may wait for it there instead of writing.

        Raises:
            RuntimeError: if the save failed, or the others did not do their part of it in time; see `PATIENCE`.
        """
        if self._under_way is not None:
            self._under_way.join_unless_idle(PATIENCE)
            self._end()

    def _end(self) -> None:
        writing, self._under_way = self._under_way, None
        afterwards, self._afterwards = self._afterwards, []
        assert writing is not None
        if writing.is_alive():
            self._given_up = writing
            raise RuntimeError(
                f"{writing.path} may not have been saved: after this rank had failed, the others did not do their part "
                f"of it. What was saved before is as it was; `mics verify {writing.path}` tells whether this is there"
            )
        if writing.error is not None:
            raise RuntimeError(
                f"{writing.path} was not saved: {writing.error}. What was saved before is as it was; resume from that"
            ) from writing.error
        for action in afterwards:
            action()


class _Writing(threading.Thread):
    """Writes a checkpoint. It does not keep a process from ending, as it may wait for ranks that have gone.

    Attributes:
        path: of the checkpoint.
        error: what it failed with.
    """

    def __init__(self, path: Path, snapshot: Snapshot, group: dist.ProcessGroup | None) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.path = path
        self.error: Exception | None = None
        self._work = _Work()
        self._write: Callable[[], None] | None = partial(Checkpoint(path).write, snapshot, group, self._work)

    def run(self) -> None:
        assert self._write is not None
        try:
            self._write()
        except Exception as error:
            self.error = error
        self._write = None  # and the snapshot

    def join_unless_idle(self, seconds: float) -> None:
        """Return when it is over, or has waited for other ranks for so long, and as long as this rank's part took."""
        idle = 0.0
        while self.is_alive() and idle <= max(seconds, self._work.seconds):
            began = time.monotonic()
            self.join(_OFTEN)
            idle = 0.0 if self._work.under_way else idle + time.monotonic() - began


class _Work:
    """Whether this rank does its own part at the moment, and for how many seconds it has."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began: float | None = None

    @property
    def under_way(self) -> bool:
        return self._began is not None

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._began is not None
        self.seconds += time.monotonic() - self._began
        self._began = None
