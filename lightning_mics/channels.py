"""Channels: communication beside computation.

A channel carries one kind of traffic in the order in which it was handed over, while the caller computes. On CPU that
is a thread of its own, on an accelerator a stream. What a channel was handed is waited for before its result is used;
what failed raises there, and everything behind it on the channel fails with it.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

Task = Callable[[], None]


class CollectiveError(RuntimeError):
    """A collective failed, timed out or was cut off; the message names it, its tier and its ranks."""


@contextmanager
def naming(what: str) -> Iterator[str]:
    """What fails in here is told as `what`, which is yielded."""
    try:
        yield what
    except CollectiveError as error:
        raise CollectiveError(f"{what}: {error}") from error


class Transfer(dist.Work):
    """Traffic under way on a channel.

    Attributes:
        what: for people, as "all-gather of transformer.h.3".
        waited: whether somebody has waited for it.
        began, ended: when it ran, in seconds of `time.perf_counter`; 0 before.
        blocked: for how many seconds somebody waited for it and could not go on.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.waited = False
        self.began = self.ended = self.blocked = 0.0
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._abandoned = False
        self._event: torch.Event | None = None

    def run(self, task: Task) -> BaseException | None:
        """Do it now, in this thread; what it raised. Whoever waits goes on when it has been settled."""
        self.began = time.perf_counter()
        try:
            task()
        except BaseException as error:
            self._error = error
        self.ended = time.perf_counter()
        return self._error

    def fail(self, error: BaseException) -> None:
        """Give it up without having done it."""
        self._error = error

    def settle(self) -> None:
        """It is over."""
        self._over.set()

    def follows(self, event: torch.Event) -> None:
        """On an accelerator it is done when `event` is: who waits makes the current stream wait for that."""
        self._event = event

    def abandon(self) -> None:
        """Nobody wants the result any more: whoever waits returns at once."""
        self._abandoned = True
        self._over.set()

    @property
    def used(self) -> bool:
        """Whether it went well, and somebody has waited for it or nobody will."""
        return self._over.is_set() and self._error is None and (self.waited or self._abandoned)

    def is_completed(self) -> bool:
        """Whether a wait would return at once."""
        return self._over.is_set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return when it is done.

        Raises:
            CollectiveError: if it failed, or something before it on its channel.
        """
        self.waited = True
        if self._event is not None:
            torch.accelerator.current_stream().wait_event(self._event)
        if not self._over.is_set():
            begun = time.perf_counter()
            if not self._over.wait(timeout.total_seconds() if timeout else None):
                raise CollectiveError(f"{self.what} is not done after {timeout}")
            self.blocked += time.perf_counter() - begun
        if self._error is not None and not self._abandoned:
            raise CollectiveError(f"{self.what}: {self._error}") from self._error
        return True


class Channel(ABC):
    """Carries tasks in order.

    Attributes:
        log: while it is a list, every transfer is appended to it.
    """

    asynchronous: bool
    """Whether the caller must wait for a transfer itself. Otherwise the order of the current stream sees to it."""

    def __init__(self) -> None:
        self.log: list[Transfer] | None = None
        self._under_way: deque[Transfer] = deque()

    def submit(self, task: Task, what: str) -> Transfer:
        """Hand over `task`. What it touches is not to be touched until the transfer has been waited for."""
        transfer = Transfer(what)
        if self.log is not None:
            self.log.append(transfer)
        self._carry(transfer, task)
        while self._under_way and self._under_way[0].used:
            self._under_way.popleft()
        self._under_way.append(transfer)
        return transfer

    def drain(self, leave: int = 0) -> None:
        """Wait for all that was handed over, but for the last `leave`."""
        while len(self._under_way) > leave:
            self._under_way[0].wait()
            self._under_way.popleft()

    @abstractmethod
    def _carry(self, transfer: Transfer, task: Task) -> None: ...


class InlineChannel(Channel):
    """Each task runs at once, in the caller's thread, on the caller's stream."""

    asynchronous = False

    def _carry(self, transfer: Transfer, task: Task) -> None:
        error = transfer.run(task)
        transfer.settle()
        if error:
            raise CollectiveError(f"{transfer.what}: {error}") from error


class StreamChannel(Channel):
    """Tasks run on an accelerator's stream, after what is on the caller's stream when they are handed over."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._stream = torch.Stream(device)

    def _carry(self, transfer: Transfer, task: Task) -> None:
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            error = transfer.run(task)
            transfer.follows(self._stream.record_event())
        transfer.settle()
        if error:
            raise CollectiveError(f"{transfer.what}: {error}") from error


class ThreadChannel(Channel):
    """Tasks run one after the other in a thread. It ends with the channel, and does not keep a process from ending."""

    asynchronous = True

    def __init__(self, name: str) -> None:
        super().__init__()
        self._queue: queue.SimpleQueue[tuple[Transfer, Task] | None] = queue.SimpleQueue()
        self._name = name
        self._started = False

    def _carry(self, transfer: Transfer, task: Task) -> None:
        if not self._started:
            self._started = True
            threading.Thread(target=_carry_all, args=(self._queue,), name=self._name, daemon=True).start()
            weakref.finalize(self, self._queue.put, None)
        self._queue.put((transfer, task))


def _carry_all(waiting: queue.SimpleQueue[tuple[Transfer, Task] | None]) -> None:
    broken: BaseException | None = None
    with torch.no_grad():
        while (item := waiting.get()) is not None:
            transfer, task = item
            if broken is None:
                broken = transfer.run(task)
            else:
                transfer.fail(broken)
            del item, task  # the tensors of a task are free before anybody goes on
            transfer.settle()
            del transfer


def channel_for(device: torch.device, backend: str, name: str, *, own_stream: bool = False) -> Channel:
    """The channel for tensors on `device` that travel by `backend`.

    Args:
        device: where the tensors are.
        backend: of the process group.
        name: of the thread, for people.
        own_stream: on an accelerator, a stream of its own instead of the one that is current at each submission.
    """
    if device.type == "cpu":
        return ThreadChannel(name) if backend == "gloo" else InlineChannel()
    return StreamChannel(device) if own_stream else InlineChannel()
