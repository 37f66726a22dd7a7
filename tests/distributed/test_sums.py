"""Hop 1 adds a micro-step's gradients to the window's sums where these lie, and loses none that a user has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics.comms import HopOne
from lightning_mics.groups import Groups
from lightning_mics.precision import Precision
from lightning_mics.sharding import MiCSModule, shard
from lightning_mics.topology import Topology
from tests.distributed.ranks import run_ranks

WIDTH = 5  # rows that two ranks have to pad
TOPOLOGY = Topology(4, 4, 2)


class Either(nn.Module):
    """Computes with one of two layers, which have the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, first: bool) -> Tensor:
        return torch.tanh((self.one if first else self.other)(x))


class Net(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Either() for _ in range(2))

    def forward(self, x: Tensor, first: bool = True, second: bool = True) -> Tensor:
        total = x
        for layer in self.layers:
            total = sum((layer(total, chosen) for chosen in {first, second}), total)
        return total.square().sum()


def model() -> Net:
    torch.manual_seed(0)
    return Net()


def data(rank: int, micro_step: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * rank + micro_step))


def means(micro_step: int, *path: bool) -> list[Tensor]:
    """The mean gradients over this rank's partition group, by autograd alone; zeros where there is none."""
    plain = model()
    group = TOPOLOGY.partition_groups[TOPOLOGY.replica_of(dist.get_rank())]
    for rank in group:
        (plain(data(rank, micro_step), *path) / len(group)).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in plain.parameters()]


def backward(root: MiCSModule, micro_step: int, *path: bool) -> None:
    with root.window.hop_1_only():
        loss = root(data(dist.get_rank(), micro_step), *path)
        with root.window.backward():
            loss.backward()


def sharded(one_backward: bool = True, **options: Any) -> tuple[MiCSModule, list[nn.Parameter]]:
    root = shard(model(), Groups.create(TOPOLOGY, "cpu"), blocks=Either, **options)
    root.one_backward = one_backward
    root.window.begin(0)
    return root, list(root.module.parameters())


Change = Callable[[nn.Parameter, Tensor], Tensor]


def doubled(param: nn.Parameter, so_far: Tensor) -> Tensor:
    param.grad = param.grad * 2  # type: ignore[operator]
    return so_far * 2


def scaled_in_place(param: nn.Parameter, so_far: Tensor) -> Tensor:
    param.grad.mul_(3)  # type: ignore[union-attr]
    return so_far * 3


def cleared(param: nn.Parameter, so_far: Tensor) -> Tensor:
    param.grad = None
    return torch.zeros_like(so_far)


def _changed(change: Change) -> None:
    """One parameter's sum is changed after two micro-steps of three."""
    for changed in range(4):
        root, params = sharded()
        for micro_step in range(2):
            backward(root, micro_step, True, False)
        wanted = [a + b for a, b in zip(means(0, True, False), means(1, True, False), strict=True)]
        wanted[changed] = change(params[changed], wanted[changed])
        backward(root, 2, True, False)
        for param, total, last in zip(params, wanted, means(2, True, False), strict=True):
            torch.testing.assert_close(param.grad.full_tensor(), total + last)  # type: ignore[union-attr]
        root.window.drop()


@pytest.mark.parametrize("change", [doubled, scaled_in_place, cleared])
def test_a_sum_that_was_changed_is_added_to_as_it_is(change: Change) -> None:
    run_ranks(4, _changed, change)


def _frozen() -> None:
    root, params = sharded()
    params[3].requires_grad_(False)
    backward(root, 0, True, False)
    params[1].requires_grad_(False)
    params[3].requires_grad_(True)
    backward(root, 1, True, False)
    first, second = means(0, True, False), means(1, True, False)
    wanted = [first[i] if i == 1 else second[i] if i == 3 else first[i] + second[i] for i in range(len(params))]
    for param, total in zip(params, wanted, strict=True):
        torch.testing.assert_close(param.grad.full_tensor(), total)  # type: ignore[union-attr]


def test_a_sum_stays_where_a_parameter_was_frozen_and_another_of_its_size_trains_instead() -> None:
    run_ranks(4, _frozen)


def _in_place() -> None:
    root, params = sharded()
    outputs: list[int] = []

    def noted(self: HopOne, output_tensor: Tensor, **others: Any) -> None:
        outputs.append(output_tensor.data_ptr())
        take(self, output_tensor, **others)

    take = HopOne.__call__
    with patch.object(HopOne, "__call__", noted):
        for micro_step in range(3):
            backward(root, micro_step, True, False)
    firsts = {p.grad.to_local().data_ptr() for p in (params[0], params[4])}  # type: ignore[union-attr]
    assert {*outputs} == firsts  # each block's, in the first micro-step as well


def test_the_engine_is_given_the_memory_of_the_sums() -> None:
    run_ranks(4, _in_place)


def _taking_turns() -> None:
    root, params = sharded(one_backward=False)
    backward(root, 0, True, True)
    backward(root, 1, False, False)
    wanted = [a + b for a, b in zip(means(0, True, True), means(1, False, False), strict=True)]
    for param, total in zip(params, wanted, strict=True):
        torch.testing.assert_close(param.grad.full_tensor(), total)  # type: ignore[union-attr]


def test_parameters_of_one_size_that_take_turns_in_manual_optimization_keep_their_own_sums() -> None:
    run_ranks(4, _taking_turns)


# -- held whole --------------------------------------------------------------------------------------------------------


def _held(rung: str, dtype: torch.dtype | None) -> None:
    """Dropped, taken along by the boundary's backward, and reduced without one."""
    for end in ("dropped", "taken along", "reduced alone"):
        root, params = sharded(rung=rung, precision=Precision(param_dtype=dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            for micro_step in range(2):
                backward(root, micro_step, True, False)
                assert all(p.grad is None for p in params)
            if end == "dropped":
                root.window.drop()
            if end != "reduced alone":
                loss = root(data(dist.get_rank(), 2), True, False)
                with root.window.backward():
                    loss.backward()
        root.window.close()
        micro_steps = {"dropped": [2], "taken along": [0, 1, 2], "reduced alone": [0, 1]}[end]
        parts = [torch.stack(each).sum(0) for each in zip(*(means(i, True, False) for i in micro_steps), strict=True)]
        for param, mine in zip(params, parts, strict=True):
            dist.all_reduce(mine)  # of this rank's partition group; p ranks of each add it
            wanted = mine / dist.get_world_size()
            tolerance = {} if dtype is None else {"rtol": 0.05, "atol": 0.05 * float(wanted.abs().max())}
            torch.testing.assert_close(param.grad.full_tensor(), wanted, **tolerance)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("rung", ["block/whole", "micro_step/whole", "window/whole"])
def test_what_is_held_whole_is_dropped_or_taken_along_or_reduced_without_a_backward(
    rung: str, dtype: torch.dtype | None
) -> None:
    run_ranks(4, _held, rung, dtype)
