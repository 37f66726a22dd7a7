"""What the Trainer-level tests share: a small module, data that each rank can name, a quiet Trainer, and comparisons.

The functions here run on a rank: the default process group is set up.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_mics import MiCSStrategy
from tests.distributed.ranks import DEVICE

WIDTH = 12

Batch = tuple[Tensor, Tensor]
Key = TypeVar("Key")


def device() -> torch.device:
    """What ranks compute on."""
    return torch.device(os.environ.get(DEVICE, "cpu"))


def on_cpu() -> bool:
    """Whether they compute on CPU; otherwise each is a node, and all share the device."""
    return device().type == "cpu"


def ranks_by_node() -> dict[str, Any]:
    """For a Trainer or a Fabric: the CPU that ranks share as one node's, or an accelerator, each as a node's own."""
    ranks = dist.get_world_size()
    return {"accelerator": device().type} | ({"devices": ranks} if on_cpu() else {"devices": 1, "num_nodes": ranks})


def batch_of(index: int, rank: int, size: int = 2) -> Batch:
    """The batch of a micro-step on a rank: the same numbers wherever it is asked for."""
    generator = torch.Generator().manual_seed(1000 * index + rank)
    x = torch.randn(size, 8, generator=generator).to(device())
    return x, torch.tanh(x[:, :3].cumsum(1) + x[:, 3:6])


class Batches:
    """A loader of this rank's batches that resumes where it stood; `skip` are indices at which it yields None."""

    def __init__(self, count: int, skip: Collection[int] = (), first: int = 0) -> None:
        self.count, self.skip, self.first = count, skip, first
        self.given = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch | None]:
        if self.given >= self.count:
            self.given = 0
        while self.given < self.count:
            self.given += 1
            index = self.first + self.given - 1
            yield None if index in self.skip else batch_of(index, dist.get_rank())

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


class Eager(DataLoader[Any]):
    """Fetches its first batch when it is asked for an iterator, as loaders with workers do."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return chain([next(batches)], batches)


class Layer(nn.Module):
    """A residual layer, the repeated block of `Toy`."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(self.norm(x))))


class Toy(pl.LightningModule):
    """Linear in, three layers, linear out; keeps the loss of each micro-step and of each validation batch."""

    def __init__(self, *, dropout: float = 0.0, lr: float = 1e-2) -> None:
        super().__init__()
        self.lr = lr
        self.enter = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(3))
        self.leave = nn.Linear(WIDTH, 3)
        self.losses: list[float] = []
        self.validated: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(self.loss(batch).item())

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def seeded(cls: type[Toy], seed: int = 7, **options: Any) -> Any:
    """`cls(**options)` with the same values on every rank and in every call."""
    torch.manual_seed(seed)
    return cls(**options).to(device())


def trainer(strategy: Any, **options: Any) -> pl.Trainer:
    """A Trainer on this process group that writes and prints nothing unless told."""
    quiet: dict[str, Any] = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(strategy=strategy, **(ranks_by_node() | quiet | options))


def mics(partition_size: int = 2, **options: Any) -> MiCSStrategy:
    return MiCSStrategy(partition_size=partition_size, **options)


def ddp() -> DDPStrategy:
    return DDPStrategy(find_unused_parameters=True)


def whole(tensor: Tensor) -> Tensor:
    """A copy of the full tensor, gathered if it is sharded by rows."""
    return wholes({"": tensor})[""]


def wholes(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Copies of full tensors; those that are sharded by rows over one mesh are gathered together.

    Then not by `full_tensor()`: two of its all-gathers that end at once on one gloo group write one string of torch's
    without a lock (2.13, `lastCompletedWorkName`), and of thousands of tests one dies of memory that is freed twice.
    """
    found, meshes = dict(tensors), defaultdict[Any, list[Key]](list)
    for key, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            found[key] = tensor.detach().clone()
        elif all(placement.is_shard(0) for placement in tensor.placements):
            meshes[tensor.device_mesh].append(key)
        else:
            found[key] = tensor.full_tensor().detach().clone()
    for mesh, keys in meshes.items():
        found.update(zip(keys, _gathered(mesh, [tensors[key] for key in keys]), strict=True))
    return found


def _gathered(mesh: Any, tensors: list[Tensor]) -> Iterator[Tensor]:
    ranks = mesh.mesh.flatten().tolist()
    parts: list[Any] = [None] * len(ranks)
    group = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
    dist.all_gather_object(parts, [local(tensor).cpu() for tensor in tensors], group)
    in_order = [parts[dist.get_group_rank(group, rank)] for rank in ranks]
    return (torch.cat(shards).to(tensor.device) for tensor, *shards in zip(tensors, *in_order, strict=True))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: all of it, if it is not sharded."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """Full copies of a module's parameters, by name."""
    return wholes(dict(module.named_parameters()))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """Full copies of an optimizer's state, by the parameter's number and the field."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return wholes({(i, key): value for i, p in enumerate(params) for key, value in optimizer.state[p].items()})


def assert_close(actual: Mapping[Any, Tensor], expected: Mapping[Any, Tensor], what: str, atol: float = 0.0) -> None:
    """The same names, and every tensor within `atol` (bit for bit by default)."""
    if actual.keys() != expected.keys():
        raise AssertionError(f"{what}: {sorted(map(str, actual.keys() ^ expected.keys()))} on one side only")
    far = {key: (actual[key].cpu() - expected[key].cpu()).abs().max().item() for key in actual}
    worst = max(far, key=lambda key: far[key])
    if not far[worst] <= atol:
        raise AssertionError(f"{what}: {worst} differs by {far[worst]:.3g}, allowed {atol}")


def assert_same_losses(actual: list[float], expected: list[float], what: str, rtol: float = 0.0) -> None:
    """As many, and each within `rtol` (bit for bit by default)."""
    if len(actual) != len(expected):
        raise AssertionError(f"{what}: {len(actual)} losses, expected {len(expected)}")
    for step, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if not abs(a - b) <= rtol * abs(b):
            raise AssertionError(f"{what}: loss {step} is {a!r}, expected {b!r}, relative {abs(a - b) / abs(b):.3g}")


def assert_same_training(actual: Toy, expected: Toy, what: str, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    """Losses of every micro-step and validation batch within `rtol`, parameters within `atol`."""
    assert_same_losses(actual.losses, expected.losses, what, rtol)
    assert_same_losses(actual.validated, expected.validated, f"{what}, validation", rtol)
    assert_close(parameters(actual), parameters(expected), what, atol)
