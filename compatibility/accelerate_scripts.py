"""Accelerate's own scripts, with MiCSAccelerator in the place of Accelerator, function by function.

    python -m compatibility.accelerate_scripts
    python -m compatibility.accelerate_scripts --script test_sync --script test_ops
    python -m compatibility.accelerate_scripts --table

They are those that the installed Accelerate has in `accelerate/test_utils/scripts`, unchanged, on CPU with gloo, on two
and four processes started by torchrun: with Accelerate's own Accelerator, which is DDP here, and with ours. What main
does not call on CPUs is called besides. Where a function fails, the script is started again without it. Results are
kept in `compatibility/results/DATE-accelerate-scripts.json`; `--table` writes the newest into
`docs/accelerate-scripts.md`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.results import about
from compatibility import documents, kept
from compatibility.accelerate_rank import Order, is_test
from compatibility.stand_ins import write_model

app = typer.Typer(add_completion=False)

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).parent / "results"
DOCUMENT = ROOT / "docs" / "accelerate-scripts.md"
FORMAT = 1
_LIMIT = 300  # seconds that a start may take
_NOISE = re.compile(r"Connection (closed|reset)|connection was closed|Broken pipe|peer|SIGTERM")
MODEL = "MODEL"


@dataclass(frozen=True)
class Setting:
    """How a script is started.

    Attributes:
        world_size: number of processes.
        partition_size: None for Accelerate's own Accelerator.
    """

    world_size: int
    partition_size: int | None

    @property
    def name(self) -> str:
        what = "Accelerator" if self.partition_size is None else f"p = {self.partition_size}"
        return f"{what}, n = {self.world_size}"


SETTINGS = (Setting(2, None), Setting(2, 1), Setting(2, 2), Setting(4, None), Setting(4, 2))

_ANY = (SETTINGS[0], SETTINGS[2])  # of scripts that make no Accelerator

Call = tuple[str, dict[str, Any]]
_FLAGS = ("split_batches", "dispatch_batches", "sync_each_batch")
_SWITCHED = [dict(zip(_FLAGS, values, strict=True)) for values in itertools.product((True, False), repeat=3)]


@dataclass(frozen=True)
class Script:
    """One of Accelerate's.

    Attributes:
        name: below `test_utils/scripts`.
        why_not: why it does not apply; it is not started then.
        calls: functions that its main calls on GPUs only, and that run on CPUs as well.
        arguments: of each start after another in one folder; a script that keeps nothing is started once.
        stand_ins: whether it asks a hub for data sets and metrics.
        rows: whether it is given a model that has rows to shard; its own has two numbers, whole on every rank.
        settings: under which it is started.
    """

    name: str
    why_not: str = ""
    calls: tuple[Call, ...] = ()
    arguments: tuple[tuple[str, ...], ...] = ((),)
    stand_ins: bool = False
    rows: bool = False
    settings: tuple[Setting, ...] = SETTINGS

    @property
    def title(self) -> str:
        """For people."""
        return self.name.rpartition(".")[2] + (", with rows" if self.rows else "")


_SYNC = tuple(
    (name, flags)
    for name in ("test_gradient_accumulation", "test_gradient_accumulation_with_opt_and_scheduler")
    for flags in _SWITCHED
    if name == "test_gradient_accumulation" or any(flags.values())
)
_DEEPSPEED = "DeepSpeed does the sharding, on GPUs, where MiCSAccelerator does it itself: its plugin is refused"

SCRIPTS = (
    Script("test_script"),
    Script("test_sync", calls=_SYNC),
    Script("test_sync", calls=_SYNC, rows=True),
    Script("test_ops"),
    Script("test_distributed_data_loop"),
    Script("test_cli", settings=_ANY),
    Script(
        "test_ddp_comm_hook",
        why_not="it compares with a DDP of its own, made for GPUs by device_ids. A hook of DDP's does nothing here, "
        "which is said; between_nodes=torch.bfloat16 does instead",
    ),
    Script("test_merge_weights"),
    Script("test_notebook", why_not="it starts processes from a notebook, and makes no Accelerator"),
    Script(
        "external_deps.test_checkpointing",
        arguments=(
            ("--model_name_or_path", MODEL, "--num_epochs", "2"),
            ("--model_name_or_path", MODEL, "--resume_from_checkpoint", "epoch_0", "--partial_train_epoch", "1"),
        ),
        stand_ins=True,
    ),
    Script(
        "external_deps.test_metrics",
        calls=(
            ("test_gather_for_metrics_with_iterable_dataset", {}),
            ("test_gather_for_metrics_with_non_tensor_objects_iterable_dataset", {}),
        ),
        stand_ins=True,
    ),
    Script(
        "external_deps.test_performance",
        arguments=(("--model_name_or_path", MODEL, "--num_epochs", "2"),),
        stand_ins=True,
    ),
    Script("external_deps.test_peak_memory_usage", why_not="it reads an accelerator's memory, and has no way without"),
    Script("external_deps.test_pippy", why_not="it runs a pipeline on two GPUs, and makes no Accelerator"),
    Script("external_deps.test_zero3_integration", why_not=f"{_DEEPSPEED}; it makes no Accelerator"),
    Script("external_deps.test_ds_multiple_model", why_not=_DEEPSPEED),
    Script("external_deps.test_ds_alst_ulysses_sp", why_not=_DEEPSPEED),
)


@dataclass(frozen=True)
class Reason:
    """Why a function that fails does not apply.

    Attributes:
        function: what its label begins with.
        says: a pattern of what it fails with; another failure is a failure.
        why: for the table.
        to_all: whether it is one with Accelerate's own Accelerator, too.
        one_replica: whether it is one only where p = n.
    """

    function: str
    says: str
    why: str
    to_all: bool = False
    one_replica: bool = False

    def holds(self, setting: Setting) -> bool:
        """Whether it is one under a setting."""
        if self.one_replica:
            return setting.partition_size == setting.world_size
        return self.to_all or setting.partition_size is not None


_UNEVEN = (
    "it asks for unequal numbers of batches, with which a rank would leave its partition group waiting: refused by "
    "name. Accelerate's own cannot join ranks on CPUs either"
)
REASONS = {
    "test_script": (
        Reason(
            "test_split_between_processes_tensor",
            r"torch.Size\(\[0, 4\]\)",
            "it has two rows to split, and three processes or more leave one without",
            to_all=True,
        ),
    ),
    "test_sync, with rows": (
        Reason(
            "test_",
            "Gradients in sync when they should not be",
            "with one replica hop 1 is over all ranks, and is part of each backward: gradients are in sync after every "
            "micro-step, as no hop 2 is left to wait with",
            one_replica=True,
        ),
    ),
    "test_distributed_data_loop": (
        Reason("main", "expects that two GPUs", "it asks for two processes", to_all=True),
        Reason("test_can_join_uneven_inputs", "even_batches=False leaves ranks", _UNEVEN),
        Reason("test_join_can_override", "even_batches=False leaves ranks", _UNEVEN),
        Reason("test_join_raises_warning_for_iterable", "even_batches=False leaves ranks", _UNEVEN),
        Reason(
            "test_join_raises_warning_for_non_ddp",
            "IndexError",
            "it waits for a warning that nothing is joined; ranks have equally many batches, so nothing has to be",
        ),
    ),
    "test_merge_weights": (
        Reason(
            "the script",
            "fsdp_plugin asks Accelerate to shard",
            "it shards by Accelerate's plugin for FSDP, which is refused by name, and merges that one's files; "
            "`mics export` merges ours",
        ),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What became of a function under a setting: "passes", "fails", or why it does not apply."""

    result: str
    says: str = ""


