"""The wire: every peer on every link, shape, window and partition size, beside the fewest bytes that would do.

    python -m benchmarks.wire --quick
    python -m benchmarks.wire --link "200 Mb/s" --shape 2x2 --window 4 --partition-size 2 --peer ddp --peer mics

One command gives a table, a picture, and a folder with all that was measured.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.cluster import CommandFailed, Link, VirtualCluster, unavailable
from benchmarks.peers import PEERS
from benchmarks.report import picture, table
from benchmarks.results import Results, Row, about
from benchmarks.worker import Plan
from lightning_mics.topology import allowed_partition_sizes

_LINKS = ("200 Mb/s", "1 Gb/s", "1 Gb/s + 1 ms", "unshaped")
_SHAPES = ("2x2", "3x2", "2x3")
_WINDOWS = (1, 4, 16)
_FOLDER = Path(__file__).parent / "results"
# Memory is exact where freed blocks of memory go back at once.
_MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_QUICK_PEERS = (
    *("alone", "ddp", "zero3", "hsdp-every", "fsdp2:block/sharded"),
    *("mics:block/sharded", "mics:window/whole"),
)

app = typer.Typer(add_completion=False)
console = Console(width=max(120, Console().width))


@app.command()
def main(
    link: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(_LINKS)}, or others.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Nodes x ranks per node, as 2x2.")] = None,
    window: Annotated[list[int] | None, typer.Option(help="Micro-steps per optimizer step.")] = None,
    partition_size: Annotated[list[int] | None, typer.Option(help="By default each that is allowed, but 1.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="A peer, or the beginning of several names.")] = None,
    repetitions: Annotated[int, typer.Option(help="Optimizer steps that count, of each peer in each case.")] = 5,
    memory: Annotated[bool, typer.Option(help="Measure memory as well, in processes of its own.")] = True,
    quick: Annotated[bool, typer.Option(help="One link, shape and window, few peers: under 5 minutes.")] = False,
    name: Annotated[str, typer.Option(help="Of the results' folder, after the date.")] = "wire",
    folder: Annotated[Path, typer.Option(help="Where results go.")] = _FOLDER,
) -> None:
    """Measure peers on a virtual cluster: seconds, bytes between nodes and memory of an optimizer step."""
    if reason := unavailable():
        print(f"no virtual cluster can stand here: {reason}", file=sys.stderr)
        raise typer.Exit(2)
    links = link or ([_LINKS[0]] if quick else [*_LINKS])
    shapes = shape or ([_SHAPES[0]] if quick else [*_SHAPES])
    windows = window or ([4] if quick else [*_WINDOWS])
    names = chosen(peer or (_QUICK_PEERS if quick else ()))
    repetitions = min(repetitions, 3) if quick else repetitions
    options = {"links": links, "shapes": shapes, "windows": windows, "peers": names, "repetitions": repetitions}
    results = Results(about(**options, partition_sizes=partition_size), [])
    target = folder / f"{date.today().isoformat()}-{name}"

    complete = True
    for each in shapes:
        nodes, ranks = parse_shape(each)
        plan = Plan("", nodes, ranks, sizes_of(nodes, ranks, partition_size), windows, names, repetitions)
        weighed, weights = measured(replace(plan, link="unshaped", memory=True), Link()) if memory else (True, [])
        peaks = {(row.peer, row.partition_size, row.window): row.peak_memory for row in weights}
        complete = complete and weighed
        for text in links:
            here = Link.parse(text)
            timed, rows = measured(replace(plan, link=str(here)), here)
            complete = complete and timed
            rows = [replace(row, peak_memory=peaks.get((row.peer, row.partition_size, row.window))) for row in rows]
            results.rows.extend(rows)
            results.save(target)
            console.print(*table(rows), sep="\n")
        picture([row for row in results.rows if row.shape == each], target / f"{each}.png")
    console.print(f"results in {target}")
    if not complete:
        raise typer.Exit(1)


def chosen(wanted: Iterable[str]) -> list[str]:
    """The peers whose names are, or begin with, one of `wanted`; all for none. Says which cannot be made here.

    Raises:
        typer.BadParameter: if a name fits none.
    """
    wanted = [*wanted]
    for prefix in wanted:
        if not any(_fits(name, prefix) for name in PEERS):
            raise typer.BadParameter(f"peer={prefix!r} is none of {', '.join(PEERS)}")
    names = [name for name in PEERS if not wanted or any(_fits(name, prefix) for prefix in wanted)]
    for name in names:
        if reason := PEERS[name].missing():
            console.print(f"{name} is left out: {reason}")
    return [name for name in names if not PEERS[name].missing()]


def _fits(name: str, prefix: str) -> bool:
    return name == prefix or (re.match(rf"{re.escape(prefix)}[:/-]", name) is not None and prefix not in PEERS)


def parse_shape(text: str) -> tuple[int, int]:
    """Nodes and ranks per node of "2x3".

    Raises:
        typer.BadParameter: if `text` is not of that form.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise typer.BadParameter(f"shape={text!r} is not nodes x ranks per node; write 2x3")
    return int(match[1]), int(match[2])


def sizes_of(nodes: int, ranks: int, wanted: Iterable[int] | None) -> list[int]:
    """Partition sizes of a shape: of those `wanted` the allowed ones; by default all but 1.

    Raises:
        typer.BadParameter: if none is allowed.
    """
    allowed = allowed_partition_sizes(nodes * ranks, ranks)
    sizes = [p for p in allowed if (p in wanted if wanted else p > 1)]
    if not sizes:
        raise typer.BadParameter(f"none of these partition sizes fits {nodes}x{ranks}; choose of {allowed}")
    return sizes


def measured(plan: Plan, link: Link) -> tuple[bool, list[Row]]:
    """Run a plan on a cluster of its own: whether it came to its end, and the rows of the windows that did."""
    environment = {"PYTHONWARNINGS": "ignore"} | (_MEMORY_ENVIRONMENT if plan.memory else {})
    with tempfile.TemporaryDirectory() as place, VirtualCluster(plan.nodes, plan.ranks_per_node, link) as cluster:
        plan_file, rows_file = Path(place, "plan.json"), Path(place, "rows.jsonl")
        plan_file.write_text(json.dumps(asdict(plan)))
        rows_file.touch()
        complete = True
        with console.status(f"{plan.nodes}x{plan.ranks_per_node} on {link}{', memory' * plan.memory}"):
            try:
                cluster.torchrun("-m", "benchmarks.worker", str(plan_file), str(rows_file), env=environment)
            except CommandFailed as error:
                console.print(f"[red]{error}; windows before it are kept")
                complete = False
        return complete, [Row(**json.loads(line)) for line in rows_file.read_text().splitlines()]


if __name__ == "__main__":
    app()
