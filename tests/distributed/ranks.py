"""Run a function on real gloo processes.

Processes come from a fork server that has torch and Lightning imported, so that a test with four ranks starts in
half a second. The function is a module-level one; what it returns on each rank comes back as a list.

`DEVICE` in their environment has ranks share an accelerator: each is a node then, as nodes have devices of their own.
They send by gloo; one rank alone has NCCL, which wants a device for each process.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from tests.ports import reserved_port

DEVICE = "MICS_TEST_DEVICE"
"""In the environment, the type of the device that ranks compute on; by default "cpu"."""

_context = multiprocessing.get_context("forkserver")
# What the tests import, too: a rank that imports it by itself spends four seconds on that.
_context.set_forkserver_preload(
    [
        "hypothesis.strategies",
        "lightning_mics",
        "pytest",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "transformers.models.bert.modeling_bert",
        "transformers.models.gpt2.modeling_gpt2",
    ]
)


def begun(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """A process of the fork server's that calls `function(*args)`."""
    process = _context.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 800, grace: float = 5, **env: str
) -> list[Any]:
    """`function(*args)` on `world_size` ranks with the default process group set up; their results in rank order.

    Where one fails, the others have `grace` seconds before they are killed. `timeout` ends what hangs, however busy the
    machine is; half of it is what the ranks wait for one another, so that they can tell in what they hung.

    Raises:
        AssertionError: with the first failing rank's traceback.
    """
    pipes, processes = [], []
    with ExitStack() as stack:
        port = stack.enter_context(reserved_port())
        folder = stack.enter_context(tempfile.TemporaryDirectory())  # what a Trainer writes when it is not told where
        for rank in range(world_size):
            ours, theirs = _context.Pipe(duplex=False)
            whole = (theirs, rank, world_size, port, folder, timeout / 2, env, function, args)
            process = _context.Process(target=_main, args=whole, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, timeout)
        finally:
            for process in processes:
                process.join(grace)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting.values()), timeout)
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting)} did not finish within {timeout} s")
        for rank, pipe in [(r, p) for r, p in waiting.items() if p in ready]:
            del waiting[rank]
            try:
                failure, results[rank] = pipe.recv()
            except EOFError:
                failure = "the process died"
            if failure:
                raise AssertionError(f"rank {rank}:\n{failure}")
    return [results[rank] for rank in range(len(pipes))]


def _main(
    pipe: Connection,
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    patience: float,
    env: dict[str, str],
    function: Any,
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    device = env.get(DEVICE, "cpu")
    node, local = (0, rank) if device == "cpu" else (rank, 0)
    backend = "gloo" if device == "cpu" or world_size > 1 else f"cpu:gloo,{device}:nccl"
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        LOCAL_RANK=str(local),
        NODE_RANK=str(node),
        WORLD_SIZE=str(world_size),
        GLOO_SOCKET_IFNAME="lo",
        **env,
    )
    torch.set_num_threads(1)
    os.chdir(folder)
    try:
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=patience))
        result = function(*args)
        dist.barrier()  # a rank that leaves early breaks the connection of one that is late to make it
        dist.destroy_process_group()
        pipe.send((None, result))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