@dataclass(frozen=True)
class Line:
    """A function of a script.

    Attributes:
        script, function: their names; of a script that does not apply there is no function.
        outcomes: by the settings' names; none where `why_not` is the same for all.
        why_not: why it does not apply anywhere.
    """

    script: str
    function: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    why_not: str = ""

    def under(self, setting: Setting) -> Outcome | None:
        """What became of it; a failure that has a reason is none."""
        outcome = self.outcomes.get(setting.name)
        return None if outcome is None else explained(self.script, self.function, outcome, setting)


# -- starts ------------------------------------------------------------------------------------------------------------


def judge(script: Script, setting: Setting, model: Path) -> dict[str, Outcome]:
    """Start a script, and again without what failed, until nothing fails."""
    outcomes: dict[str, Outcome] = {}
    for calls in ((), script.calls) if script.calls else ((),):
        while True:
            skip = tuple(name for name, outcome in outcomes.items() if outcome.result == "fails")
            found = _start(script, setting, calls, skip, model)
            outcomes |= found
            if not any(is_test(name) and each.result == "fails" and name not in skip for name, each in found.items()):
                break
    return outcomes


def _start(
    script: Script, setting: Setting, calls: Sequence[Call], skip: tuple[str, ...], model: Path
) -> dict[str, Outcome]:
    with tempfile.TemporaryDirectory(prefix="mics-scripts-") as folder:
        found: dict[str, Outcome] = {}
        for number, arguments in enumerate(script.arguments):
            reports = Path(folder) / f"reports-{number}"
            reports.mkdir()
            given = tuple(str(model) if word == MODEL else word for word in arguments)
            order = Order(
                script=script.name,
                report=str(reports),
                partition_size=setting.partition_size,
                arguments=given,
                calls=tuple(calls),
                skip=skip,
                stand_ins=script.stand_ins,
                rows=script.rows,
            )
            said = _launch(order, Path(folder), setting.world_size)
            part = read(reports, said)
            suffix = "" if len(script.arguments) == 1 else f", start {number + 1}"
            found |= {name + suffix: outcome for name, outcome in part.items()}
            if any(each.result == "fails" for each in part.values()):
                break
        return found


