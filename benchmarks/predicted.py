"""Predicted: what the planner says of a step from a probe alone, beside what the step takes on the virtual cluster.

    python -m benchmarks.predicted --quick
    python -m benchmarks.predicted --again benchmarks/results/2026-11-27-predicted

Before and after `benchmarks.wire` measures steps on a cluster, `mics probe` measures its messages and its device. The
planner is told what either probe found, and nothing of the steps; its mean is what is predicted.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.cluster import Link, VirtualCluster, unavailable
from benchmarks.model import batches, build, loss_of, optimizer_of
from benchmarks.results import Row, about
from benchmarks.wire import chosen, measured, parse_shape, sizes_of
from benchmarks.worker import Plan
from lightning_mics.ladder import RUNGS, Rung
from lightning_mics.planner import peers
from lightning_mics.planner.activations import Activations, trace
from lightning_mics.planner.compute import Compute
from lightning_mics.planner.hardware import Cluster
from lightning_mics.planner.model import Model
from lightning_mics.planner.schedule import Case, Walk, schedule
from lightning_mics.planner.schedule import Task as Planned
from lightning_mics.planner.state import OptimizerBytes, model_state
from lightning_mics.planner.step import Walker, Work, simulate
from lightning_mics.topology import Topology

FORMAT = 2
OURS = "mics:"
_FOLDER = Path(__file__).parent / "results"
_PEERS = ("alone", "ddp", "zero3", "zero3-keep", "hsdp-every", "fsdp2", *(f"{OURS}{rung}" for rung in RUNGS))
_FEW = ("alone", "ddp", "zero3", "hsdp-every", *(f"{OURS}{rung}" for rung in RUNGS))


class Part(NamedTuple):
    """Of the grid: what is measured on one cluster. Few repetitions where the link takes all of the time."""

    link: str
    shape: str
    windows: tuple[int, ...]
    repetitions: int
    peers: tuple[str, ...]


_GRID = (
    Part("200 Mb/s", "2x2", (1, 4), 1, _FEW),
    Part("200 Mb/s", "3x2", (1, 4), 1, _FEW),
    Part("1 Gb/s", "2x2", (1, 4), 3, _FEW),
    Part("unshaped", "2x2", (4,), 5, _PEERS),
)
_QUICK = (Part("1 Gb/s", "2x2", (4,), 3, _FEW),)

app = typer.Typer(add_completion=False)
console = Console(width=max(120, Console().width))


@dataclass(frozen=True)
class Predicted:
    """A row and what was said of it.

    Attributes:
        row: as it was measured.
        seconds: of an optimizer step, by the planner.
    """

    row: Row
    seconds: float

    @property
    def error(self) -> float:
        """Of the seconds, as a share of those measured; positive where the planner says too much."""
        return self.seconds / self.row.median - 1


class Planner:
    """Says what rows take, from a probe.

    Args:
        probe: the file that `mics probe` wrote.

    Raises:
        ValueError: if the file cannot be read, or has no figures of the device.
    """

    def __init__(self, probe: Path) -> None:
        self._cluster = Cluster.from_probe(probe)
        self._compute = Compute(self._cluster.device)

    def seconds(self, row: Row) -> float:
        """Of an optimizer step of a peer in its case; of `row` nothing else is looked at.

        Raises:
            ValueError: for a peer whose schedule is not known.
        """
        topology = Topology(row.nodes * row.ranks_per_node, row.ranks_per_node, row.partition_size)
        case = Case(topology, window=row.window, rung=Rung.parse(row.rung), device_type="cpu")
        state = model_state(_module(), topology, optimizer=_optimizer())
        work = Work.of(_traced(), state, self._compute, recomputes=False)
        return simulate(_model(), case, self._cluster, work, self._compute, walker(row.peer)).seconds


@cache
def _module() -> nn.Module:
    module: nn.Module = build()
    return module


@cache
def _model() -> Model:
    return Model.of(_module())


@cache
def _traced() -> Activations:
    return trace(_module(), batches(0, 0, 1)[0], step=loss_of)


@cache
def _optimizer() -> OptimizerBytes:
    return OptimizerBytes.measure(optimizer_of)


def walker(peer: str) -> Walker:
    """The schedule of a peer of `benchmarks.peers`.

    Raises:
        ValueError: if there is none.
    """
    name = peer.partition(":")[0]
    known: dict[str, Walker] = {
        "alone": _alone,
        "ddp": peers.ddp,
        "zero3": peers.fsdp2,
        "zero3-keep": peers.fsdp2,
        "hsdp-every": peers.fsdp2,
        "fsdp2": partial(peers.fsdp2, hop_2_every_micro_step=False),
        "mics": schedule,
    }
    if name not in known:
        raise ValueError(f"peer={peer!r} has no schedule here; choose of {', '.join(known)}")
    return known[name]


def _alone(model: Model, case: Case, rank: int, steps: int) -> tuple[Planned, ...]:
    return Walk(model, case, rank).steps(steps)


@app.command()
def main(
    link: Annotated[list[str] | None, typer.Option(help="Of the grid's; by default each.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Likewise.")] = None,
    quick: Annotated[bool, typer.Option(help="One link, shape and window: 2 minutes.")] = False,
    again: Annotated[
        Path | None, typer.Option(help="Results of an earlier run: predict anew, measure nothing.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the results' folder, after the date.")] = "predicted",
    folder: Annotated[Path, typer.Option(help="Where results go.")] = _FOLDER,
) -> None:
    """Measure a cluster and its device, predict optimizer steps, and measure those."""
    if again is not None:
        show(load(again), again)
        return
    if reason := unavailable():
        print(f"no virtual cluster can stand here: {reason}", file=sys.stderr)
        raise typer.Exit(2)
    grid = [part for part in (_QUICK if quick else _GRID) if part.link in (link or [part.link])]
    grid = [part for part in grid if part.shape in (shape or [part.shape])]
    target = folder / f"{date.today().isoformat()}-{name}"
    content: dict[str, Any] = {"format": FORMAT, "cases": []}
    complete = True
    for part in grid:
        here, (nodes, ranks) = Link.parse(part.link), parse_shape(part.shape)
        told, before = about(**part._asdict()), _probed(here, nodes, ranks)
        sizes, names = sizes_of(nodes, ranks, None), chosen(part.peers)
        plan = Plan(str(here), nodes, ranks, sizes, [*part.windows], names, part.repetitions, apart=True)
        done, rows = measured(plan, here)
        complete = complete and done
        probes = [before, _probed(here, nodes, ranks)]
        content["cases"].append({"about": told, "probes": probes, "rows": [asdict(row) for row in rows]})
        save(content, target)
    show(load(target), target)
    console.print(f"results in {target}")
    if not complete:
        raise typer.Exit(1)


def _probed(link: Link, nodes: int, ranks_per_node: int) -> dict[str, Any]:
    """What `mics probe` writes on such a cluster."""
    with tempfile.TemporaryDirectory() as place, VirtualCluster(nodes, ranks_per_node, link) as cluster:
        file = Path(place, "network.json")
        with console.status(f"{nodes}x{ranks_per_node} on {link}, probe"):
            what = "--device", "cpu", "--model", "benchmarks.model:workload", "--output", str(file)
            cluster.torchrun("-m", "lightning_mics", "probe", *what)
        content: dict[str, Any] = json.loads(file.read_text())
        return content


# -- results -----------------------------------------------------------------------------------------------------------


def save(content: dict[str, Any], folder: Path) -> None:
    """Write what was measured to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predicted.json").write_text(json.dumps(content, indent=1) + "\n")


