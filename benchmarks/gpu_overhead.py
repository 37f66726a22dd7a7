"""Overhead: what lightning-mics costs on one GPU, where it has nothing to send.

    python -m benchmarks.gpu_overhead                                # all cases, then the exercise: one GPU, minutes
    python -m benchmarks.gpu_overhead --device cpu --case "tiny bert"    # the same without a GPU, to see that it runs

A plain PyTorch loop, Lightning's single-device strategy and `strategy="mics"` train the same model in one run and take
turns. Their losses are compared before a time is told. `benchmarks.gpu_exercise` follows: several processes on the one
device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import gpu_exercise, one_device
from benchmarks.gpu_cases import CASES, TINY, Case, peak_flops
from benchmarks.gpu_ways import PLAIN, WAYS, Way
from benchmarks.results import about
from benchmarks.stepped import quiet
from lightning_mics import memory

LOSS_BOUND = 2.0**-7
"""How far a step's loss may be from the plain loop's, relative: as far as neighbours in bf16, in which it is."""

_FOLDER = Path(__file__).parent / "results"


class LossesDiffer(RuntimeError):
    """A way to train came to another loss than the plain loop; its times mean nothing."""


@dataclass(frozen=True)
class Row:
    """One way in one case.

    Attributes:
        case, way: their names.
        tokens: in an optimizer step.
        flops: model FLOPs of an optimizer step.
        peak_flops: of the device, a second; None where it is not known.
        seconds: of an optimizer step, on average over each turn, until the device is done.
        issued: the same, until the host is done. Near `seconds`, the host is the limit.
        peak_memory: bytes in the allocator's use at most, beyond what was in use before the way was built; on CPU, of
            the process.
        over_plain: `seconds` over the plain loop's: median over rounds.
        loss_difference: the largest relative difference from the plain loop's losses.
    """

    case: str
    way: str
    tokens: int
    flops: float
    peak_flops: float | None
    seconds: list[float]
    issued: list[float]
    peak_memory: int
    over_plain: float
    loss_difference: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / median(self.seconds)

    @property
    def utilization(self) -> float | None:
        """Model FLOPs utilization; see `benchmarks.gpu_cases`."""
        return self.flops / median(self.seconds) / self.peak_flops if self.peak_flops else None


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        steps: optimizer steps in a turn.
        rounds: turns of each way, after one that is not counted.
    """

    steps: int = 5
    rounds: int = 7


def measure(
    case: Case,
    device: torch.device,
    plan: Plan,
    peak: float | None,
    ways: Mapping[str, Callable[[Case, torch.device], Way]] = WAYS,
) -> list[Row]:
    """A row for each way.

    Raises:
        LossesDiffer: before any time is taken, or after.
    """
    batches = case.batches(device)
    parameters = sum(p.numel() for p in case.build(torch.device("meta")).parameters())
    alone = {name: _alone(make, case, device, batches) for name, make in ways.items()}
    _compare(case, {name: losses for name, (losses, _) in alone.items()})
    one_device.clean(device)
    with ExitStack() as stack:
        running = {name: _made(stack, make, case, device) for name, make in ways.items()}
        times = _take_turns(running, batches, device, plan)
        far = _compare(case, {name: _values(way) for name, way in running.items()})
    return [
        Row(
            case.name,
            name,
            case.batch * case.tokens,
            case.flops(parameters),
            peak,
            seconds,
            issued,
            alone[name][1],
            median(own / plain for own, plain in zip(seconds, times[PLAIN][0], strict=True)),
            far[name],
        )
        for name, (seconds, issued) in times.items()
    ]


def _alone(
    make: Callable[[Case, torch.device], Way], case: Case, device: torch.device, batches: Sequence[Tensor]
) -> tuple[list[float], int]:
    """The losses of a few steps, and the most memory that one takes, with nothing else on the device."""
    one_device.clean(device)
    before = memory.in_use(device)
    with ExitStack() as stack:
        way = _made(stack, make, case, device)
        way.turn(batches)
        one_device.wait(device)
        memory.reset_peak(device)
        way.turn(batches)
        one_device.wait(device)
        return _values(way), memory.peak(device) - before


def _made(stack: ExitStack, make: Callable[[Case, torch.device], Way], case: Case, device: torch.device) -> Way:
    way = make(case, device)
    stack.callback(way.close)
    return way


