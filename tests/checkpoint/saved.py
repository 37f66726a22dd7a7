"""A small module under `shard`, trained for some steps, and checkpoints of it without a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics import Topology
from lightning_mics.checkpoint import Saver, Writers, optimizer_state_by_name
from lightning_mics.groups import Groups
from lightning_mics.sharding import MiCSModule, shard


class Model(nn.Module):
    """Blocks, a tied head, a buffer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(self.norm(x))


def topology() -> Topology:
    """One node; two ranks hold a replica, or the one that there is."""
    n = dist.get_world_size()
    return Topology(n, n, min(n, 2))


def sharded(module: nn.Module) -> MiCSModule:
    root = shard(module, Groups.create(topology(), "cpu"))
    root.one_backward = True
    return root


def trained(root: MiCSModule, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(steps):
        root.window.begin(step)
        optimizer.zero_grad()
        loss = root(torch.randint(0, 13, (5,), generator=generator)).square().mean()
        with root.window.backward():
            loss.backward()
        root.window.close()
        optimizer.step()
        root.release()


def made(width: int = 8, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A module and its optimizer after some steps."""
    root = sharded(Model(width))
    optimizer = torch.optim.AdamW(root.parameters(), lr=1e-2)
    trained(root, optimizer, steps)
    return root.module, optimizer


def dump(module: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> dict[str, Any]:
    """What Lightning would hand to the strategy."""
    states = [optimizer_state_by_name(module, optimizer)]
    return {"state_dict": module.state_dict(), "optimizer_states": states, **more}


def saver(*, asynchronous: bool = False) -> Saver:
    return Saver(topology(), Writers.ALL, asynchronous=asynchronous)


def save(path: Path, dump: dict[str, Any], module: nn.Module, rng: dict[str, Any] | None = None) -> None:
    saver().save(path, dump, module, rng)
