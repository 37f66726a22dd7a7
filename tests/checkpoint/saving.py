"""A checkpoint made in the test's own process, of any module and without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_mics.checkpoint import Checkpoint, Snapshot, optimizer_state_by_name
from lightning_mics.topology import Topology


def save_alone(path: Path, module: nn.Module, **rest: Any) -> None:
    """Save `module`, an Adam for it that has taken no step but has state, and the rest, as the one rank there is."""
    optimizer = torch.optim.Adam(module.parameters())
    for param in module.parameters():
        optimizer.state[param] = {"exp_avg": torch.ones_like(param)}
    states = [optimizer_state_by_name(module, optimizer)]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dump = {"state_dict": module.state_dict(), "optimizer_states": states, **rest}
        Checkpoint(path).write(Snapshot.take(dump, module, Topology(1, 1, 1)))
    finally:
        dist.destroy_process_group()
