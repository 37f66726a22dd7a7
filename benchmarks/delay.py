"""A switch whose every frame waits: it joins ports of one network namespace and passes frames on after a fixed time.

Linux can delay frames by itself (`tc netem`), where its kernel was built with it; this does it on every kernel that has
packet sockets. Frames are taken as the kernel has them, up to 64 KiB each before segmentation, so that a gigabit
passes with some thousand reads a second. Run as `python delay.py SECONDS PORT...`; ends when its standard input does.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress

# <linux/if_packet.h>, <linux/virtio_net.h>, <asm/socket.h>
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_VNET_HEADER = 10
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_ALL_PROTOCOLS = 3
_LARGEST_FRAME = 1 << 17
_SOCKET_BUFFER = 1 << 25
_READS_A_TURN = 64


def port_of(mac: bytes) -> int | None:
    """The index of the port behind which a node has `mac`, or None for all (see `benchmarks.cluster.mac_of`)."""
    return None if mac[0] & 1 else int.from_bytes(mac[4:6], "big")


def forward(ports: list[socket.socket], delay: float, stop: int) -> None:
    """Pass frames between `ports`, each `delay` seconds after it came, until the file descriptor `stop` is readable."""
    waiting: deque[tuple[float, int, bytes]] = deque()
    while True:
        patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        sources: list[socket.socket | int] = [*ports, stop]
        readable, _, _ = select.select(sources, [], [], patience)
        if stop in readable:
            return
        for index, port in enumerate(ports):
            if port in readable:
                _take(port, index, delay, waiting)
        while waiting and waiting[0][0] <= time.monotonic():
            _, index, frame = waiting.popleft()
            _give(ports, index, frame)


def _take(port: socket.socket, index: int, delay: float, waiting: deque[tuple[float, int, bytes]]) -> None:
    with suppress(BlockingIOError):
        for _ in range(_READS_A_TURN):
            frame = port.recv(_LARGEST_FRAME)
            waiting.append((time.monotonic() + delay, index, frame))


def _give(ports: list[socket.socket], source: int, frame: bytes) -> None:
    target = port_of(frame[_VNET_HEADER : _VNET_HEADER + 6])
    for index, port in enumerate(ports):
        if index != source and target in (None, index):
            with suppress(BlockingIOError, OSError):  # a full queue drops the frame, as a switch does
                port.send(frame)


def _open(name: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
    port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    port.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _SOCKET_BUFFER)
    port.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BUFFER)
    port.bind((name, 0))
    port.setblocking(False)
    return port


def main(seconds: str, *names: str) -> None:
    """Forward between the interfaces `names` until standard input closes."""
    with suppress(OSError):  # ahead of the ranks, which use all cores; without it frames wait longer than they should
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    ports = [_open(name) for name in names]
    print("ready", flush=True)
    forward(ports, float(seconds), sys.stdin.fileno())


if __name__ == "__main__":
    main(*sys.argv[1:])
