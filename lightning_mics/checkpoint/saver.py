"""Saving beside training: at most one save under way, and what depends on it waits for it.

A save is two things: a snapshot, taken while training stands still, and the writing of it. Asynchronously a thread does
the writing, on a process group of its own. Until it has committed, nothing that it is to replace goes: checkpoints that
Lightning deletes or links meanwhile are deleted and linked after it, and not at all if it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from lightning_mics.checkpoint.agreement import together
from lightning_mics.checkpoint.directory import Checkpoint
from lightning_mics.checkpoint.pieces import Writers
from lightning_mics.checkpoint.snapshot import HostMemory, Snapshot
from lightning_mics.topology import Topology


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
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: Future[None] | None = None
        self._path = Path()
        self._afterwards: list[Callable[[], None]] = []

    def save(
        self,
        path: Path,
        checkpoint: dict[str, Any],
        module: nn.Module,
        rng: Mapping[str, Any] | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Save `checkpoint`, as Lightning dumps it. Collective on the default group; the first time it makes one.

        Args:
            path: of the directory; the same on every rank.
            checkpoint: see `Snapshot.take`.
            module: see `Snapshot.take`.
            rng: see `Snapshot.take`.
            wait: return when it is on the disk, though this saver is asynchronous.

        Raises:
            RuntimeError, OSError: on every rank if any rank failed, in this save or in the one before.
        """
        self.wait()
        self.prepare()
        memory = None if wait else self._memory
        take = partial(Snapshot.take, checkpoint, module, self._topology, rng=rng, writers=self._writers, memory=memory)
        snapshot = together(take, f"cannot save {path}", self._group)
        if memory is None:
            Checkpoint(path).write(snapshot, self._group)
            return
        self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
        self._path = path
        self._under_way = self._thread.submit(Checkpoint(path).write, snapshot, self._group)

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
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Return when no save is under way.

        Raises:
            RuntimeError: if it failed.
        """
        if self._under_way is None:
            return
        under_way, self._under_way = self._under_way, None
        afterwards, self._afterwards = self._afterwards, []
        try:
            under_way.result()
        except Exception as error:
            raise RuntimeError(
                f"{self._path} was not saved: {error}. What was saved before is as it was; resume from that"
            ) from error
        for action in afterwards:
            action()

    def close(self) -> None:
        """Wait, and let the thread go.

        Raises:
            RuntimeError: if the save that was under way failed.
        """
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._thread = None
