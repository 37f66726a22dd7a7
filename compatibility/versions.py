"""Versions: a short, telling part of the tests, in a fresh environment of each of several versions.

    python -m compatibility.versions
    python -m compatibility.versions --row torch-2.11 --row accelerate-1.13
    python -m compatibility.versions --python ~/python3.13/bin/python --pip=--index-url --pip=https://INDEX
    python -m compatibility.versions --table

A row is the newest of everything but what it names; what no row names is as in `constraints.txt`. pip is asked as its
own configuration says, `PIP_CONFIG_FILE` and the like included. The environment is made in a temporary folder, from the
tracked files as they are in the working tree, and is removed when its row is done. Results are kept in
`compatibility/results/DATE-versions.json`, where a row that is run again takes the place of what stood there;
`--table` writes the newest of them into `docs/compatibility.md`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console

from benchmarks.results import about
from compatibility import documents, kept
from compatibility.environments import Environment, Unavailable, constraints, interpreter, last_line, without_ours

app = typer.Typer(add_completion=False)

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).parent / "results"
DOCUMENT = ROOT / "docs" / "compatibility.md"
FORMAT = 1
PACKAGES = ("torch", "lightning", "accelerate")
_TOOLS = ("hypothesis", "numpy", "pytest", "pytest-timeout", "tokenizers", "transformers")
_LIMIT = 1500  # seconds that the tests of a row may take


@dataclass(frozen=True)
class Case:
    """What a row asks for.

    Attributes:
        name: of the row.
        torch, lightning, accelerate: versions; an empty one is the newest.
        python: as "3.11".
    """

    name: str
    torch: str = "2.13.0"
    lightning: str = "2.6.6"
    accelerate: str = "1.15.0"
    python: str = "3.11"


CASES = (
    Case("torch-2.11", torch="2.11.0"),
    Case("torch-2.12", torch="2.12.0"),
    Case("torch-2.13"),
    Case("torch-2.14", torch="2.14.1"),
    Case("newest", torch="", lightning="", accelerate=""),
    Case("python-3.12", python="3.12"),
    Case("python-3.12-newest", python="3.12", torch=""),
    Case("python-3.13", python="3.13"),
    Case("python-3.13-newest", python="3.13", torch=""),
    Case("lightning-2.5", lightning="2.5.6"),
    Case("lightning-2.6.0", lightning="2.6.0"),
    Case("lightning-2.6.1", lightning="2.6.1"),
    Case("lightning-2.6.4", lightning="2.6.4"),
    Case("lightning-2.6.5", lightning="2.6.5"),
    Case("accelerate-1.13", accelerate="1.13.0"),
    Case("accelerate-1.14", accelerate="1.14.0"),
)

# What every layer needs, those places first that `_compat` names.
TESTS = (
    "tests/test_layers.py",
    "tests/test_loaders.py",
    "tests/test_materialize.py",
    "tests/test_topology.py",
    "tests/test_fake_world.py::test_traffic_of_512_ranks",
    "tests/planner/test_activations.py",
    "tests/distributed/test_blocks_in_step.py::test_every_path_gets_its_gradient[4]",
    "tests/distributed/test_sums.py::test_what_is_held_whole_is_dropped_or_taken_along_or_reduced_without_a_backward",
    "tests/distributed/test_precision.py::test_sums_of_16_bit_parameters_are_fp32",
    "tests/distributed/test_windows.py::test_an_exception_in_mid_window_then_fit_again",
    "tests/distributed/test_trainer.py::test_fit_validate_test_predict_by_name_and_as_an_instance",
    "tests/distributed/test_trainer.py::test_the_name_in_pytorch_lightning",
    "tests/distributed/test_resume.py::test_resume_in_mid_epoch_with_dropout_is_exact",
    "tests/distributed/test_preemption.py::test_all_ranks_stop_after_the_same_step_whoever_got_the_signal",
    "tests/distributed/test_fabric.py::test_losses_norms_and_parameters_are_those_of_ddp",
    "tests/distributed/test_accelerate.py::test_losses_parameters_and_norms_are_those_of_ddp",
    "tests/distributed/test_accelerate_checkpoints.py::test_resumes_where_it_was_saved_beside_training",
    "tests/checkpoint/test_directory.py::test_one_replica_is_written_and_shared_among_all_ranks",
)


@dataclass(frozen=True)
class Row:
    """What became of a case.

    Attributes:
        case: what was asked for.
        versions: what was installed, by name.
        result: "passes", "fails" or "untested".
        reason: why it is untested: its environment cannot be made, or the machine is too busy; of one that fails, what
            has been done since.
        failed: the tests that failed.
        passed: how many passed.
        seconds: of making the environment, and of the tests.
        date, commit: of the run.
    """

    case: Case
    result: str
    reason: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    passed: int = 0
    seconds: list[float] = field(default_factory=list)
    date: str = ""
    commit: str = ""

    @property
    def claimed(self) -> bool | None:
        """Whether the package's bounds, as they are now, admit these versions; None where there are none."""
        return Claims.read().admit(self.case.python, self.versions) if self.versions else None