def _launch(order: Order, folder: Path, world_size: int) -> str:
    """Run it to its end, or to the limit; what it said last, if it failed."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size))
    command = [sys.executable, *torchrun, "-m", "compatibility.accelerate_rank", order.dump()]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(world_size),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        return f"it was not over after {_LIMIT} s"
    finally:
        if process.poll() is None:
            _end(process)
    return "" if process.returncode == 0 else said.strip()[-2000:]


def _end(process: subprocess.Popen[str]) -> None:
    """With the ranks, each of which torchrun has given a session of its own and ends when it is told to end."""
    process.terminate()
    try:
        process.wait(timeout=40)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def environment(world_size: int) -> dict[str, str]:
    """The variables of a start."""
    return os.environ | {
        "ACCELERATE_NUM_PROCESSES": str(world_size),
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "TOKENIZERS_PARALLELISM": "false",
    }


# -- what ranks told ---------------------------------------------------------------------------------------------------


def read(reports: Path, said: str) -> dict[str, Outcome]:
    """What the ranks noted, in the order of the first that did; of what did not end, what the start said last."""
    files = sorted(reports.glob("*.jsonl"))
    ranks = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    names = dict.fromkeys(note["name"] for notes in ranks for note in notes)
    if not names:
        return {"the script": Outcome("fails", said.splitlines()[-1] if said else "it said nothing")}
    return {name: _of_ranks(name, ranks, said) for name in names}


def _of_ranks(name: str, ranks: Sequence[Sequence[dict[str, str]]], said: str) -> Outcome:
    last = [[note for note in notes if note["name"] == name][-1:] for notes in ranks]
    ends = [notes[0] for notes in last if notes]
    if all(note["what"] == "passes" for note in ends):
        return Outcome("passes")
    errors = [note["says"] for note in ends if note["what"] == "fails"]
    own = [error for error in errors if not _NOISE.search(error)] or errors
    return Outcome("fails", own[0] if own else said.splitlines()[-1] if said else "it did not end")


def explained(script: str, function: str, outcome: Outcome, setting: Setting) -> Outcome:
    """A failure that has a reason is none."""
    if outcome.result == "fails":
        for reason in REASONS.get(script, ()):
            told = function.startswith(reason.function) and re.search(reason.says, outcome.says)
            if told and reason.holds(setting):
                return Outcome(reason.why, outcome.says)
    return outcome


# -- results -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """Lines, in the order of `SCRIPTS`, and what they were found with."""

    about: dict[str, Any]
    lines: list[Line]

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote; see `kept.load`."""
        content = kept.load(path, FORMAT)
        return cls(content["about"], [_line(each) for each in content["lines"]])

    def save(self, path: Path) -> None:
        kept.save(path, FORMAT, about=self.about, lines=[asdict(line) for line in self.lines])

    def with_lines(self, script: str, lines: Iterable[Line]) -> Results:
        """With those of a script in the place of what it had."""
        names = [each.title for each in SCRIPTS]
        others = [*(line for line in self.lines if line.script != script), *lines]
        return replace(self, lines=sorted(others, key=lambda line: names.index(line.script)))

    def every(self) -> list[Line]:
        """Of each script; those that were not run say so."""
        found = {each.title: [line for line in self.lines if line.script == each.title] for each in SCRIPTS}
        return [line for title, lines in found.items() for line in lines or [Line(title, why_not="it was not run")]]


