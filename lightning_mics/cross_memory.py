"""Cross memory: the ranks of a node read what another has straight out of its memory. For CPU tensors on Linux.

Cross-memory attach, as MPI libraries call it: one copy, where a socket makes two and a system call for each piece, and
no memory in between. Only where something is, and that it has been read, goes through a socket. The kernel lets a
process read those of its own user, unless the machine's settings forbid it (a container's, or those of the security
module Yama); so it is tried first, and where it does not work, there is no `CrossMemory`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import select
import socket
import struct
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_PR_SET_PTRACER = 0x59616D61  # of prctl, from <linux/prctl.h>
_libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_process_vm_readv = getattr(_libc, "process_vm_readv", None)
if _process_vm_readv is not None:
    _process_vm_readv.restype = ctypes.c_ssize_t

_NOTE = struct.Struct("=qQQ")  # tag, address, bytes
_TAKEN = 1 << 62  # the tag of what says that a tensor was taken is the tensor's and this
_PEER_CREDENTIALS = struct.Struct("=3i")  # process, user, group
_AWHILE = 0.01  # seconds


class CrossMemory:
    """What the ranks of one node offer one another, and take.

    Any thread may offer and take. A tag is free for the next between two ranks once both sides are done with it.

    Args:
        group: of the ranks, which are numbered as in it.
        processes: theirs, in that order.
        connections: to each of the other ranks: sockets that keep messages apart.
        timeout: seconds that a rank waits for another.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        processes: Sequence[int],
        connections: Mapping[int, socket.socket],
        timeout: float,
    ) -> None:
        self.group = group
        self.timeout = timeout
        self._known_as = dist.get_process_group_ranks(group)  # in the default group, and so to people
        self._processes = tuple(processes)
        self._connections = dict(connections)
        self._rank_of = {connection.fileno(): rank for rank, connection in connections.items()}
        self._gone: set[int] = set()
        self._notes: dict[tuple[int, int], tuple[int, int]] = {}
        self._changed = threading.Condition()
        self._somebody_reads = False
        for connection in connections.values():
            connection.setblocking(False)
        weakref.finalize(self, _close, tuple(connections.values()))

    @classmethod
    def connect(cls, group: dist.ProcessGroup, timeout: timedelta | None = None) -> CrossMemory | None:
        """Among the ranks of `group`, if each of them can read the memory of all; otherwise None on every rank.

        Where Yama asks for that, this process consents to be read by what its parent has started. Collective on
        `group`, which carries CPU tensors: an all-gather and two all-reduces of a few numbers.

        Args:
            group: of ranks on one node.
            timeout: how long a rank waits for another; by default torch's for a collective.
        """
        if hasattr(_libc, "prctl"):
            _libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(os.getppid()), 0, 0, 0)  # fails where there is no Yama
        secret = torch.tensor([secrets.randbits(62)])
        mine = torch.tensor([os.getpid(), secret.data_ptr(), int(secret)])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        with ExitStack() as until_connected:
            listener = _listener(int(secret))
            if listener is not None:
                until_connected.enter_context(listener)
            dist.all_gather(everyone, mine, group=group)
            ranks = [tuple(int(number) for number in numbers) for numbers in everyone]
            if not _all(group, listener is not None and _readable(ranks)):
                return None
            here = dist.get_rank(group)
            connections = _call(ranks[:here])
            for connection in connections.values():
                until_connected.enter_context(connection)
            if not _all(group, len(connections) == here):
                return None
            assert listener is not None
            processes = [process for process, *_ in ranks]
            connections |= _answer(listener, processes, here)
            until_connected.pop_all()
            listener.close()
        return cls(group, processes, connections, (timeout or dist.default_pg_timeout).total_seconds())

    def offer(self, tensor: Tensor, to: int, tag: int) -> None:
        """Let rank `to` take `tensor`, contiguous and on CPU, which stays as it is until `wait_until_taken` returns.

        Raises:
            OSError: if that rank is gone; TimeoutError: if it is deaf.
            ValueError: if `tensor` is not contiguous.
        """
        if not tensor.is_contiguous():
            raise ValueError(
                f"a tensor with strides {tensor.stride()} is not contiguous, and cannot be read as one piece"
            )
        self._tell(to, tag, tensor.data_ptr(), tensor.nbytes)

    def take(self, target: Tensor, source: int, tag: int) -> None:
        """Wait until rank `source` offers a tensor under `tag`, and copy it into `target`, contiguous and on CPU.

        Raises:
            OSError: if that rank is gone or cannot be read; TimeoutError: if it offers nothing.
            ValueError: if what it offers has another size.
        """
        address, nbytes = self._hear(source, tag)
        if nbytes != target.nbytes:
            raise ValueError(f"rank {self._known_as[source]} offers {nbytes} bytes where {target.nbytes} are expected")
        read(self._processes[source], address, target)
        self._tell(source, tag | _TAKEN)

    def wait_until_taken(self, to: int, tag: int) -> None:
        """Return when rank `to` has taken what it was offered under `tag`.

        Raises:
            OSError: if that rank is gone; TimeoutError: if it does not take it.
        """
        self._hear(to, tag | _TAKEN)

    def _tell(self, rank: int, tag: int, address: int = 0, nbytes: int = 0) -> None:
        deadline = time.monotonic() + self.timeout
        note = _NOTE.pack(tag, address, nbytes)
        while True:
            try:
                self._connections[rank].send(note)
                return
            except BlockingIOError:  # it has not read what it was told before; nor does it, perhaps, until we do
                with self._changed:
                    self._listen(min(_AWHILE, self._left(deadline, rank)))

    def _hear(self, rank: int, tag: int) -> tuple[int, int]:
        deadline = time.monotonic() + self.timeout
        with self._changed:
            while (rank, tag) not in self._notes:
                if rank in self._gone:
                    raise ConnectionResetError(f"rank {self._known_as[rank]} is gone")
                self._listen(self._left(deadline, rank))
            return self._notes.pop((rank, tag))

    def _left(self, deadline: float, rank: int) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"waited {self.timeout:g} s for rank {self._known_as[rank]}")
        return left

    def _listen(self, seconds: float) -> None:
        """Note what the ranks say, unless another thread does so already; return as soon as there is something.

        With `_changed` held, and left to others meanwhile.
        """
        if self._somebody_reads:
            self._changed.wait(seconds)
            return
        self._somebody_reads = True
        self._changed.release()
        try:
            said = self._said(seconds)
        finally:
            self._changed.acquire()
            self._somebody_reads = False
            self._changed.notify_all()
        for source, note in said:
            if note:
                tag, address, nbytes = _NOTE.unpack(note)
                self._notes[source, tag] = address, nbytes
            else:
                self._gone.add(source)

    def _said(self, seconds: float) -> list[tuple[int, bytes]]:
        poll = select.poll()
        for rank, connection in self._connections.items():
            if rank not in self._gone:
                poll.register(connection, select.POLLIN)
        said = []
        for descriptor, _ in poll.poll(seconds * 1000):
            rank = self._rank_of[descriptor]
            with suppress(BlockingIOError):
                while True:
                    note = _received(self._connections[rank])
                    said.append((rank, note))
                    if not note:
                        break
        return said


