"""Channels: order, what runs beside the caller, and what becomes of an error. No process group, no sleep."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch

from lightning_mics.channels import (
    Channel,
    CollectiveError,
    InlineChannel,
    StreamChannel,
    ThreadChannel,
    Transfer,
    channel_for,
)

PATIENCE = 300.0  # seconds, for what comes at once unless something hangs
SOON = timedelta(seconds=PATIENCE)


def nothing() -> None: ...


def fail() -> None:
    raise ConnectionError("as meant")


class Gate:
    """A task that says that it has begun, and ends when it is told to."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.open.wait(PATIENCE)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture(params=["inline", "thread"])
def channel(request: pytest.FixtureRequest) -> Channel:
    return InlineChannel() if request.param == "inline" else ThreadChannel("test")


# -- every channel -----------------------------------------------------------------------------------------------------


def test_tasks_run_in_the_order_in_which_they_were_handed_over(channel: Channel) -> None:
    done: list[int] = []
    transfers = [channel.submit(lambda i=i: done.append(i), f"task {i}") for i in range(100)]
    assert transfers[-1].wait(SOON)
    assert done == list(range(100))
    assert all(transfer.is_completed() for transfer in transfers)


def test_draining_waits_for_all(channel: Channel) -> None:
    channel.drain()  # nothing was handed over yet
    done: list[int] = []
    for i in range(100):
        channel.submit(lambda i=i: done.append(i), f"task {i}")
    channel.drain()
    assert len(done) == 100


def test_draining_may_leave_the_last_ones(gate: Gate) -> None:
    done: list[str] = []
    channel = ThreadChannel("test")
    channel.submit(lambda: done.append("first"), "first")
    channel.submit(gate, "second")
    channel.submit(nothing, "third")
    channel.drain(leave=2)  # the second is not over before the gate is open
    assert done == ["first"]
    gate.open.set()
    channel.drain()


def test_what_has_been_waited_for_is_forgotten(channel: Channel) -> None:
    used = weakref.ref(channel.submit(nothing, "waited for"))
    transfer = used()
    assert transfer is not None and transfer.wait(SOON)
    channel.submit(nothing, "the next").wait(SOON)
    del transfer
    gc.collect()
    assert used() is None


def test_the_log_holds_what_was_handed_over_while_it_was_a_list(channel: Channel) -> None:
    channel.submit(nothing, "before")
    channel.log = []
    first, second = channel.submit(nothing, "first"), channel.submit(nothing, "second")
    logged, channel.log = channel.log, None
    channel.submit(nothing, "after")
    channel.drain()
    assert logged == [first, second]
    assert [transfer.what for transfer in logged] == ["first", "second"]
    assert 0 < first.began <= first.ended <= second.began <= second.ended


def test_a_task_records_no_gradients() -> None:
    """The caller's thread may; a task's may not, wherever it runs: what it writes to in place are leaves."""
    leaf, seen = torch.zeros(1, requires_grad=True), list[bool]()
    channel = ThreadChannel("test")
    channel.submit(lambda: leaf.add_(1.0) and seen.append(torch.is_grad_enabled()), "an addition").wait(SOON)
    assert seen == [False]
    assert torch.is_grad_enabled()


def giving_way(name: int, events: list[str], fails: str = "") -> Callable[[], Iterator[None]]:
    """A task in two parts, each of which says that it has come; one may fail."""

    def task() -> Iterator[None]:
        for part in ("begins", "ends"):
            events.append(f"{name} {part}")
            if fails == part:
                fail()
            if part == "begins":
                yield

    return task


def test_a_task_that_gives_way_is_done_to_the_end(channel: Channel) -> None:
    events: list[str] = []
    channel.submit(giving_way(0, events), "a task").wait(SOON)
    assert events == ["0 begins", "0 ends"]


def test_where_nothing_runs_beside_the_caller_nothing_gives_way() -> None:
    events: list[str] = []
    channel = InlineChannel()
    channel.submit(giving_way(0, events), "first")
    channel.submit(giving_way(1, events), "second")
    assert events == ["0 begins", "0 ends", "1 begins", "1 ends"]


# -- a thread ----------------------------------------------------------------------------------------------------------


