"""A block that is not used, in one micro-step, on one rank, or in the last micro-step, still gets its right gradient.

The reference is one process that sums, by hand, what every rank's own path through the model gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics import repeats
from lightning_mics.groups import Groups
from lightning_mics.sharding import MiCSModule, shard
from lightning_mics.topology import Topology
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import whole

WIDTH, BLOCKS = 6, 4

# (rank, micro-step) -> the blocks that run, in order.
Plan = Callable[[int, int], Sequence[int]]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Skipping(nn.Module):
    """Runs the blocks that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, path: Sequence[int]) -> Tensor:
        x = self.embed(x)
        for index in path:
            x = self.layers[index](x)
        return self.head(x).square().mean()


PLANS: dict[str, Plan] = {
    "all": lambda rank, micro: range(BLOCKS),
    "not in one micro-step": lambda rank, micro: [0, 1, 3] if micro == 1 else range(BLOCKS),
    "not in the last micro-step": lambda rank, micro: [0, 1, 3] if micro == 2 else range(BLOCKS),
    "not on one rank": lambda rank, micro: [0, 3] if rank == 1 else range(BLOCKS),
    "not on one rank in the last micro-step": lambda rank, micro: [1, 2] if rank == 2 and micro == 2 else range(BLOCKS),
    "the first and the last block on one rank": lambda rank, micro: [1, 2] if rank == 3 else range(BLOCKS),
    "another on each rank": lambda rank, micro: [b for b in range(BLOCKS) if b != rank],
    "no block on one rank": lambda rank, micro: [] if rank == 0 else range(BLOCKS),
    "one never, anywhere": lambda rank, micro: [0, 1, 3],
    "one twice": lambda rank, micro: [0, 1, 1, 2, 3],
    "back and forth": lambda rank, micro: [3, 2, 1, 0, 2],
}


def data(rank: int, micro: int) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(10 * rank + micro))


def by_hand(plan: Plan, micro_steps: int) -> dict[str, Tensor | None]:
    """The mean gradient over ranks of the sum over micro-steps."""
    model = Skipping()
    for rank in range(dist.get_world_size()):
        for micro in range(micro_steps):
            (model(data(rank, micro), plan(rank, micro)) / dist.get_world_size()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def run_window(root: MiCSModule, plan: Plan, micro_steps: int, key: object) -> None:
    root.window.begin(key)
    for micro in range(micro_steps):
        boundary = micro == micro_steps - 1
        with nullcontext() if boundary else root.window.hop_1_only():
            loss = root(data(dist.get_rank(), micro), plan(dist.get_rank(), micro))
            with root.window.backward():
                loss.backward()
    root.window.close()


def differences(partition_size: int, activation_checkpointing: bool) -> dict[str, str]:
    """What is wrong, for each plan."""
    n = dist.get_world_size()
    groups = Groups.create(Topology(n, n, partition_size), "cpu")
    root = shard(Skipping(), groups, activation_checkpointing=activation_checkpointing)
    root.one_backward = True
    wrong = {}
    for what, plan in PLANS.items():
        run_window(root, plan, 3, key=what)
        expected = by_hand(plan, 3)
        for name, param in root.module.named_parameters():
            mine = None if param.grad is None else whole(param.grad)
            theirs = expected[name]
            if (mine is None) != (theirs is None):
                wrong[what] = f"{name}: {mine} for {theirs}"
            elif mine is not None and not torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7):
                wrong[what] = f"{name}: off by {(mine - theirs).abs().max():.2g}"
    return wrong


@pytest.mark.parametrize("partition_size", [1, 2, 4])
def test_every_path_gets_its_gradient(partition_size: int) -> None:
    assert run_ranks(4, differences, partition_size, False) == [{}] * 4


def test_recomputing_a_block_is_not_another_call() -> None:
    assert run_ranks(4, differences, 2, True) == [{}] * 4


def repeat(paths: dict[int, Sequence[int]]) -> None:
    repeats.PATIENCE = timedelta(seconds=3)
    root = shard(Skipping(), Groups.create(Topology(2, 2, 2), "cpu"))
    root.one_backward = True
    path = paths[dist.get_rank()]
    for micro in range(2):
        loss = root(data(0, micro), path)
        with root.window.backward():
            loss.backward()