# -- what the package asks for -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claims:
    """What `pyproject.toml` says.

    Attributes:
        python: versions of Python.
        requirements: of the package, and of its part for Accelerate.
    """

    python: SpecifierSet
    requirements: tuple[Requirement, ...]

    @classmethod
    def read(cls, path: Path = ROOT / "pyproject.toml") -> Claims:
        project = tomllib.loads(path.read_text())["project"]
        named = [*project["dependencies"], *project["optional-dependencies"]["accelerate"]]
        return cls(SpecifierSet(project["requires-python"]), tuple(Requirement(each) for each in named))

    def admit(self, python: str, versions: dict[str, str]) -> bool:
        """Whether a user may have these versions together."""
        asked = [each for each in self.requirements if each.name in PACKAGES]
        return self.python.contains(python) and all(
            each.specifier.contains(versions[each.name], prereleases=True) for each in asked
        )

    def others(self) -> list[str]:
        """Requirements that no row varies."""
        return [str(each) for each in self.requirements if each.name not in PACKAGES]


# -- a row -------------------------------------------------------------------------------------------------------------


def run(case: Case, pythons: Sequence[Path] = (), options: Sequence[str] = ()) -> Row:
    """Make the environment of a case, run the tests in it, and remove it."""
    row = Row(case, "untested", date=f"{datetime.now(UTC):%Y-%m-%d}", commit=_commit())
    with tempfile.TemporaryDirectory(prefix="mics-versions-") as folder:
        source = _copy(Path(folder) / "source")
        began = time.monotonic()
        try:
            environment = _environment(case, Path(folder), source, interpreter(case.python, pythons), options)
        except Unavailable as error:
            return replace(row, reason=str(error))
        found = environment.versions()
        row = replace(
            row,
            versions={name: found[name] for name in PACKAGES},
            seconds=[round(time.monotonic() - began, 1)],
        )
        return _tested(row, environment, source)


def _environment(case: Case, folder: Path, source: Path, python: Path, options: Sequence[str]) -> Environment:
    environment = Environment.make(folder / "environment", python, options)
    pins = {name: getattr(case, name) for name in PACKAGES}
    listed = folder / "constraints.txt"
    lines = (source / "constraints.txt").read_text().splitlines()
    listed.write_text("\n".join(constraints(lines, pins, without=_follow(case))) + "\n")
    environment.install("--constraint", listed, *PACKAGES, *Claims.read().others(), *_TOOLS)
    environment.install("--no-deps", source)
    return environment


def _follow(case: Case) -> Iterable[str]:
    """What an older Lightning holds back, and what comes with it."""
    return ("pytorch-lightning",) if case.lightning.startswith("2.6") else ("pytorch-lightning", "fsspec", "packaging")


