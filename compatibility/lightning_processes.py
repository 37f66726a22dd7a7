"""Processes for pytest, forked from one that has imported what takes seconds: a run of Lightning's tests needs many.

Lightning starts the further ranks of a test as processes that run the same command. `Rank` stands in for them: a fork
of a process that is as the test's own was before it began.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

REPORT = "COMPATIBILITY_REPORT"
"""Names the file that gets a line of JSON for each event."""
KEPT = "COMPATIBILITY_KEPT"
"""JSON: by test, the strategies' names that stay what they are in it."""
ALONE = "COMPATIBILITY_ALONE"
"""Set where a process runs a single test, so that it may start further ones."""

_FORKS = multiprocessing.get_context("forkserver")


def run(
    arguments: list[str], folder: Path, environment: Mapping[str, str], output: Path, seconds: float, *, ranks: bool
) -> int:
    """Run pytest in a process of its own, with what it starts.

    Args:
        arguments: of pytest.
        folder: where.
        environment: its variables.
        output: the file that gets what it prints.
        seconds: after which it is killed.
        ranks: whether it may start further ranks.

    Returns:
        Its exit code, or that of the first rank which failed; negative if a signal has ended it.
    """
    _FORKS.set_forkserver_preload(["compatibility.lightning_plugin"])
    process = _FORKS.Process(target=_first, args=(arguments, folder, dict(environment), output, ranks))
    process.start()
    process.join(seconds)
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _first(arguments: list[str], folder: Path, environment: dict[str, str], output: Path, ranks: bool) -> None:
    os.setpgid(0, 0)
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["pytest", *arguments]
    if ranks:
        Rank.server = _serve()
    code = _pytest(environment)
    sys.exit(code or next(filter(None, [rank.wait() for rank in Rank.started]), 0))


def _pytest(environment: Mapping[str, str]) -> int:
    import pytest

    os.environ.clear()
    os.environ.update(environment)
    return int(pytest.main(sys.argv[1:]))


# -- further ranks -----------------------------------------------------------------------------------------------------


class Rank:
    """One of them, as far as Lightning's launcher asks of a `subprocess.Popen`."""

    server: socket.socket | None = None
    started: ClassVar[list[Rank]] = []

    def __init__(self, command: Any, env: Mapping[str, str], cwd: Any = None) -> None:
        self.returncode: int | None = None
        self.pid = int(self._ask(start=dict(env)))
        self.started.append(self)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._ask(ended=self.pid)
        return self.returncode

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        while (code := self.poll()) is None:
            time.sleep(0.05)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _ask(self, **what: Any) -> Any:
        assert self.server is not None
        self.server.sendall(json.dumps(what).encode() + b"\n")
        return json.loads(_line(self.server))


def _serve() -> socket.socket:
    """Fork what forks ranks. Returns the end to ask it by."""
    ours, theirs = socket.socketpair()
    if os.fork() != 0:
        theirs.close()
        return ours
    ours.close()
    while asked := _line(theirs):
        theirs.sendall(json.dumps(_answer(json.loads(asked))).encode() + b"\n")
    os._exit(0)


def _answer(asked: Mapping[str, Any]) -> int | None:
    if "start" not in asked:
        pid, status = os.waitpid(asked["ended"], os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None
    if (pid := os.fork()) == 0:
        code = 1
        try:
            code = _pytest(asked["start"])
        finally:
            os._exit(code)
    return pid


def _line(end: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"\n") and (part := end.recv(65536)):
        found += part
    return found