def _take_turns(
    ways: Mapping[str, Way], batches: Sequence[Tensor], device: torch.device, plan: Plan
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds and issued seconds of each way, a step; another way begins in each round."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    names, coming = [*ways], cycle(batches)
    for number in range(1 + plan.rounds):
        own = [*islice(coming, plan.steps)]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            one_device.wait(device)
            began = time.perf_counter()
            ways[name].turn(own)
            issued = time.perf_counter() - began
            one_device.wait(device)
            seconds = time.perf_counter() - began
            if number:
                times[name][0].append(seconds / plan.steps)
                times[name][1].append(issued / plan.steps)
    return times


def _compare(case: Case, losses: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The largest relative difference of each way's losses from the plain loop's.

    Raises:
        LossesDiffer: if it is over `LOSS_BOUND`.
    """
    far = {}
    for name, own in losses.items():
        apart = [abs(a - b) / abs(b) for a, b in zip(own, losses[PLAIN], strict=True)]
        worst = max(range(len(apart)), key=apart.__getitem__)
        if not apart[worst] <= LOSS_BOUND:
            raise LossesDiffer(
                f"{case.name}: the loss of step {worst} is {own[worst]:.6f} by {name} and {losses[PLAIN][worst]:.6f} "
                f"by {PLAIN}; {apart[worst]:.1e} apart, allowed {LOSS_BOUND:.0e}. No time is told"
            )
        far[name] = apart[worst]
    return far


def _values(way: Way) -> list[float]:
    return torch.stack(way.losses).float().tolist()  # type: ignore[no-any-return]


# -- the command -------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The rows for people."""
    columns = ("ms / step", "over plain", "host", "tokens / s", "MFU", "peak, GB", "losses")
    lines = [f"{'case':24}{'way':24}" + "".join(f"{column:>11}" for column in columns)]
    for row in rows:
        cells = (
            f"{1e3 * median(row.seconds):.2f}",
            f"{row.over_plain:.4f}",
            f"{median(row.issued) / median(row.seconds):.0%}",
            f"{row.tokens_per_second:,.0f}",
            "" if row.utilization is None else f"{row.utilization:.1%}",
            f"{row.peak_memory / 1e9:.2f}",
            f"{row.loss_difference:.0e}",
        )
        lines.append(f"{row.case:24}{row.way:24}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


class Run:
    """One call of the command, and what it has found so far.

    Args:
        device: to measure on.
        peak: its operations a second; None if they are not known.
        folder: where results go, as soon as they are there.
        circumstances: of the run, kept with the results.
    """

    def __init__(
        self, device: torch.device, peak: float | None, folder: Path, circumstances: Mapping[str, Any]
    ) -> None:
        self.failed = False
        self._device = device
        self._peak = peak
        self._folder = folder
        self._circumstances = circumstances
        self._rows: list[Row] = []
        self._checks: list[gpu_exercise.Check] = []

    def measure(self, case: Case, plan: Plan) -> None:
        """A case; where it fails, the others still have results of their own."""
        try:
            rows = measure(case, self._device, plan, self._peak)
        except (LossesDiffer, torch.OutOfMemoryError) as error:
            print(f"{case.name}: {error}", file=sys.stderr, flush=True)
            self.failed = True
            return
        self._rows += rows
        self._save(table(rows))

    def exercise(self, ranks: int) -> None:
        """The exercise."""
        one_device.clean(self._device)
        self._checks = gpu_exercise.exercise(self._device.type, ranks)
        self.failed |= not all(check.passed for check in self._checks)
        self._save(gpu_exercise.table(self._checks))

    def _save(self, news: str) -> None:
        print(news, flush=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        content = {
            "about": self._circumstances,
            "rows": [asdict(row) for row in self._rows],
            "exercise": [asdict(check) for check in self._checks],
        }
        (self._folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
        parts = [table(self._rows)] * bool(self._rows) + [gpu_exercise.table(self._checks)] * bool(self._checks)
        (self._folder / "table.txt").write_text("\n\n".join(parts) + "\n")


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_overhead", description="Overhead on one GPU.")
    add = parser.add_argument
    add("--device", help="by default the accelerator if there is one, else cpu")
    add("--case", action="append", choices=[*CASES, *TINY], help="repeats; by default the four large ones")
    add("--batch", type=int, help="sequences in an optimizer step, instead of the case's own")
    add("--steps", type=int, default=Plan.steps, help="optimizer steps in a turn")
    add("--rounds", type=int, default=Plan.rounds, help="turns of each way")
    add("--peak", type=float, help="of the device, in TFLOP/s (dense bf16); by default as its name tells")
    add("--exercise", action=argparse.BooleanOptionalAction, help="the exercise alone; or all but the exercise")
    add("--ranks", type=int, default=4, help="processes of the exercise, on two pretended nodes")
    add("--commit", help="what is measured, where there is no repository to ask")
    add("--folder", type=Path, help="where results go")
    return parser.parse_args(given)


def _run_of(options: argparse.Namespace) -> Run:
    device = one_device.chosen(options.device)
    name = one_device.name_of(device)
    peak = 1e12 * options.peak if options.peak else peak_flops(name)
    print(f"{name}, peak {peak / 1e12 if peak else '?'} TFLOP/s (dense bf16)", flush=True)
    circumstances = about(**{key: str(value) for key, value in vars(options).items()})
    circumstances["commit"] = options.commit or circumstances["commit"]
    circumstances["machine"]["device"] = name
    circumstances["versions"]["cuda"] = torch.version.cuda
    folder = options.folder or _FOLDER / f"{date.today().isoformat()}-gpu-overhead"
    return Run(device, peak, folder, circumstances)


def main(given: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 1 if a case failed or the exercise differs."""
    with quiet():
        return _main(_arguments(given))


def _main(options: argparse.Namespace) -> int:
    run = _run_of(options)
    for name in [] if options.exercise else options.case or [*CASES]:
        case = (CASES | TINY)[name]
        if options.batch:
            case = replace(case, batch=options.batch, name=f"{name}, batch {options.batch}")
        run.measure(case, Plan(options.steps, options.rounds))
    if dist.is_initialized():
        dist.destroy_process_group()
    if options.exercise is not False:
        run.exercise(options.ranks)
    return int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
