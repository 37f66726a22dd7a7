"""What ranks of a node read in one another's memory, on real processes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from datetime import timedelta
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics import cross_memory
from lightning_mics.cross_memory import CrossMemory, read
from lightning_mics.groups import Groups
from lightning_mics.topology import Topology
from tests.distributed.ranks import run_ranks
from tests.raising import raised


def connected(timeout: timedelta | None = None) -> CrossMemory:
    """Among all ranks."""
    assert dist.group.WORLD is not None
    memory = CrossMemory.connect(dist.group.WORLD, timeout)
    assert memory is not None
    return memory


def others() -> list[int]:
    return [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]


def values(source: int, to: int, tag: int, numel: int) -> Tensor:
    """What one rank has for another: known to both."""
    return torch.arange(numel, dtype=torch.int64) + 10_000 * source + 1_000 * to + tag


def taken(memory: CrossMemory, source: int, tag: int, numel: int) -> bool:
    """Whether what comes is what it should be."""
    target = torch.empty(numel, dtype=torch.int64)
    memory.take(target, source, tag)
    return torch.equal(target, values(source, dist.get_rank(), tag, numel))


NUMELS = (1, 0, 7, 3_000_000)


def _all_to_all() -> bool:
    memory, here = connected(), dist.get_rank()
    kept = [values(here, to, tag, numel) for to in others() for tag, numel in enumerate(NUMELS)]
    for index, tensor in enumerate(kept):
        memory.offer(tensor, others()[index // len(NUMELS)], index % len(NUMELS))
    backwards = reversed([*enumerate(NUMELS)])
    good = [taken(memory, source, tag, numel) for tag, numel in backwards for source in others()]
    for to in others():
        for tag in range(len(NUMELS)):
            memory.wait_until_taken(to, tag)
    return all(good)


def test_each_takes_what_it_is_offered_in_any_order() -> None:
    assert run_ranks(3, _all_to_all) == [True] * 3


NOTES = 2_000  # a few hundred fill a socket


def _more_than_a_socket_holds() -> bool:
    memory, here, n = connected(), dist.get_rank(), dist.get_world_size()
    kept = [values(here, to, tag, 1) for tag in range(NOTES) for to in others()]
    for index, tensor in enumerate(kept):
        memory.offer(tensor, others()[index % (n - 1)], index // (n - 1))
    good = [taken(memory, source, tag, 1) for tag in range(NOTES) for source in others()]
    for index in range(len(kept)):
        memory.wait_until_taken(others()[index % (n - 1)], index // (n - 1))
    return all(good)


def test_nobody_waits_for_ever_where_all_offer_before_any_takes() -> None:
    assert run_ranks(3, _more_than_a_socket_holds, timeout=100) == [True] * 3


def _by_many_threads() -> list[bool]:
    memory, here = connected(), dist.get_rank()
    other, good = 1 - here, []

    def converse(thread: int) -> None:
        for tag in range(thread, 400, 4):
            mine = values(here, other, tag, 100)
            memory.offer(mine, other, tag)
            good.append(taken(memory, other, tag, 100))
            memory.wait_until_taken(other, tag)

    threads = [threading.Thread(target=converse, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return good


def test_threads_that_wait_beside_one_another() -> None:
    assert run_ranks(2, _by_many_threads) == [[True] * 400] * 2


def _not_before_it_is_taken() -> float:
    """Rank 1 changes what it offered as soon as it may."""
    memory, other = connected(), 1 - dist.get_rank()
    barrier = partial(dist.monitored_barrier, timeout=timedelta(seconds=60))
    if dist.get_rank() == 1:
        mine = torch.full((1000,), 5.0)
        memory.offer(mine, other, 0)
        waits = threading.Thread(target=lambda: (memory.wait_until_taken(other, 0), mine.zero_()))
        waits.start()
        waits.join(0.3)  # long enough to go wrong
        barrier()
        waits.join()
        return mine.sum().item()
    barrier()
    target = torch.empty(1000)
    memory.take(target, other, 0)
    return target.sum().item()


def test_what_is_offered_is_left_alone_until_it_is_taken() -> None:
    assert run_ranks(2, _not_before_it_is_taken) == [5000.0, 0.0]


# -- ranks that are gone, deaf or different ----------------------------------------------------------------------------


def _without_rank_1() -> list[str]:
    memory = connected(timedelta(seconds=0.5))
    told = []
    if dist.get_rank() == 0:
        told.append(raised(lambda: memory.take(torch.empty(1), 1, 0)))
    dist.barrier()
    if dist.get_rank() == 1:
        del memory
        dist.barrier()
        return []
    dist.barrier()
    memory.timeout = 300.0
    return [
        *told,
        raised(lambda: memory.take(torch.empty(1), 1, 0)),
        raised(lambda: memory.wait_until_taken(1, 0)),
        raised(lambda: memory.offer(torch.empty(1), 1, 0)),
    ]


def test_a_rank_that_says_nothing_or_is_gone() -> None:
    silent, take, wait, offer = run_ranks(2, _without_rank_1)[0]
    assert silent == "TimeoutError: waited 0.5 s for rank 1"
    assert take == wait == "ConnectionResetError: rank 1 is gone"
    assert offer.startswith("BrokenPipeError: ")


def test_what_was_said_is_heard_though_the_speaker_is_gone() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        theirs.send(b"taken")
        ours.send(b"never read")
        theirs.close()
        assert [cross_memory._received(ours) for _ in range(3)] == [b"taken", b"", b""]


def _in_pieces() -> str:
    memory, other = connected(), 1 - dist.get_rank()
    return raised(lambda: memory.offer(torch.zeros(4, 4)[:, 0], other, 0))


def test_an_offer_in_pieces() -> None:
    told = "ValueError: a tensor with strides (4,) is not contiguous, and cannot be read as one piece"
    assert run_ranks(2, _in_pieces) == [told] * 2


def _another_size() -> str:
    memory, other = connected(), 1 - dist.get_rank()
    mine = torch.zeros(4)
    memory.offer(mine, other, 0)
    told = raised(lambda: memory.take(torch.empty(5), other, 0))
    dist.barrier()
    return told


def test_an_offer_of_another_size() -> None:
    for rank, told in enumerate(run_ranks(2, _another_size)):
        assert told == f"ValueError: rank {1 - rank} offers 16 bytes where 20 are expected"


def test_memory_that_cannot_be_read() -> None:
    with pytest.raises(OSError, match=f"the memory of process {os.getpid()} cannot be read: Bad address"):
        read(os.getpid(), 8, torch.empty(1))
    gone = multiprocessing.get_context("spawn").Process(target=int)
    gone.start()
    gone.join()
    assert gone.pid is not None
    with pytest.raises(ProcessLookupError):
        read(gone.pid, torch.empty(1).data_ptr(), torch.empty(1))


# -- where it does not work --------------------------------------------------------------------------------------------

MISSING = {
    "no system call": ("_process_vm_readv", None),
    "another's memory": ("read", lambda process, address, target: target.zero_()),
    "no sockets": ("_listener", lambda secret: None),
    "no connection": ("_call", lambda ranks: {}),
}


def _missing_on_rank_2(name: str) -> bool:
    assert dist.group.WORLD is not None
    what, instead = MISSING[name]
    if dist.get_rank() == 2:
        with patch.object(cross_memory, what, instead):
            memory = CrossMemory.connect(dist.group.WORLD)
    else:
        memory = CrossMemory.connect(dist.group.WORLD)
    return memory is None


@pytest.mark.parametrize("name", MISSING)
def test_it_is_there_for_all_or_for_none(name: str) -> None:
    assert run_ranks(3, _missing_on_rank_2, name) == [True] * 3


def _calls(secret: int) -> None:
    assert list(cross_memory._call([(0, 0, secret)])) == [0]
    multiprocessing.parent_process().join()  # type: ignore[union-attr]


def test_a_stranger_who_calls_is_turned_away() -> None:
    listener = cross_memory._listener(123)
    assert listener is not None
    with listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(cross_memory._name(123))
        rank_1 = multiprocessing.get_context("forkserver").Process(target=_calls, args=(123,), daemon=True)
        rank_1.start()
        assert rank_1.pid is not None
        connections = cross_memory._answer(listener, [0, rank_1.pid], 0)
        assert list(connections) == [1]
        assert stranger.recv(1) == b""
        connections[1].close()
        rank_1.kill()
        rank_1.join()


def _of_groups() -> list[list[int] | None]:
    groups = Groups.create(Topology(4, 2, 4), "cpu", timedelta(seconds=321))
    assert groups.gather is not None and groups.hop_1 is not None
    memories = [groups.gather.cross_memory, groups.hop_1.cross_memory, groups.gather.flat().cross_memory]
    assert all(memory is None or memory.timeout == 321 for memory in memories)
    return [None if memory is None else dist.get_process_group_ranks(memory.group) for memory in memories]


def test_groups_have_one_for_each_kind_of_traffic_in_a_node() -> None:
    assert run_ranks(4, _of_groups) == [[[0, 1], [0, 1], None]] * 2 + [[[2, 3], [2, 3], None]] * 2
