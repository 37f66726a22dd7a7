"""Overlap: how much of the communication happens while the model computes.

    python -m benchmarks.overlap --link "200 Mb/s" --link "1 Gb/s"

FSDP2 by itself and lightning-mics train one model over all ranks (p = n). Each collective's beginning and end is
noted, and the seconds for which the computing thread stood still for it: what is left was covered. One command gives a
table, a picture of one optimizer step, and a file with all that was measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.cluster import Link, VirtualCluster, unavailable
from benchmarks.model import batches, blocks_of
from benchmarks.peers import FSDP2, Alone, MiCS, mesh_of
from benchmarks.results import about
from lightning_mics.ladder import Rung
from lightning_mics.topology import Topology

_FOLDER = Path(__file__).parent / "results"
_STEPS = 5
_WINDOW = 4

Interval = tuple[str, float, float]
app = typer.Typer(add_completion=False)


# -- on each rank ------------------------------------------------------------------------------------------------------


class _Timed:
    """A communication object of FSDP2's that does what its own does, and notes when."""

    def __init__(self, what: str, collective: Callable[..., Any], intervals: list[Interval]) -> None:
        self._what = what
        self._collective = collective
        self._intervals = intervals

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, *op: Any, **options: Any) -> Any:
        began = time.perf_counter()
        work = self._collective(output_tensor, input_tensor, group=group, **options)
        self._intervals.append((self._what, began, time.perf_counter()))
        return work


def _time_fsdp2(model: nn.Module) -> list[Interval]:
    intervals: list[Interval] = []
    modules: list[Any] = [*blocks_of(model), model]
    for module in modules:
        module.set_custom_all_gather(_Timed("gather", dist.all_gather_single, intervals))
        module.set_custom_reduce_scatter(_Timed("reduce-scatter", dist.reduce_scatter_single, intervals))
    return intervals


def _measure_fsdp2(topology: Topology, count: int) -> dict[str, Any]:
    everyone = Topology(topology.world_size, topology.ranks_per_node, topology.world_size)
    peer = FSDP2(mesh_of(everyone), Rung())
    intervals = _time_fsdp2(peer.model)

    def taken() -> tuple[list[Interval], float]:
        now = [*intervals]
        intervals.clear()
        return now, sum(end - began for _, began, end in now)

    return _steps(peer, count, taken)


def _measure_ours(topology: Topology, count: int) -> dict[str, Any]:
    peer = MiCS(topology, Rung())
    traffics = [traffic for traffic in (peer.root.wire.gather, peer.root.wire.hop_1) if traffic is not None]
    for traffic in traffics:
        traffic.channel.log = []

    def taken() -> tuple[list[Interval], float]:
        transfers = [transfer for traffic in traffics for transfer in traffic.channel.log or []]
        for traffic in traffics:
            traffic.channel.log = []
        intervals = [(t.what.split(" of ")[0].removeprefix("all-"), t.began, t.ended) for t in transfers]
        return intervals, sum(t.blocked for t in transfers)

    return _steps(peer, count, taken)


def _steps(peer: Any, count: int, taken: Callable[[], tuple[list[Interval], float]]) -> dict[str, Any]:
    steps = []
    for step in range(1 + count):
        data = batches(step, dist.get_rank(), _WINDOW)
        dist.barrier()
        began = time.perf_counter()
        peer.step(data)
        seconds = time.perf_counter() - began
        intervals, blocked = taken()
        if step:
            relative = [(what, start - began, end - began) for what, start, end in intervals]
            steps.append({"seconds": seconds, "busy": busy(relative), "blocked": blocked, "intervals": relative})
    return {"steps": steps}


def busy(intervals: Sequence[Interval]) -> float:
    """Seconds in which at least one collective was under way."""
    total, until = 0.0, float("-inf")
    for _, began, end in sorted(intervals, key=lambda interval: interval[1]):
        total += max(0.0, end - max(began, until))
        until = max(until, end)
    return total


