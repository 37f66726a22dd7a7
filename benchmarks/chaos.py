"""Chaos: a training that saves its checkpoints is killed over and over, and must be what it was.

    python -m benchmarks.chaos --kills 50

Four ranks in two partition groups train with dropout and save every second step, in all ways that there are. SIGKILL
falls on one rank or on all at once, while they train, save, load or link. After each kill every checkpoint that had
been committed must be there and whole, and `fit(ckpt_path="last")` goes on from the last one with the losses, bit for
bit, of a run that was never killed. One command gives a table, and a file with all that happened.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from itertools import product
from multiprocessing.connection import wait
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.lives import RANKS, SAVE_EVERY, STEPS, WINDOW, Blow, Life, Way, main
from benchmarks.results import about
from mics_tools.manifest import NAME as MANIFEST
from mics_tools.manifest import DamagedCheckpoint, Manifest

_FOLDER = Path(__file__).parent / "results"
_GRACE = 60.0  # seconds that the ranks which were not struck have to find out and go
_PATIENCE = 300.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lightning_mics", "torch.distributed.checkpoint", "torch.distributed.fsdp"])
app = typer.Typer(add_completion=False)

Losses = dict[tuple[int, int], str]
"""By rank and micro-step, as `float.hex` gives them."""


@dataclass(frozen=True)
class Kill:
    """One blow, and what was found after it.

    Attributes:
        way: how the run saved.
        blow: as it was meant.
        where: what was under way: "training", "loading", or "save: ..." with the stage that it had reached.
        call: the call to the file system before which it fell, if it was one.
        resumed: the optimizer step from which this life had begun.
        reached: micro-steps that had been taken.
        newest: the step of the newest checkpoint on the disk.
        last: the step of the one that "last" is, from which the next life begins; None if there is none yet.
        redone: micro-steps that the next life takes again.
        left_over: directories that were being written or deleted.
        lost: checkpoints that had been committed and are not there, or are not whole.
        stood: for each rank that did not go by itself, where its threads stood.
        seconds: from the blow's life's start to its end.
    """

    way: str
    blow: dict[str, Any]
    where: str
    call: str
    resumed: int
    reached: int
    newest: int | None
    last: int | None
    redone: int
    left_over: list[str]
    lost: list[str]
    stood: dict[int, str]
    seconds: float


@dataclass
class Campaign:
    """What happened.

    Attributes:
        kills: one after another.
        compared: losses that were held against the reference.
        mismatches: where one was another, or a life began elsewhere than "last" said.
        left_behind: left-over directories that the next save did not clean.
    """

    kills: list[Kill] = field(default_factory=list)
    compared: int = 0
    mismatches: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)

    @property
    def lost(self) -> list[str]:
        """Checkpoints that had been committed."""
        return [name for kill in self.kills for name in kill.lost]


# -- one life ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ended:
    """How a life ended, and what it had told: lines by rank."""

    codes: list[int]
    stood: dict[int, str]
    told: list[list[dict[str, Any]]]
    seconds: float

    def lines(self, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for rank, lines in enumerate(self.told):
            yield from ((rank, line) for line in lines if line["what"] == what)

    @property
    def losses(self) -> Losses:
        return {(rank, line["number"]): line["loss"] for rank, line in self.lines("loss")}


def _live(life: Life) -> _Ended:
    """Start the ranks, and return when none is there."""
    life.record.mkdir(parents=True)
    began = time.perf_counter()
    ranks = [_context.Process(target=main, args=(life, rank), daemon=True) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    waiting = {process.sentinel: rank for rank, process in enumerate(ranks)}
    limit = _PATIENCE
    while waiting and (gone := wait(list(waiting), limit)):
        for sentinel in gone:
            del waiting[sentinel]  # type: ignore[arg-type]
        limit = _GRACE
    killed_after = sorted(waiting.values())
    for rank in killed_after:
        os.kill(ranks[rank].pid or 0, signal.SIGUSR1)  # it writes where it stands
    wait([ranks[rank].sentinel for rank in killed_after], 1.0)
    stood = {rank: _FOLDERS.sub("", (life.record / f"said-{rank}.txt").read_text()) for rank in killed_after}
    for rank in killed_after:
        ranks[rank].kill()
    for process in ranks:
        process.join()
    told = [_lines(life.record / f"rank-{rank}.txt") for rank in range(RANKS)]
    codes = [process.exitcode or 0 for process in ranks]
    struck = any(line["what"] == "blow" for lines in told for line in lines)
    if any(codes) and not struck:
        errors = [path.read_text() for path in sorted(life.record.glob("error-*.txt"))]
        raise RuntimeError("\n".join([f"ranks ended with {codes} though none was struck", *errors]))
    return _Ended(codes, stood, told, time.perf_counter() - began)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# -- many --------------------------------------------------------------------------------------------------------------


WAYS = [Way(a, w, last) for last, w, a in product((True, "link"), ("all", "group"), (False, True))]  # type: ignore[arg-type]


def torment(kills: int, seed: int, place: Path) -> Campaign:
    """Kill `kills` times, the ways of saving in equal parts, and compare all that comes out.

    Args:
        kills: how many.
        seed: of where they strike.
        place: a folder to work in.
    """
    campaign, chance = Campaign(), random.Random(seed)
    reference = _live(Life(None, place / "reference", WAYS[0], None)).losses
    if len(reference) != RANKS * STEPS * WINDOW:
        raise RuntimeError(f"the reference has {len(reference)} losses")
    ways = chance.sample(WAYS, len(WAYS))[: max(1, min(len(WAYS), kills // 2))]
    for number, way in enumerate(ways):
        share = kills * (number + 1) // len(ways) - kills * number // len(ways)
        _Run(way, place / f"run-{number}", reference, campaign, chance).suffer(share)
    return campaign


class _Run:
    """A training in one folder, through all its lives."""

    def __init__(self, way: Way, place: Path, reference: Losses, campaign: Campaign, chance: random.Random) -> None:
        self._way, self._place, self._reference = way, place, reference
        self._campaign, self._chance = campaign, chance
        self._folder = place / "checkpoints"
        self._lives = 0
        self._forget()

    def _forget(self) -> None:
        self._committed: dict[str, int] = {}  # step by name
        self._left_over: list[str] = []
        self._begins = 0

    def suffer(self, kills: int) -> None:
        """So many, and then a life that sees what the last one has left."""
        while kills:
            blow = _blow(self._chance)
            ended = self._next(blow)
            if any(True for _ in ended.lines("blow")):
                self._campaign.kills.append(self._examine(ended, blow))
                kills -= 1
            elif not any(ended.codes):
                shutil.rmtree(self._folder)  # it came to its end before the blow; begin another
                self._forget()
        self._next(None)

    def _next(self, blow: Blow | None) -> _Ended:
        self._lives += 1
        steps = STEPS if blow is not None else min(STEPS, self._begins + 2 * SAVE_EVERY)
        ended = _live(Life(self._folder, self._place / f"life-{self._lives}", self._way, blow, steps))
        self._compare(ended)
        return ended

    def _compare(self, ended: _Ended) -> None:
        where = f"{self._way}, life {self._lives}"
        for rank, line in ended.lines("begins"):
            if line["step"] != self._begins:
                self._campaign.mismatches.append(f"{where}: rank {rank} began at {line['step']}, not {self._begins}")
        for (rank, number), loss in ended.losses.items():
            self._campaign.compared += 1
            if loss != self._reference[rank, number]:
                self._campaign.mismatches.append(f"{where}: rank {rank}, micro-step {number}: {loss}")
        if any(rank == 0 for rank, _ in ended.lines("committed")):
            self._campaign.left_behind += [name for name in self._left_over if (self._folder / name).exists()]

    def _examine(self, ended: _Ended, blow: Blow) -> Kill:
        for line in ended.told[0]:
            if line["what"] == "committed":
                self._committed[line["name"]] = line["step"]
            elif line["what"] == "removed":
                self._committed.pop(line["name"], None)
        here, damaged = _whole(self._folder)
        lost = damaged + [name for name, step in self._committed.items() if here.get(name, -1) < step]
        self._committed = {**here}
        last = max((step for name, step in here.items() if name.startswith("last")), default=None)
        before, self._begins = self._begins, last or 0
        self._left_over = sorted(path.name for path in self._folder.glob(".*"))
        reached = max((number + 1 for _, number in ended.losses), default=before * WINDOW)
        (_, struck), *_ = ended.lines("blow")
        return Kill(
            way=str(self._way),
            blow=asdict(blow),
            where=_where(ended, struck, self._folder, here),
            call=f"{struck['call']} {struck['name']}".strip(),
            resumed=before,
            reached=reached,
            newest=max(here.values(), default=None),
            last=last,
            redone=max(0, reached - self._begins * WINDOW),
            left_over=self._left_over,
            lost=lost,
            stood=ended.stood,
            seconds=round(ended.seconds, 3),
        )


def _blow(chance: random.Random) -> Blow:
    """In training, some time after a save began, or at a call to the file system."""
    whens: tuple[Literal["batch", "save", "call"], ...] = ("batch", "save", "save", "call", "call")
    when = chance.choice(whens)
    victim = chance.choice((None, *range(RANKS)))
    if when == "batch":
        return Blow(when, chance.randint(1, 12), chance.randrange(RANKS), chance.uniform(0, 0.05), victim)
    if when == "save":
        return Blow(when, chance.randint(1, 4), 0, chance.uniform(0, 0.03), victim)
    if call := chance.choice(("", *_RARE)):
        return Blow("call", chance.randint(1, 4), 0, 0.0, victim, call)
    watcher = chance.randrange(RANKS)  # most calls are rank 0's
    return Blow("call", chance.randint(1, 20 if watcher else 250), watcher, 0.0, victim)


# With which a checkpoint takes its place, and another one goes.
_RARE = ("renameat2", "os.rename", "os.symlink", "shutil.rmtree", "os.rmdir")


def _whole(folder: Path) -> tuple[dict[str, int], list[str]]:
    """The steps of the checkpoints in a folder, by name; and the names of those that are damaged."""
    whole, damaged = {}, []
    for path in folder.glob("*.ckpt"):
        if path.exists() and not path.name.startswith("."):  # a link may lead nowhere
            try:
                manifest = Manifest.of(path)
                if not manifest.damage(path):
                    whole[path.name] = manifest.step
                    continue
            except DamagedCheckpoint:
                pass
            damaged.append(path.name)
    return whole, damaged


def _where(ended: _Ended, struck: dict[str, Any], folder: Path, whole: dict[str, int]) -> str:
    """What was under way, by the call before which the blow fell, or by what is on the disk after it."""
    if not any(True for _ in ended.lines("begins")):
        return "loading"
    if struck["call"]:
        return f"save: {_stage_of_call(struck['call'], struck['name'])}"
    if aside := [path for path in folder.glob(".*.partial") if path.is_dir()]:
        return f"save: {_stage_of(aside[0], max(whole.values(), default=-1))}"
    return "training"


def _stage_of_call(call: str, name: str) -> str:
    file = Path(name).name
    if call == "os.symlink":
        return "the link moves"
    if call in ("shutil.rmtree", "os.rmdir", "os.remove"):
        return "old ones go"
    if call == "renameat2" or (call == "os.rename" and file.endswith(".partial")):
        return "takes its place"
    return next((stage for part, stage in _FILES.items() if part in file), "begins, or is flushed")


def _stage_of(aside: Path, newest: int) -> str:
    if aside.is_symlink():
        return "the link moves"
    names = {path.name for path in aside.iterdir()}
    if MANIFEST in names:
        return "takes its place" if Manifest.of(aside).step > newest else "old ones go"
    return next((stage for part, stage in reversed(_FILES.items()) if any(part in n for n in names)), "begins")


_FOLDERS = re.compile(r"(?<![\w.])/[\w./-]*/")  # of this machine, in what a rank has said
_FILES = {".distcp": "tensors", ".metadata": "the rest", "ranks.pt": "the rest", "lightning.pt": "the rest"}


# -- the command -------------------------------------------------------------------------------------------------------


@app.command()
def command(
    kills: Annotated[int, typer.Option(help="How many.")] = 50,
    seed: Annotated[int, typer.Option(help="Of where they strike.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where results go.")] = _FOLDER,
) -> None:
    """Kill a training over and over; exit 1 if anything that was committed is lost, or any loss is another."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        campaign = torment(kills, seed, Path(place))
    console = Console(width=110)
    console.print(_table(campaign))
    console.print(f"{_summary(campaign)}; {time.perf_counter() - began:.0f} s")
    target = folder / f"{date.today().isoformat()}-chaos"
    target.mkdir(parents=True, exist_ok=True)
    content = {"about": about(kills=kills, seed=seed), **asdict(campaign)}
    (target / "chaos.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"results in {target}")
    for trouble in (*campaign.lost, *campaign.mismatches, *campaign.left_behind)[:20]:
        print(trouble)
    raise typer.Exit(bool(campaign.lost or campaign.mismatches or campaign.left_behind))


def _table(campaign: Campaign) -> Table:
    table = Table(title=f"where {len(campaign.kills)} kills fell")
    for column in ("under way", "kills", "all ranks", "micro-steps redone, median, most", "left over", "lost"):
        table.add_column(column, justify="left" if column == "under way" else "right")
    for where in sorted({kill.where for kill in campaign.kills}, key=lambda where: (":" in where, where)):
        kills = [kill for kill in campaign.kills if kill.where == where]
        redone = [kill.redone for kill in kills]
        table.add_row(
            where,
            str(len(kills)),
            str(sum(kill.blow["victim"] is None for kill in kills)),
            f"{median(redone):g}, {max(redone)}",
            str(sum(len(kill.left_over) for kill in kills)),
            str(sum(len(kill.lost) for kill in kills)),
        )
    return table


def _summary(campaign: Campaign) -> str:
    return (
        f"committed checkpoints lost: {len(campaign.lost)}; losses compared: {campaign.compared}, "
        f"mismatches: {len(campaign.mismatches)}; left-overs: {sum(len(kill.left_over) for kill in campaign.kills)}, "
        f"not cleaned by the next save: {len(campaign.left_behind)}; "
        f"ranks that had to be ended: {sum(len(kill.stood) for kill in campaign.kills)}"
    )


if __name__ == "__main__":
    app()