def read(process: int, address: int, target: Tensor) -> None:
    """Fill `target`, contiguous and on CPU, with the bytes at `address` in `process`.

    Raises:
        OSError: if the process is gone, may not be read or has no such memory, or if this system cannot.
    """
    if _process_vm_readv is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    done = 0
    while done < target.nbytes:  # the kernel stops at 2 GiB
        left = target.nbytes - done
        ours, theirs = _Range(target.data_ptr() + done, left), _Range(address + done, left)
        one, no_flags = ctypes.c_ulong(1), ctypes.c_ulong(0)
        count = _process_vm_readv(process, ctypes.byref(ours), one, ctypes.byref(theirs), one, no_flags)
        if count <= 0:
            code = ctypes.get_errno()
            raise OSError(code, f"the memory of process {process} cannot be read: {os.strerror(code)}")
        done += count


class _Range(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _readable(ranks: Sequence[Sequence[int]]) -> bool:
    """Whether each of `ranks`, (process, address, secret), has its secret where it says.

    Another container's process of the same number has not.
    """
    for process, address, secret in ranks:
        found = torch.zeros(1, dtype=torch.int64)
        with suppress(OSError):
            read(process, address, found)
        if int(found) != secret:
            return False
    return True


def _all(group: dist.ProcessGroup, well: bool) -> bool:
    """Whether it went well on every rank."""
    vote = torch.tensor([int(well)])
    dist.all_reduce(vote, dist.ReduceOp.MIN, group=group)
    return bool(vote)


def _name(secret: int) -> str:
    """A socket's, which is in no folder and goes with it."""
    return f"\0mics-{secret:x}"


def _listener(secret: int) -> socket.socket | None:
    with suppress(OSError, AttributeError), ExitStack() as unless_it_listens:
        listener = unless_it_listens.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(_name(secret))
        listener.listen(socket.SOMAXCONN)
        unless_it_listens.pop_all()
        return listener
    return None


def _call(ranks: Sequence[Sequence[int]]) -> dict[int, socket.socket]:
    """A connection to each of `ranks` that can be reached. They need not have answered."""
    connections = {}
    for rank, (*_, secret) in enumerate(ranks):
        with suppress(OSError), ExitStack() as unless_connected:
            connection = unless_connected.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.connect(_name(secret))
            unless_connected.pop_all()
            connections[rank] = connection
    return connections


def _answer(listener: socket.socket, processes: Sequence[int], here: int) -> dict[int, socket.socket]:
    """The connections of the ranks behind `here`, all of which have called. Who else did is turned away."""
    connections: dict[int, socket.socket] = {}
    while len(connections) < len(processes) - here - 1:
        connection, _ = listener.accept()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        process, *_ = _PEER_CREDENTIALS.unpack(credentials)
        if process in processes[here + 1 :]:
            connections[processes.index(process)] = connection
        else:
            connection.close()
    return connections


def _received(connection: socket.socket) -> bytes:
    """The next message; nothing if the other side is gone and has nothing left to say."""
    while True:
        with suppress(ConnectionResetError):  # told once, ahead of what the other side said before it went
            return connection.recv(_NOTE.size)


def _close(connections: Iterable[socket.socket]) -> None:
    for connection in connections:
        connection.close()
