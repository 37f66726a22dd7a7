"""Measured: the figures of the device at hand, by operators that are timed while all ranks run them at once.

What ranks share, as the cores of a node, is in the figures then: a `Compute` of such a device has `sharing=1`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from lightning_mics import memory
from lightning_mics._compat import TorchDispatchMode
from lightning_mics.planner.block_call import BlockCall
from lightning_mics.planner.compute import Compute, Operator
from lightning_mics.planner.hardware import Device

_ROUNDS = 7  # over all figures, so that a disturbance hits one round of several, not all rounds of one
_SECONDS_OF_A_SAMPLE = 0.1  # longer than the turns that an operating system gives to ranks that share a core
_CPU_ROWS, _ROWS = 512, 8192  # of a product's matrices
_CPU_BYTES, _BYTES = 1 << 26, 1 << 30  # that are copied; more than caches hold
_NEXT_TO_NOTHING = 1e-9  # seconds
_SECONDS_BUSY = 0.5
_CPU = torch.device("cpu")


def measure(device: torch.device, ranks_per_node: int, block: BlockCall | None = None) -> Device:
    """What this device reaches, with all ranks of the default group at work.

    Collective on the default group: a barrier before each sample, and an all-reduce of two numbers behind it.

    Args:
        device: this rank's.
        ranks_per_node: ranks on each node, which share its memory if they compute on CPU.
        block: of the model that is trained, on this device, which tells what its operators take beside their rooflines;
            by default one with next to nothing to compute.

    Returns:
        The same on every rank: medians, on CPU of what all ranks do together, else of the slowest rank. Shares of the
        peaks are 1, as what is measured is what is reached.
    """
    block = block or BlockCall.tiny(device)
    works: dict[str, tuple[Callable[[], object], float]] = {
        _name(dtype): _product(dtype, device) for dtype in _dtypes(device)
    }
    works["copy"] = _copy(device)
    works["block"] = (block.run, 0.0)
    for work, _ in works.values():
        _seconds(work, device)  # what it needs is made, and touched
    rounds = [{name: _seconds(work, device) for name, (work, _) in works.items()} for _ in range(_ROUNDS)]
    seconds = {name: median(each[name] for each in rounds) for name in works}
    rest = Device(
        name="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        memory_bytes=-_most(-memory.total(device, ranks_per_node), device),
        memory_bandwidth=works["copy"][1] / seconds["copy"],
        peak_flops={_name(dtype): works[_name(dtype)][1] / seconds[_name(dtype)] for dtype in _dtypes(device)},
        processors=1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count,
    )
    block.drop_gradients()  # adding up is not an operator of the trace's
    return replace(rest, kernel=_beside(seconds["block"], _recorded(block.run), rest))


def busy() -> float:
    """Seconds that pass for one of a processor's, with all CPU ranks of the default group at work. Collective on it."""
    work, _ = _product(torch.float32, _CPU)
    dist.barrier()
    start, own = time.perf_counter(), time.thread_time()
    while time.perf_counter() - start < _SECONDS_BUSY:
        work()
    return max(1.0, _ratio(time.perf_counter() - start, time.thread_time() - own))


class _Recorder(TorchDispatchMode):
    """Records operators as the trace of a micro-step does."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (operator := Operator.of(func, args, kwargs or {}, result)) is not None:
            self.operators.append(operator)
        return result


def _recorded(work: Callable[[], object]) -> list[Operator]:
    recorder = _Recorder()
    with recorder:
        work()
    return recorder.operators


def _beside(seconds: float, operators: Sequence[Operator], device: Device) -> float:
    """Of each of these operators, what is left of their `seconds` where a roofline tells the rest."""
    rooflines = Compute(replace(device, kernel=_NEXT_TO_NOTHING)).seconds(operators)
    return max(_NEXT_TO_NOTHING, (seconds - rooflines) / len(operators))


def _dtypes(device: torch.device) -> Iterable[torch.dtype]:
    return (torch.float32,) if device.type == "cpu" else (torch.float32, torch.float16, torch.bfloat16)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def _product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], float]:
    """A product, and its floating-point operations."""
    rows = _CPU_ROWS if device.type == "cpu" else _ROWS
    left, right, out = (torch.ones(rows, rows, dtype=dtype, device=device) for _ in range(3))
    return lambda: torch.mm(left, right, out=out), 2.0 * rows**3


def _copy(device: torch.device) -> tuple[Callable[[], object], float]:
    """A copy, and the bytes that it reads and writes."""
    nbytes = _CPU_BYTES if device.type == "cpu" else _BYTES
    source, target = (torch.ones(nbytes // 4, device=device) for _ in range(2))
    return lambda: target.copy_(source), 2.0 * nbytes


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one, with all ranks at work as long as it is measured. The same on every rank."""
    dist.barrier()
    if device.type == "cpu":  # which ranks may share unevenly, so that what counts is what all have done together
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < _SECONDS_OF_A_SAMPLE:
            work()
            done += 1
        return _ratio(time.perf_counter() - start, done)
    once = _most(_synchronized(work, 2, device), device)
    return _most(_synchronized(work, max(1, int(_SECONDS_OF_A_SAMPLE / once)), device), device)


def _synchronized(work: Callable[[], object], count: int, device: torch.device) -> float:
    torch.accelerator.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        work()
    torch.accelerator.synchronize(device)
    return (time.perf_counter() - start) / count


def _ratio(above: float, below: float) -> float:
    """Of the sums over all ranks."""
    both = torch.tensor([above, below], dtype=torch.float64)
    dist.all_reduce(both)
    return (both[0] / both[1]).item()


def _most(figure: float, device: torch.device) -> float:
    """Of all ranks'."""
    most = torch.tensor(figure, dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()