def _line(content: dict[str, Any]) -> Line:
    outcomes = {name: Outcome(**outcome) for name, outcome in content.pop("outcomes").items()}
    return Line(outcomes=outcomes, **content)


def lines_of(script: Script, model: Path) -> list[Line]:
    """A script under each setting."""
    if script.why_not:
        return [Line(script.title, why_not=script.why_not)]
    found = {setting.name: judge(script, setting, model) for setting in script.settings}
    functions = dict.fromkeys(name for outcomes in found.values() for name in outcomes)
    return [
        Line(script.title, name, {setting: outcomes[name] for setting, outcomes in found.items() if name in outcomes})
        for name in functions
    ]


def newest(folder: Path = FOLDER) -> Path | None:
    """The file of results of the latest date."""
    return max(folder.glob("*-accelerate-scripts.json"), default=None)


def table(lines: Sequence[Line]) -> str:
    """For the document: a row a function, a column a setting; and the reasons, by number, below."""
    reasons: dict[str, int] = {}
    rows = [_cells(line, reasons) for line in lines]
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    columns = ("script", "function", *(setting.name for setting in SETTINGS))
    return documents.markdown(columns, rows) + ("\n\n" + "\n".join(notes) if notes else "")


def _cells(line: Line, reasons: dict[str, int]) -> list[str]:
    script, _, more = line.script.partition(",")
    script = f"`{script}`" + ("," + more if more else "")
    if line.why_not:
        return [script, "", *[f"n/a ({_number(line.why_not, reasons)})"] * len(SETTINGS)]
    found = [line.under(setting) for setting in SETTINGS]
    return [script, f"`{line.function}`", *(_cell(outcome, reasons) for outcome in found)]


def _cell(outcome: Outcome | None, reasons: dict[str, int]) -> str:
    if outcome is None:
        return ""
    if outcome.result == "passes":
        return "passes"
    if outcome.result == "fails":
        return f"fails ({_number(outcome.says, reasons)})"
    return f"n/a ({_number(outcome.result, reasons)})"


def _number(reason: str, reasons: dict[str, int]) -> int:
    return reasons.setdefault(reason, len(reasons) + 1)


# -- the command -------------------------------------------------------------------------------------------------------


def chosen(names: Sequence[str]) -> list[Script]:
    """The scripts of these titles, or all.

    Raises:
        typer.BadParameter: for a name that no script has.
    """
    known = {each.title: each for each in SCRIPTS}
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"there is no script {', '.join(unknown)}; choose of {'; '.join(known)}")
    return [known[name] for name in names] or [*SCRIPTS]


@app.command()
def main(
    script: Annotated[list[str] | None, typer.Option(help="Of this name only; may be repeated.")] = None,
    table_only: Annotated[bool, typer.Option("--table", help="Write the newest results into the document.")] = False,
) -> None:
    """Run scripts, or write the table of what was run."""
    if table_only:
        if (path := newest()) is None:
            raise typer.BadParameter(f"there are no results in {FOLDER}")
        documents.write(DOCUMENT, "scripts", table(Results.load(path).every()))
        return
    path, console = FOLDER / f"{datetime.now(UTC):%Y-%m-%d}-accelerate-scripts.json", Console()
    with tempfile.TemporaryDirectory(prefix="mics-model-") as folder:
        model = write_model(Path(folder))
        for each in chosen(script or []):
            lines = lines_of(each, model)
            results = Results.load(path) if path.exists() else Results(about(), [])
            results.with_lines(each.title, lines).save(path)
            for line in lines:
                console.print(each.title, line.function, {k: v.result for k, v in line.outcomes.items()})


if __name__ == "__main__":
    app()