def carried(gate: Gate, *tasks: Callable[[], Iterator[None] | None]) -> list[Transfer]:
    """What has become of tasks that all waited when the first was begun."""
    channel = ThreadChannel("test")
    channel.submit(gate, "the gate")
    transfers = [channel.submit(task, f"task {index}") for index, task in enumerate(tasks)]
    gate.open.set()
    for transfer in transfers:
        with suppress(CollectiveError):
            transfer.wait(SOON)
    return transfers


def test_some_behind_are_begun_before_one_that_gives_way_ends(gate: Gate) -> None:
    """Three at a time: one that is ended, and two that are ready. They end in order."""
    events: list[str] = []
    carried(gate, *(giving_way(i, events) for i in range(5)))
    begun_ahead = "0 begins, 1 begins, 2 begins, 0 ends, 3 begins, 1 ends, 4 begins, 2 ends, 3 ends, 4 ends"
    assert ", ".join(events) == begun_ahead


def test_nothing_is_begun_behind_one_that_does_not_give_way(gate: Gate) -> None:
    events: list[str] = []
    carried(gate, giving_way(0, events), lambda: events.append("1"), giving_way(2, events))
    assert events == ["0 begins", "1", "0 ends", "2 begins", "2 ends"]


def test_what_is_ahead_of_a_failure_goes_on_and_what_is_behind_it_does_not(gate: Gate) -> None:
    events: list[str] = []
    transfers = carried(gate, *(giving_way(i, events, "begins" if i == 1 else "") for i in range(3)))
    assert [transfer.error is None for transfer in transfers] == [True, False, False]
    assert events == ["0 begins", "1 begins", "0 ends"]


def test_what_was_begun_behind_a_failure_does_not_go_on(gate: Gate) -> None:
    events: list[str] = []
    transfers = carried(gate, *(giving_way(i, events, "ends" if i == 0 else "") for i in range(4)))
    assert [str(transfer.error) for transfer in transfers] == ["as meant"] * 4
    assert events == ["0 begins", "1 begins", "2 begins", "0 ends"]


def test_the_caller_goes_on_while_a_task_runs(gate: Gate) -> None:
    channel = ThreadChannel("test")
    transfer, behind = channel.submit(gate, "the gate"), channel.submit(nothing, "behind it")
    assert gate.begun.wait(PATIENCE)
    assert not transfer.is_completed() and not behind.is_completed()
    assert not transfer.waited
    gate.open.set()
    assert behind.wait(SOON)
    assert transfer.is_completed()


def test_only_who_waits_in_vain_is_blocked(gate: Gate) -> None:
    channel = ThreadChannel("test")
    transfer = channel.submit(gate, "the gate")
    with pytest.raises(CollectiveError, match=r"^the gate is not done after 0:00:00\.010000$"):
        transfer.wait(timedelta(milliseconds=10))
    lock = transfer._under_way

    class Opening:
        """The gate opens once the caller is blocked, and not before."""

        locked, release = lock.locked, lock.release

        def acquire(self, timeout: float) -> bool:
            gate.open.set()
            return lock.acquire(timeout=timeout)

    began = time.perf_counter()
    with patch.object(transfer, "_under_way", Opening()):
        transfer.wait()
    first = transfer.blocked
    assert 0 < first <= time.perf_counter() - began
    transfer.wait()
    assert transfer.waited and transfer.blocked == first


def test_what_failed_raises_at_the_wait_and_so_does_everything_behind_it(gate: Gate) -> None:
    done: list[str] = []
    channel = ThreadChannel("test")
    before = channel.submit(gate, "before")
    failed = channel.submit(fail, "reduce-scatter of layer 3")
    behind = channel.submit(lambda: done.append("behind"), "reduce-scatter of layer 2")
    gate.open.set()
    assert before.wait(SOON)
    for transfer, what in ((failed, "layer 3"), (behind, "layer 2"), (failed, "layer 3")):
        with pytest.raises(CollectiveError, match=f"^reduce-scatter of {what}: as meant$") as raised:
            transfer.wait(SOON)
        assert isinstance(raised.value.__cause__, ConnectionError)
    later = channel.submit(lambda: done.append("later"), "reduce-scatter of layer 1")
    with pytest.raises(CollectiveError, match=r"^reduce-scatter of layer 1: as meant$"):
        later.wait(SOON)
    with pytest.raises(CollectiveError, match="layer 3: as meant"):
        channel.drain()
    assert done == []  # on a broken channel nothing runs any more