@pytest.mark.parametrize(
    ("paths", "which"),
    [
        ({0: [0, 1, 1, 2, 3], 1: range(BLOCKS)}, r"rank 0:(.*\n)*.*layers\.1 runs again .*, and does not on another"),
        ({0: range(BLOCKS), 1: [0, 1, 2, 3, 0]}, r"rank 1:(.*\n)*.*layers\.0 runs again .*, and does not on another"),
        ({0: [0, 0, 1, 2, 3], 1: [0, 1, 1, 2, 3]}, r"runs again .*, and another one does on another"),
    ],
)
def test_a_block_that_runs_again_on_some_ranks_is_an_error(paths: dict[int, Sequence[int]], which: str) -> None:
    """Else the next block's gather is taken for it, and in the end a rank waits for one that never comes."""
    with pytest.raises(AssertionError, match=which):
        run_ranks(2, repeat, paths, grace=0.1, timeout=120)


class Silent(Skipping):
    """Returns nothing, and on rank 0 runs nothing."""

    def forward(self, x: Tensor, path: Sequence[int]) -> Tensor:
        if dist.get_rank() > 0:
            super().forward(x, path)
        return None  # type: ignore[return-value]


def run_without_output() -> None:
    n = dist.get_world_size()
    root = shard(Silent(), Groups.create(Topology(n, n, 2), "cpu"))
    root.one_backward = True
    with torch.no_grad():
        assert root(data(0, 0), range(BLOCKS)) is None
    # ranks that were one gather apart would pair different collectives from here on
    run_window_of_nothing(root)


def run_window_of_nothing(root: MiCSModule) -> None:
    root.window.begin("nothing")
    root.window.close()
    assert all(p.grad is None for p in root.parameters())


def test_a_forward_without_output_keeps_ranks_in_step() -> None:
    run_ranks(4, run_without_output)


def evaluate() -> tuple[float, float]:
    """A loss without gradients on paths that differ between ranks, and the same of an unsharded model."""
    n = dist.get_world_size()
    root = shard(Skipping(), Groups.create(Topology(n, n, 2), "cpu"))
    root.one_backward = True
    path = PLANS["another on each rank"](dist.get_rank(), 0)
    with torch.no_grad():
        losses = [m(data(dist.get_rank(), 0), path).item() for m in (root.eval(), Skipping().eval())]
    return losses[0], losses[1]


def test_ranks_stay_in_step_in_evaluation() -> None:
    for sharded, plain in run_ranks(4, evaluate):
        assert sharded == pytest.approx(plain, rel=1e-6)


def evaluate_then_train(mode: type[torch.no_grad] | type[torch.inference_mode]) -> list[float]:
    n = dist.get_world_size()
    root = shard(Skipping(), Groups.create(Topology(n, n, 2), "cpu"))
    root.one_backward = True
    with mode():
        root(data(0, 0), range(BLOCKS))
    run_window(root, PLANS["all"], 2, key=0)
    return [whole(p.grad).norm().item() for p in root.module.parameters() if p.grad is not None]


def test_training_goes_on_after_inference_mode() -> None:
    """Lightning evaluates in inference mode wherever the backend is not gloo."""
    assert run_ranks(4, evaluate_then_train, torch.inference_mode) == run_ranks(4, evaluate_then_train, torch.no_grad)


def overlap(partition_size: int) -> tuple[list[str], list[str]]:
    """What was handed to hop 2 in a boundary's backward when autograd was through, and what in the whole of it."""
    n, model = dist.get_world_size(), Skipping()
    if partition_size == 1:  # no engine makes zeros for what is unused, and its block waits for backward's end
        for layer in model.layers:
            del layer.unused
    root = shard(model, Groups.create(Topology(n, n, partition_size), "cpu"))
    root.one_backward = True
    assert root.wire.hop_2 is not None
    log = root.wire.hop_2.channel.log = []
    root.window.begin(0)
    loss = root(data(0, 0), range(BLOCKS))
    with root.window.backward():
        loss.backward()
        begun = [transfer.what for transfer in log]
    assert all(transfer.is_completed() for transfer in log)
    return begun, [transfer.what for transfer in log]


@pytest.mark.parametrize("partition_size", [1, 2])
def test_hop_2_of_a_block_starts_before_backward_ends(partition_size: int) -> None:
    blocks = [f"hop 2 of layers.{index}" for index in reversed(range(BLOCKS))]
    for begun, all_of_it in run_ranks(4, overlap, partition_size):
        assert begun == blocks
        assert all_of_it == [*blocks, "hop 2 of parameters' usage", "hop 2 of what lies outside the blocks"]
