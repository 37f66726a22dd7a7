"""One device: which one, waiting for it, and processes that share it, for the benchmarks that need no other."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_mics.sharding import MiCSModule

TIMEOUT = timedelta(seconds=300)
"""That ranks wait for one another."""


def chosen(given: str | None = None) -> torch.device:
    """The device that a user gave, by default the accelerator if there is one, else the CPU; made the current one."""
    device = torch.device(given or torch.accelerator.current_accelerator() or "cpu")
    if device.type != "cpu":
        device = torch.device(device.type, device.index or 0)
        torch.accelerator.set_device_index(device)
    return device


def name_of(device: torch.device) -> str:
    """As its maker calls it; "cpu" for that."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def wait(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def clean(device: torch.device) -> None:
    """Give back memory that nobody uses."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


@contextmanager
def joined(rank: int, ranks: int, backend: str, place: str | Path) -> Iterator[None]:
    """The default group of processes of this machine that know the same folder. Collective."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(backend, f"file://{place}/store", timeout=TIMEOUT, rank=rank, world_size=ranks)
    yield  # a rank that raises takes its process with it
    dist.barrier()  # one that leaves early breaks the connection of one that is late
    dist.destroy_process_group()


def optimizer_step(
    root: MiCSModule, optimizer: Optimizer, loss_of: Callable[[Any, Any], Tensor], batches: Sequence[Any], number: int
) -> list[Tensor]:
    """Step `number`, of a window of these micro-batches, as a Trainer takes it. Collective on the default group.

    Gradients are cleared between the first forward and its backward.

    Returns:
        The losses, scalars without a graph.
    """
    losses = []
    root.window.begin(number)
    for micro, batch in enumerate(batches):
        boundary = micro == len(batches) - 1
        with torch.enable_grad() if boundary else root.window.hop_1_only():
            loss = loss_of(root, batch)
            losses.append(loss.detach())
            if micro == 0:
                optimizer.zero_grad()
            with root.window.backward():
                (loss / len(batches)).backward()
    root.window.close()
    optimizer.step()
    root.release()
    return losses
