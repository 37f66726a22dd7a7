"""A port that nobody else gets: for servers that are told a port and open it later, in another process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port of this machine that the kernel hands to nobody while in here, and that a server may listen on by number.

    It stays bound here, without listening; a server that sets SO_REUSEADDR, as torch's store does, may bind it, too. A
    port that was looked for and let go may be gone by the time the server is there.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])