def _rank(nodes: int, ranks_per_node: int, steps: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    topology = Topology(nodes * ranks_per_node, ranks_per_node, nodes * ranks_per_node)
    measured = {
        "alone": _steps(Alone(), steps, lambda: ([], 0.0)),
        "FSDP2": _measure_fsdp2(topology, steps),
        "lightning-mics": _measure_ours(topology, steps),
    }
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


# -- the command -------------------------------------------------------------------------------------------------------


@app.command()
def main(
    link: Annotated[list[str] | None, typer.Option(help='As "200 Mb/s", "1 Gb/s + 1 ms", "unshaped".')] = None,
    nodes: Annotated[int, typer.Option(help="Number of nodes.")] = 2,
    ranks_per_node: Annotated[int, typer.Option(help="Ranks on each.")] = 2,
    steps: Annotated[int, typer.Option(help="Optimizer steps that are timed, after one that is not.")] = _STEPS,
    folder: Annotated[Path, typer.Option(help="Where results go.")] = _FOLDER,
) -> None:
    """Measure how much of the communication is covered by computation, at p = n."""
    if reason := unavailable():
        print(f"no virtual cluster can stand here: {reason}", file=sys.stderr)
        raise typer.Exit(2)
    target = folder / f"{date.today().isoformat()}-overlap"
    target.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Any] = {}
    for text in link or ["200 Mb/s", "1 Gb/s"]:
        with tempfile.TemporaryDirectory() as place, VirtualCluster(nodes, ranks_per_node, Link.parse(text)) as cluster:
            file = Path(place, "measured.json")
            cluster.torchrun("-m", "benchmarks.overlap", "rank", *map(str, (nodes, ranks_per_node, steps, file)))
            measured[text] = json.loads(file.read_text())
        Console(width=110).print(_table(text, measured[text]))
    content = {"about": about(nodes=nodes, ranks_per_node=ranks_per_node, window=_WINDOW), "links": measured}
    (target / "overlap.json").write_text(json.dumps(content))
    _picture(measured, target / "overlap.png")
    print(f"results in {target}")


def _table(link: str, measured: dict[str, Any]) -> Table:
    steps = max(len(content["steps"]) for content in measured.values())
    table = Table(title=f"p = n, window {_WINDOW}, {link}: medians of {steps} optimizer steps on rank 0")
    for column in ("engine", "s / step", "communicating, s", "standing still, s", "covered, s", "covered"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name, content in measured.items():
        seconds, occupied, blocked = (
            median(s[key] for s in content["steps"]) for key in ("seconds", "busy", "blocked")
        )
        covered = max(0.0, occupied - blocked)
        share = f"{covered / occupied:.0%}" if occupied else ""
        table.add_row(name, f"{seconds:.3f}", f"{occupied:.3f}", f"{blocked:.3f}", f"{covered:.3f}", share)
    return table


def _picture(measured: dict[str, Any], file: Path) -> None:
    """One optimizer step of each engine: when what was under way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(measured), 1, figsize=(10, 2.2 * len(measured)), squeeze=False)
    lanes = [(name, what) for name in ("FSDP2", "lightning-mics") for what in ("gather", "reduce-scatter")]
    for axis, (link, engines) in zip(axes[:, 0], measured.items(), strict=True):
        for lane, (name, what) in enumerate(lanes):
            by_time = sorted(engines[name]["steps"], key=lambda s: s["seconds"])
            step = by_time[len(by_time) // 2]
            bars = [(began, end - began) for kind, began, end in step["intervals"] if kind == what]
            axis.broken_barh(bars, (lane - 0.4, 0.8), color="C0" if name == "FSDP2" else "C1")
            axis.plot([step["seconds"]] * 2, [lane - 0.4, lane + 0.4], color="black")
        axis.set_yticks(range(len(lanes)), [f"{name}: {what}" for name, what in lanes])
        axis.invert_yaxis()
        axis.set_title(f"{link}; a black line ends the step", fontsize=9)
    axes[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        _rank(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        app()