def load(folder: Path) -> list[Predicted]:
    """What was measured, and what the planner says of it now.

    Raises:
        ValueError: if it is of another format.
    """
    content = json.loads((folder / "predicted.json").read_text())
    if content.get("format") != FORMAT:
        raise ValueError(f"{folder}: format {content.get('format')!r} is not {FORMAT}; measure anew")
    return [each for case in content["cases"] for each in predicted(case["probes"], case["rows"])]


def predicted(probes: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> Iterator[Predicted]:
    """Rows beside the means of their predictions by each probe's content."""
    planners = []
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "network.json")
        for probe in probes:
            file.write_text(json.dumps(probe))
            planners.append(Planner(file))
    for each in rows:
        row = Row(**each)
        yield Predicted(row, fmean(planner.seconds(row) for planner in planners))


# -- reports -----------------------------------------------------------------------------------------------------------


def show(told: Sequence[Predicted], folder: Path) -> None:
    """Print tables, and draw the picture."""
    for case, group in groupby(told, lambda each: each.row.case):
        console.print(table(case, [*group]))
    console.print(summary(told))
    picture(told, folder / "predicted.png")


def table(case: tuple[str, str, int], told: Sequence[Predicted]) -> Table:
    """All rows of a case."""
    link, shape, window = case
    out = Table(title=f"{shape}, window {window}, {link}", title_justify="left")
    for name in ("peer", "p", "predicted", "measured", "IQR", "error"):
        out.add_column(name, justify="left" if name == "peer" else "right", no_wrap=True)
    for each in told:
        row = each.row
        times = f"{each.seconds:.3f}", f"{row.median:.3f}", f"{row.spread:.3f}"
        style = "bold" if row.peer.startswith(OURS) else None
        out.add_row(row.peer, str(row.partition_size), *times, f"{each.error:+.1%}", style=style)
    return out