def _copy(folder: Path) -> Path:
    """The tracked files, so that nothing that is built from them lies beside them."""
    named = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True)
    for name in filter(None, named.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def _tested(row: Row, environment: Environment, source: Path) -> Row:
    report, began = source / "report.xml", time.monotonic()
    options = ("-q", "-p", "no:cacheprovider", f"--junitxml={report}")
    command = [str(environment.python), "-m", "pytest", *options, *TESTS]
    try:
        done = subprocess.run(
            command, cwd=source, env=without_ours(os.environ), capture_output=True, text=True, timeout=_LIMIT
        )
    except subprocess.TimeoutExpired:
        return replace(row, result="untested", reason=f"its tests were not over after {_LIMIT} s")
    row = replace(row, seconds=[*row.seconds, round(time.monotonic() - began, 1)])
    if not report.exists():
        return replace(row, result="fails", failed=[last_line(done.stderr or done.stdout)])
    passed, failed = outcomes(report.read_text())
    if done.returncode != 0 and not failed:
        failed = [last_line(done.stdout + done.stderr)]
    return replace(row, result="fails" if failed else "passes", passed=passed, failed=failed)


def outcomes(report: str) -> tuple[int, list[str]]:
    """How many tests passed, and the names of those that failed, by pytest's report in XML."""
    passed, failed = 0, []
    for test in ElementTree.fromstring(report).iter("testcase"):
        kinds = {child.tag for child in test}
        if kinds & {"failure", "error"}:
            failed.append("::".join(filter(None, (test.get("classname", ""), test.get("name", "")))))
        elif "skipped" not in kinds:
            passed += 1
    return passed, failed


def _commit() -> str:
    return str(about()["commit"])


# -- results -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """Rows, in the order of `CASES`, and the machine."""

    about: dict[str, Any]
    rows: list[Row]

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote; see `kept.load`."""
        content = kept.load(path, FORMAT)
        return cls(content["about"], [Row(**{**row, "case": Case(**row["case"])}) for row in content["rows"]])

    def save(self, path: Path) -> None:
        kept.save(path, FORMAT, about=self.about, rows=[asdict(row) for row in self.rows])

    def with_row(self, row: Row) -> Results:
        """With `row` in the place of the one of its name."""
        names = [case.name for case in CASES]
        rows = [*(each for each in self.rows if each.case.name != row.case.name), row]
        known = [each for each in rows if each.case.name in names]
        return replace(self, rows=sorted(known, key=lambda each: names.index(each.case.name)))

    def every(self) -> list[Row]:
        """A row for each of `CASES`; those that were not run say so."""
        found = {row.case.name: row for row in self.rows}
        return [found.get(case.name) or Row(case, "untested", reason="not run") for case in CASES]


def newest(folder: Path = FOLDER) -> Path | None:
    """The file of results of the latest date."""
    return max(folder.glob("*-versions.json"), default=None)


def table(rows: Iterable[Row]) -> str:
    """For the document."""
    columns = ("Python", "torch", "Lightning", "Accelerate", "result", "within the package's bounds")
    return documents.markdown(columns, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    asked = {name: getattr(row.case, name) or "newest" for name in PACKAGES}
    found = [re.sub(r"\+.*", "", row.versions.get(name, asked[name])) for name in PACKAGES]
    claimed = {True: "yes", False: "no", None: ""}[row.claimed]
    return [row.case.python, *found, _said(row), claimed]


def _said(row: Row) -> str:
    if row.result == "untested":
        return f"untested: {row.reason}"
    if row.result == "passes":
        return f"passes ({row.passed} tests)"
    failed = [f"`{name.rpartition('::')[2]}`" for name in row.failed[:3]] + ["..."] * (len(row.failed) > 3)
    return f"fails: {', '.join(failed)}" + (f"; {row.reason}" if row.reason else "")


# -- the command -------------------------------------------------------------------------------------------------------


def chosen(names: Sequence[str]) -> list[Case]:
    """The cases of these names, or all.

    Raises:
        typer.BadParameter: for a name that no case has.
    """
    known = {case.name: case for case in CASES}
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"there is no row {', '.join(unknown)}; choose of {', '.join(known)}")
    return [known[name] for name in names] or [*CASES]


@app.command()
def main(
    row: Annotated[list[str] | None, typer.Option(help="Of this name only; may be repeated.")] = None,
    python: Annotated[list[Path] | None, typer.Option(help="Interpreters to look at before those on PATH.")] = None,
    pip: Annotated[list[str] | None, typer.Option(help="A word for `pip install`; may be repeated.")] = None,
    table_only: Annotated[bool, typer.Option("--table", help="Write the newest results into the document.")] = False,
) -> None:
    """Run rows, or write the table of what was run."""
    if table_only:
        if (path := newest()) is None:
            raise typer.BadParameter(f"there are no results in {FOLDER}")
        documents.write(DOCUMENT, "versions", table(Results.load(path).every()))
        return
    cases, console = chosen(row or []), Console()
    path = FOLDER / f"{datetime.now(UTC):%Y-%m-%d}-versions.json"
    for case in cases:
        done = run(case, python or [], pip or [])
        results = Results.load(path) if path.exists() else Results(about(), [])
        results.with_row(done).save(path)
        console.print(f"{case.name}: {_said(done)} {done.versions} {done.seconds}", markup=False)


if __name__ == "__main__":
    app()
