"""What the tests of Accelerate's side share. It runs on a rank: the default process group is set up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mics.accelerate import MiCSAccelerator
from tests.distributed.toys import WIDTH, Layer, on_cpu, wholes


class Net(nn.Module):
    """Linear in, three layers, linear out."""

    def __init__(self, seed: int = 7, dropout: float = 0.0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.enter = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(3))
        self.leave = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)


def data(samples: int = 88, **options: Any) -> DataLoader[Any]:
    """Batches of two samples, the same on every rank until it is prepared."""
    x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(3))
    y = torch.tanh(x[:, :3].cumsum(1) + x[:, 3:6])
    return DataLoader(TensorDataset(x, y), batch_size=2, **options)


@contextmanager
def launched() -> Iterator[None]:
    """As a launcher starts ranks, and without what another accelerator has left in this process."""
    os.environ["RANK"] = str(dist.get_rank())
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size() if on_cpu() else 1)
    fresh()
    yield


def fresh() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def ours(partition_size: Any = 2, **options: Any) -> MiCSAccelerator:
    fresh()
    return MiCSAccelerator(partition_size, cpu=on_cpu(), **options)


def theirs(**options: Any) -> Accelerator:
    """Which is DDP on these ranks."""
    fresh()
    return Accelerator(cpu=on_cpu(), **options)


def parameters(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Full copies, by name."""
    return wholes(dict(accelerator.unwrap_model(model).named_parameters()))
