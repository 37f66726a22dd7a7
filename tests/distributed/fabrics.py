"""What the tests of Fabric share: a plain module, a loop as people write it, and Fabrics on this process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_mics import MiCSFabricStrategy
from tests.distributed.toys import WIDTH, Batch, Layer, batch_of, device, ranks_by_node

WINDOW = 3


class Net(nn.Module):
    """Linear in, three layers, linear out."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.enter = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.leave = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)


def seeded(make: Callable[[], nn.Module] = Net, seed: int = 7) -> Any:
    """A module with the same values on every rank and in every call."""
    torch.manual_seed(seed)
    return make().to(device())


def fabric(strategy: Any, precision: Any = None) -> Fabric:
    made = Fabric(strategy=strategy, precision=precision, **ranks_by_node())
    made.launch()
    return made


@cache
def mics(partition_size: Any = 2, *, precision: Any = None, **options: Any) -> Fabric:
    """One for all modules with the same options: its groups take longer to make than a module to train."""
    return fabric(MiCSFabricStrategy(partition_size, **options), precision)


@cache
def ddp(*, precision: Any = None, **options: Any) -> Fabric:
    return fabric(DDPStrategy(**options), precision)


def adamw(params: Iterator[nn.Parameter], lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr)


def set_up(fabric: Fabric, make: Callable[..., Any] = Net, *, optimizer: Callable[..., Any] = adamw) -> tuple[Any, Any]:
    module = seeded(make)
    return fabric.setup(module, optimizer(module.parameters()))


def loss_of(model: Any, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def micro_step(fabric: Fabric, model: Any, index: int, *, boundary: bool, window: int = WINDOW) -> float:
    with fabric.no_backward_sync(model, enabled=not boundary):
        loss = loss_of(model, batch_of(index, fabric.global_rank))
        fabric.backward(loss / window)
    return loss.item()


def train(
    fabric: Fabric,
    model: Any,
    optimizer: Any,
    *,
    windows: int = 3,
    first: int = 0,
    before_step: Callable[[], object] = lambda: None,
) -> list[float]:
    """The losses of some windows."""
    losses = []
    for window in range(first, first + windows):
        for step in range(WINDOW):
            index = window * WINDOW + step
            losses.append(micro_step(fabric, model, index, boundary=step == WINDOW - 1))
        before_step()
        optimizer.step()
        optimizer.zero_grad()
    return losses
