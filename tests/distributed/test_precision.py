"""What travels in which dtype, and what is summed in which."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics.groups import Groups
from lightning_mics.precision import Precision
from lightning_mics.sharding import MiCSModule, shard
from lightning_mics.topology import Topology
from tests.distributed.counting import collectives
from tests.distributed.ranks import run_ranks
from tests.distributed.test_wire import traffic

WIDTH, MICRO_STEPS = 8, 64


def build(dtype: torch.dtype, precision: Precision) -> MiCSModule:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))).to(dtype)
    n = dist.get_world_size()
    root = shard(model, Groups.create(Topology(n, n, 2), "cpu"), precision=precision)
    root.one_backward = True
    return root


def data(rank: int, micro: int, dtype: torch.dtype) -> Tensor:
    """Positive, so that gradients keep their sign and a sum grows until 16 bits no longer see what is added."""
    return torch.rand(4, WIDTH, generator=torch.Generator().manual_seed(100 * rank + micro)).to(dtype)


def window(root: MiCSModule, dtype: torch.dtype) -> list[Tensor]:
    """The whole gradients of a window of many micro-steps, and one micro-step's as rounding leaves each."""
    for micro in range(MICRO_STEPS):
        with root.window.hop_1_only() if micro < MICRO_STEPS - 1 else nullcontext():
            loss = root(data(dist.get_rank(), micro, dtype)).sum()
            with root.window.backward():
                loss.backward()
    sums = [p.grad.full_tensor() for p in root.module.parameters()]  # type: ignore[union-attr]
    root.window.close()
    return sums


def error_of_sums(dtype: torch.dtype, reduce_dtype: torch.dtype | None) -> tuple[float, str, str]:
    """Relative error of the window's sums against fp64 sums of the same 16-bit gradients; dtypes before and after."""
    root = build(dtype, Precision(reduce_dtype=reduce_dtype))
    sums = window(root, dtype)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))).to(dtype)
    exact = [torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()]
    for rank in range(dist.get_world_size()):
        for micro in range(MICRO_STEPS):
            grads = torch.autograd.grad(model(data(rank, micro, dtype)).sum(), list(model.parameters()))
            for total, grad in zip(exact, grads, strict=True):
                total += grad.double() / dist.get_world_size()
    error = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(sums, exact, strict=True))
    after = {str(p.grad.dtype) for p in root.module.parameters() if p.grad is not None}
    return error, str(sums[0].dtype), *after  # type: ignore[return-value]


def test_sums_of_16_bit_parameters_are_fp32() -> None:
    """64 micro-steps in bf16: summed in fp32 the error stays that of rounding one term; in bf16 it grows."""
    fp32 = run_ranks(4, error_of_sums, torch.bfloat16, None)[0]
    bf16 = run_ranks(4, error_of_sums, torch.bfloat16, torch.bfloat16)[0]
    assert fp32[1:] == ("torch.float32", "torch.bfloat16")  # fp32 in the window, the optimizer's own after it
    assert bf16[1:] == ("torch.bfloat16", "torch.bfloat16")
    assert fp32[0] < 5e-4 < 2e-3 < bf16[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_wide_parameters_are_their_own(dtype: torch.dtype) -> None:
    error, during, after = run_ranks(4, error_of_sums, dtype, None)[0]
    assert during == after == str(dtype)
    assert error < {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]


def wire(own: torch.dtype, precision: Precision, mixed: bool) -> dict[str, set[torch.dtype]]:
    """Dtypes of a micro-step's messages, by kind of traffic, and of everything else, by its own kind."""
    root = build(own, precision)
    with collectives() as calls:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = root(data(dist.get_rank(), 0, own)).sum()
        with root.window.backward():
            loss.backward()
        root.window.close()
    assert {p.dtype for p in root.parameters()} == {own}
    kinds: defaultdict[str, set[torch.dtype]] = defaultdict(set)
    for call in calls:
        kinds[traffic(root.groups)[call.group] if call.kind == "send" else call.kind].add(call.dtype)
    return dict(kinds)


@pytest.mark.parametrize(
    ("own", "precision", "mixed"),
    [
        pytest.param(torch.float32, Precision(param_dtype=torch.bfloat16), True, id="bf16-mixed"),
        pytest.param(torch.bfloat16, Precision(), False, id="bf16-true"),
    ],
)
def test_16_bits_are_gathered_and_32_reduced(own: torch.dtype, precision: Precision, mixed: bool) -> None:
    fp32 = {torch.float32}
    for kinds in run_ranks(4, wire, own, precision, mixed):
        assert kinds == {"gather": {torch.bfloat16}, "hop 1": fp32, "hop 2": fp32, "all_reduce": fp32}


@pytest.mark.parametrize("value", ["bf16", torch.int64])
def test_a_dtype_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"param_dtype=.* must be a floating-point torch.dtype"):
        Precision(param_dtype=value)  # type: ignore[arg-type]
