"""Over what they save or leave behind, a save and a load need the memory of a block at most.

Measured as the kernel counts it, in processes of their own. Blocks are larger than what the C library keeps back.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_mics import Topology, memory
from lightning_mics.checkpoint import Checkpoint, Saver, Writers, optimizer_state_by_name
from lightning_mics.groups import Groups
from lightning_mics.sharding import MiCSModule, shard
from tests.distributed.ranks import run_ranks

WIDTH, LAYERS, LINEARS = 768, 4, 4
BLOCK = LINEARS * WIDTH * (WIDTH + 1) * 4
CPU = torch.device("cpu")


class Model(nn.Module):
    """Blocks of 9.4 MB in four matrices: of 38 MB of parameters and 76 MB of state, a rank of two holds half."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LINEARS))) for _ in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def _made() -> tuple[MiCSModule, torch.optim.Optimizer]:
    root = shard(Model(), Groups.create(Topology(2, 2, 2), "cpu"))
    root.one_backward = True
    return root, torch.optim.AdamW(root.parameters(), foreach=False)


def _step(root: MiCSModule, optimizer: torch.optim.Optimizer) -> None:
    root.window.begin(None)
    optimizer.zero_grad()
    loss = root(torch.ones(1, WIDTH)).square().mean()
    with root.window.backward():
        loss.backward()
    root.window.close()
    optimizer.step()
    root.release()


def _save(path: Path, root: MiCSModule, optimizer: torch.optim.Optimizer) -> None:
    states = [optimizer_state_by_name(root.module, optimizer)]
    dump = {"state_dict": root.module.state_dict(), "optimizer_states": states}
    Saver(Topology(2, 2, 2), Writers.ALL, asynchronous=False).save(path, dump, root.module)


def _trim() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _growth_in_save(path: Path) -> int:
    root, optimizer = _made()
    _step(root, optimizer)
    _save(path, root, optimizer)  # what a process loads once is no save's
    _trim()
    before = memory.in_use(CPU)
    memory.reset_peak(CPU)
    _save(path, root, optimizer)
    return memory.peak(CPU) - before


def _growth_in_load(path: Path) -> int:
    """Over what is there afterwards: parameters and the optimizer's state, which there was none of before."""
    for _ in range(2):
        root, optimizer = _made()
        _trim()
        memory.reset_peak(CPU)
        Checkpoint(path).load(root.module, [optimizer])
        peak = memory.peak(CPU)
    _trim()
    return peak - memory.in_use(CPU)


def test_a_save_and_a_load_need_no_more_than_a_block(tmp_path: Path) -> None:
    assert max(run_ranks(2, _growth_in_save, tmp_path / "whole.ckpt")) < BLOCK
    assert max(run_ranks(2, _growth_in_load, tmp_path / "whole.ckpt")) < BLOCK
