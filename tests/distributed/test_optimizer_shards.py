"""Optimizer state over all ranks is the plain form with other memory: the same numbers, bytes and checkpoints.

With two replicas a sum has two terms, whose order does not matter, and everything is equal bit for bit. With r replicas
the plain form adds an element's r terms in the order that its place in the buffer gives, and so does this one with
another place: each sum is rounded r-1 times, so that two of them differ by at most 2 (r-1) eps times the sum of their
terms' sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics.groups import Groups
from lightning_mics.precision import Precision
from lightning_mics.sharding import MiCSModule, shard
from lightning_mics.topology import Topology
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import assert_close, optimizer_state, parameters

WIDTH, STEPS = 10, 4
FORMS = ("partition", "world")


class Block(nn.Module):
    """Rows that no number of ranks divides: ten, one and three."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.rand(1) + 0.5)
        self.shift = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.linear(x)) * self.scale
        return x + nn.functional.pad(self.shift, (0, WIDTH - 3))


class Net(nn.Module):
    """Blocks, what lies outside them, something frozen, and something that no rank uses."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.leave = nn.Linear(WIDTH, 5)
        self.unused = nn.Linear(WIDTH, 2)
        self.enter.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)


def batch_of(step: int, micro: int, dtype: torch.dtype = torch.float32) -> Tensor:
    seed = 10_000 * dist.get_rank() + 100 * step + micro
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    """Matrices decay, vectors do not."""
    groups = [[p for p in module.parameters() if (p.ndim > 1) == matrices] for matrices in (True, False)]
    return torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-2
    )


def build(
    partition_size: int, dtype: torch.dtype = torch.float32, precision: Precision | None = None, **options: Any
) -> MiCSModule:
    torch.manual_seed(0)
    n = dist.get_world_size()
    groups = Groups.create(Topology(n, n, partition_size), "cpu")
    root = shard(Net().to(dtype), groups, precision=precision or Precision(), **options)
    root.one_backward = True
    return root


def backward(root: MiCSModule, step: int, window: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """The micro-steps of a window, without the step; their losses."""
    root.window.begin(step)
    losses = []
    for micro in range(window):
        with nullcontext() if micro == window - 1 else root.window.hop_1_only():
            with torch.autocast("cpu", torch.bfloat16, enabled=root.precision.param_dtype is not None):
                loss = root(batch_of(step, micro, dtype)).square().mean()
            with root.window.backward():
                (loss / window).backward()
            losses.append(loss.item())
    root.window.close()
    return losses


def train(
    root: MiCSModule,
    form: str,
    window: int,
    make: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    dtype: torch.dtype = torch.float32,
    before_step: Callable[[torch.optim.Optimizer], object] = lambda optimizer: None,
) -> tuple[torch.optim.Optimizer, list[float]]:
    optimizer = make(root)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    if form == "world":
        root.shard_optimizer(optimizer)
    losses = []
    for step in range(STEPS):
        losses += backward(root, step, window, dtype)
        before_step(optimizer)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        root.release()
    root.finish_updates()
    return optimizer, losses


# -- the same numbers --------------------------------------------------------------------------------------------------


def _both(
    partition_size: int, atol: float, window: int = 2, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    found = []
    for form in FORMS:
        root = build(partition_size, dtype, **options)
        optimizer, losses = train(root, form, window, dtype=dtype)
        found.append((parameters(root.module), optimizer_state(optimizer), losses, optimizer))
    plain, world = found
    assert_close(world[0], plain[0], "parameters", atol)
    assert_close(world[1], plain[1], "optimizer state", atol)
    assert world[2] == pytest.approx(plain[2], rel=atol, abs=0.0)
    assert world[3].param_groups[0]["lr"] == plain[3].param_groups[0]["lr"]
    for optimizer in (plain[3], world[3]):  # what no rank used has no state; nor what is frozen
        assert len([*filter(None, optimizer.state.values())]) == len([*build(partition_size).parameters()]) - 3


FP32: list[dict[str, Any]] = [{"window": 1}, {"window": 4}]
OTHERS: list[dict[str, Any]] = [
    {"dtype": torch.bfloat16},
    {"dtype": torch.float64},
    {"precision": Precision(param_dtype=torch.bfloat16)},
    {"rung": "window/whole"},
]


def _each(partition_size: int, cases: list[dict[str, Any]]) -> None:
    for case in cases:
        _both(partition_size, 0.0, **case)


@pytest.mark.parametrize("cases", [FP32, OTHERS], ids=["fp32", "other dtypes, highest rung"])
@pytest.mark.parametrize(("n", "p"), [(4, 2), (2, 1)])
def test_two_replicas_are_equal_bit_for_bit(n: int, p: int, cases: list[dict[str, Any]]) -> None:
    run_ranks(n, _each, p, cases)


def _bounded() -> None:
    """Each rank's term of the first step's gradients is that of a module of its own."""
    torch.manual_seed(0)
    alone = Net()
    alone(batch_of(0, 0)).square().mean().backward()
    plain, world = build(1), build(1)
    optimizer = adamw(world)
    world.shard_optimizer(optimizer)
    for root in (plain, world):
        backward(root, 0, 1)
    assert all(param.grad is None for param in world.parameters())
    compared = 0
    for group, wanted in zip(optimizer.param_groups, adamw(plain).param_groups, strict=True):
        for piece, param in zip(group["params"], wanted["params"], strict=True):
            assert (piece.grad is None) == (param.grad is None)
            if piece.grad is None:
                continue
            name = next(name for name, p in plain.module.named_parameters() if p is param)
            sizes = alone.get_parameter(name).grad.abs()  # type: ignore[union-attr]
            dist.all_reduce(sizes)
            bound = 2 * 3 * torch.finfo(torch.float32).eps * sizes / 4
            assert ((piece.grad.full_tensor() - param.grad.full_tensor()).abs() <= bound).all(), name
            compared += 1
    assert compared == 4 * 3 + 3


def test_four_replicas_are_equal_within_the_rounding_of_a_sum() -> None:
    run_ranks(4, _bounded)
    run_ranks(4, _both, 1, 2e-3)


# -- memory ------------------------------------------------------------------------------------------------------------


def _state_elements(partition_size: int) -> tuple[int, int, bool]:
    """Elements of the state that a rank keeps in each form, and whether a piece is the shard's own memory."""
    counts, shared = [], False
    for form in FORMS:
        root = build(partition_size)
        optimizer, _ = train(root, form, 1)
        tensors = [v for fields in optimizer.state.values() for k, v in fields.items() if k != "step"]
        counts.append(sum(tensor.to_local().numel() for tensor in tensors))
        pieces = [piece for group in optimizer.param_groups for piece in group["params"]]
        memory = {param.to_local().untyped_storage().data_ptr() for param in root.parameters()}
        shared = all(piece.to_local().untyped_storage().data_ptr() in memory for piece in pieces)
    return *counts, shared  # type: ignore[return-value]


@pytest.mark.parametrize("p", [1, 2])
def test_each_replica_keeps_its_part_of_the_state(p: int) -> None:
    """All n ranks together keep two moments of each parameter once, where r replicas kept them r times."""
    found = run_ranks(4, _state_elements, p)
    trained = sum(param.numel() for name, param in Net().named_parameters() if "unused" not in name) - WIDTH
    assert sum(plain for plain, _, _ in found) == 2 * trained * (4 // p)
    assert sum(world for _, world, _ in found) == 2 * trained
    assert all(shared for _, _, shared in found)
