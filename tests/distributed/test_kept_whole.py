"""p = 1: parameters stay what they were, no engine stands between, and the numbers are DDP's and the plain loop's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_mics.groups import Groups
from lightning_mics.ladder import RUNGS, Rung
from lightning_mics.precision import Precision
from lightning_mics.sharding import MiCSModule, shard
from lightning_mics.topology import Topology
from tests.distributed.counting import collectives
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import Batches, Toy, assert_same_losses, ddp, mics, seeded, trainer

WIDTH = 8


def model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3))).to(dtype)


def data(micro: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * dist.get_rank() + micro)).to(dtype)


def whole(dtype: torch.dtype, rung: str = "block/sharded", **options: Any) -> MiCSModule:
    n = dist.get_world_size()
    root = shard(model(dtype), Groups.create(Topology(n, n, 1), "cpu"), blocks="Linear", rung=rung, **options)
    root.one_backward = True
    return root


def run_window(root: MiCSModule, key: int, micro_steps: int, dtype: torch.dtype) -> None:
    root.window.begin(key)
    for micro in range(micro_steps):
        loss = root(data(micro, dtype)).square().mean()
        if micro < micro_steps - 1:
            with root.window.hop_1_only(), root.window.backward():
                loss.backward()
        else:
            with root.window.backward():
                loss.backward()
    root.window.close()


def kinds() -> dict[str, Any]:
    root, before = whole(torch.float32), [type(each) for each in model(torch.float32).modules()]
    narrow = whole(torch.float32, precision=Precision(param_dtype=torch.bfloat16))
    return {
        "plain": not any(isinstance(p, DTensor) for p in root.parameters()),
        "classes": [type(each) for each in root.module.modules()] == before,
        "held": {rung: root.bytes_held().peak(Rung.parse(rung)) for rung in map(str, RUNGS)},
        "size": sum(p.nbytes for p in root.parameters()),
        "narrow": isinstance(narrow, FSDPModule) and all(isinstance(p, DTensor) for p in narrow.parameters()),
    }


def test_parameters_stay_what_they_were_unless_they_compute_in_another_dtype() -> None:
    for found in run_ranks(2, kinds):
        assert found["plain"] and found["classes"] and found["narrow"]
        assert set(found["held"].values()) == {2 * found["size"]}  # they and their gradients, on every rung


def alone(dtype: torch.dtype, micro_steps: int) -> tuple[list[bool], int]:
    """Whether each gradient of a window is a plain loop's; how many collectives there were."""
    root = whole(dtype)
    with collectives() as calls:
        for key in range(2):
            root.zero_grad()
            run_window(root, key, micro_steps, dtype)
    plain = model(dtype)
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in plain.parameters()]
    for micro in range(micro_steps):
        plain.zero_grad()
        plain(data(micro, dtype)).square().mean().backward()
        for total, param in zip(sums, plain.parameters(), strict=True):
            total += param.grad  # type: ignore[arg-type]
    gradients = [(p.grad, total.to(dtype)) for p, total in zip(root.parameters(), sums, strict=True)]
    return [a.dtype == b.dtype and torch.equal(a, b) for a, b in gradients], len(calls)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_steps", [1, 5])
def test_one_rank_computes_what_a_plain_loop_does_and_sends_nothing(dtype: torch.dtype, micro_steps: int) -> None:
    """bf16 gradients of a window are added in fp32 and rounded once."""
    assert run_ranks(1, alone, dtype, micro_steps) == [([True] * 6, 0)]


def unused() -> list[bool]:
    """Which parameters have a gradient after windows that use the second block on rank 1 only, and never the third."""
    root = whole(torch.float32)
    first, second, _ = root.module  # type: ignore[misc]
    root.module.forward = lambda x: second(first(x)) if dist.get_rank() else first(x)  # type: ignore[method-assign]
    run_window(root, 0, 2, torch.float32)
    return [p.grad is not None for p in root.parameters()]


@pytest.mark.parametrize(("ranks", "second"), [(1, False), (2, True)])
def test_what_no_rank_used_has_no_gradient(ranks: int, second: bool) -> None:
    assert run_ranks(ranks, unused) == [[True] * 2 + [second] * 2 + [False] * 2] * ranks


def traffic() -> list[tuple[str, int]]:
    root = whole(torch.float32)
    run_window(root, 0, 1, torch.float32)
    with collectives() as calls:
        run_window(root, 1, 4, torch.float32)
    sent = [call for call in calls if call.kind == "send"]
    assert sum(call.nbytes for call in sent if call.numel > 7) == root.wire_bytes(4).hop_2
    return [(kind, sum(call.kind == kind for call in calls)) for kind in ("all_gather", "reduce_scatter", "all_reduce")]


def test_hop_2_is_all_that_is_sent_and_once_a_window() -> None:
    """In messages; the seven numbers of parameters' usage and the budget travel along."""
    assert run_ranks(2, traffic) == [[("all_gather", 0), ("reduce_scatter", 0), ("all_reduce", 0)]] * 2


def trained(precision: str) -> tuple[list[float], list[float]]:
    losses = []
    for strategy in (mics(1), ddp()):
        toy = seeded(Toy)
        trainer(strategy, precision=precision, accumulate_grad_batches=2).fit(toy, Batches(6))
        losses.append(toy.losses)
    return losses[0], losses[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_a_trainer_computes_what_ddp_does(precision: str) -> None:
    """To the bit, autocast and all: two ranks' gradients have one sum."""
    for ours, theirs in run_ranks(2, trained, precision):
        assert len({*ours}) == 6 and all(a != b for a, b in pairwise(ours))
        assert_same_losses(ours, theirs, precision)