def summary(told: Sequence[Predicted]) -> Table:
    """A line for each case: errors, and what choosing by the planner costs."""
    out = Table(title="Seconds of a step, predicted beside measured", title_justify="left")
    for name in ("case", "median error", "largest", "of", "the planner's choice", "its time over the best's"):
        out.add_column(name, justify="right" if "e" in name and name not in ("case", "of") else "left", no_wrap=True)
    for (link, shape, window), group in groupby(told, lambda each: each.row.case):
        rows = [*group]
        worst = max(rows, key=lambda each: abs(each.error))
        choice, over = chosen_of(rows)
        out.add_row(
            f"{link}, {shape}, window {window}",
            f"{median(abs(each.error) for each in rows):.1%}",
            f"{worst.error:+.1%}",
            f"{worst.row.peer}, p = {worst.row.partition_size}",
            "" if choice is None else f"{choice.peer.removeprefix(OURS)}, p = {choice.partition_size}",
            "" if choice is None else f"{over:.3f}",
        )
    return out


def chosen_of(told: Sequence[Predicted]) -> tuple[Row | None, float]:
    """The row of ours that the planner takes for the fastest, and its measured time over that of the fastest."""
    ours = [each for each in told if each.row.peer.startswith(OURS)]
    if not ours:
        return None, 1.0
    choice = min(ours, key=lambda each: each.seconds).row
    return choice, choice.median / min(each.row.median for each in ours)


def picture(told: Sequence[Predicted], file: Path) -> None:
    """Draw what was predicted against what was measured."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 6), layout="constrained")
    links = dict.fromkeys(each.row.link for each in told)
    for color, link in enumerate(links):
        for ours, marker in ((True, "o"), (False, "x")):
            here = [each for each in told if each.row.link == link and each.row.peer.startswith(OURS) == ours]
            points = [each.row.median for each in here], [each.seconds for each in here]
            label = f"{link}, {'lightning-mics' if ours else 'others'}"
            axes.plot(*points, marker, color=f"C{color}", markersize=5, label=label, markerfacecolor="none")
    ends = [f([*(e.row.median for e in told), *(e.seconds for e in told)]) for f in (min, max)]
    axes.plot(ends, ends, "k-", linewidth=0.8)
    for factor in (0.9, 1.1):
        axes.plot(ends, [factor * end for end in ends], "k:", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="measured, seconds an optimizer step", ylabel="predicted")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    app()