def test_who_waits_for_what_was_abandoned_returns_at_once(gate: Gate) -> None:
    channel = ThreadChannel("test")
    never, behind = channel.submit(gate, "never over"), channel.submit(fail, "behind it")
    never.abandon()
    assert never.wait(SOON) and never.is_completed()
    assert not behind.is_completed()  # the thread is still at it
    behind.abandon()
    gate.open.set()
    with pytest.raises(CollectiveError):
        channel.submit(nothing, "after both").wait(SOON)
    assert behind.wait()  # it failed since, and nobody cares


def thread_of(channel: Channel) -> threading.Thread:
    found: list[threading.Thread] = []
    channel.submit(lambda: found.append(threading.current_thread()), "a look around").wait(SOON)
    return found[0]


def test_one_thread_a_channel_and_none_before_it_is_needed() -> None:
    before = {*threading.enumerate()}  # of which some may be about to end: other tests' channels
    first, second = ThreadChannel("mics-first"), ThreadChannel("mics-second")
    assert {*threading.enumerate()} <= before
    threads = [thread_of(first), thread_of(second), thread_of(first)]
    assert threads[0] is threads[2] is not threads[1]
    assert [thread.name for thread in threads] == ["mics-first", "mics-second", "mics-first"]
    assert all(thread.daemon for thread in threads)  # a hung collective does not keep the process from ending


def test_the_thread_ends_with_its_channel() -> None:
    channel = ThreadChannel("test")
    thread = thread_of(channel)
    del channel
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_task_is_freed_when_it_is_done() -> None:
    """A task holds a block's gradients; the thread must not keep them until the next comes."""

    class Buffer:
        def __call__(self) -> None: ...

    channel = ThreadChannel("test")
    buffer = Buffer()
    freed = threading.Event()
    weakref.finalize(buffer, freed.set)
    transfer = channel.submit(buffer, "a buffer")
    del buffer
    transfer.wait(SOON)
    assert freed.wait(PATIENCE)


# -- in line -----------------------------------------------------------------------------------------------------------


def test_in_line_a_task_is_over_when_submit_returns() -> None:
    channel, threads = InlineChannel(), list[threading.Thread]()
    transfer = channel.submit(lambda: threads.append(threading.current_thread()), "now")
    assert threads == [threading.current_thread()]
    assert transfer.is_completed() and transfer.wait() and transfer.blocked == 0


def test_in_line_an_error_raises_at_once() -> None:
    channel = InlineChannel()
    with pytest.raises(CollectiveError, match=r"^all-gather of layer 3: as meant$") as raised:
        channel.submit(fail, "all-gather of layer 3")
    assert isinstance(raised.value.__cause__, ConnectionError)


def test_who_must_wait() -> None:
    assert (InlineChannel.asynchronous, ThreadChannel.asynchronous, StreamChannel.asynchronous) == (False, True, True)


# -- which one ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "kind"), [("gloo", ThreadChannel), ("fake", InlineChannel), ("mpi", InlineChannel)]
)
@pytest.mark.parametrize("own_stream", [False, True])
def test_the_channel_of_a_cpu(backend: str, kind: type[Channel], own_stream: bool) -> None:
    assert type(channel_for(torch.device("cpu"), backend, "test", own_stream=own_stream)) is kind


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_a_stream_runs_after_what_the_caller_queued_and_who_waits_after_it() -> None:
    device = torch.accelerator.current_accelerator()
    channel = channel_for(device, "nccl", "test", own_stream=True)
    assert type(channel) is StreamChannel
    assert type(channel_for(device, "nccl", "test")) is InlineChannel
    many = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        many = torch.tanh(many @ many)  # enough that what follows is queued long before it runs
    streams: list[torch.Stream] = []

    def task() -> None:
        streams.append(torch.accelerator.current_stream(device))
        many.mul_(2.0)

    transfer: Transfer = channel.submit(task, "twice")
    assert streams[0] != torch.accelerator.current_stream(device)
    transfer.wait()
    doubled = many + 0.0
    torch.accelerator.synchronize()
    assert torch.equal(doubled, many)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_an_error_on_a_stream_raises_at_once() -> None:
    channel = StreamChannel(torch.accelerator.current_accelerator())
    with pytest.raises(CollectiveError, match="hop 2: as meant"):
        channel.submit(fail, "hop 2")
