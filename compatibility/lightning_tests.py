"""Lightning's own tests as a judge: those that apply to a sharded strategy, run with "mics" on the CPU.

    python -m compatibility.lightning_tests [--source FOLDER_OR_GIT_URL] [--only PART_OF_A_FILE'S_NAME]

Which files, how each test is run, and why one does not apply stand in `lightning_tests.yaml`. Each test ends as one of
`Outcome`; a test that the table does not know, and a row without a test, make the command fail as a failed test does.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.results import about
from compatibility.lightning_processes import ALONE, KEPT, REPORT, run
from compatibility.lightning_report import Outcome, Result, write
from compatibility.lightning_source import copied
from compatibility.lightning_table import Plan, Table

app = typer.Typer(add_completion=False)

_FOLDER = Path(__file__).parent / "results"
_ROOT = Path(__file__).parents[1]
_SETTINGS = "[pytest]\nmarkers =\n    cloud: needs a network\nxfail_strict = true\n"


@dataclass(frozen=True)
class Runner:
    """Runs tests of a copy of Lightning's.

    Attributes:
        tests: the copied folder `tests`.
        reports: where processes tell what they do.
        seconds: that a single test may take.
    """

    tests: Path
    reports: Path
    seconds: int

    def collected(self, files: Iterable[str]) -> list[str]:
        """The tests of these files, by pytest's names.

        Raises:
            RuntimeError: if a file cannot be imported, with what pytest says.
        """
        report = self.reports / "collected.jsonl"
        output, code = self._pytest(["--collect-only", "-q", *files], report, 600)
        if code != 0:
            raise RuntimeError(f"Lightning's tests cannot be collected:\n{output}")
        return [event["test"] for event in _events(report) if event["event"] == "collected"]

    def run(self, file: str, tests: Mapping[str, Plan]) -> list[Result]:
        """Run tests of a file: beside one another, and those that start further processes alone."""
        waiting, results = dict(tests), []
        while waiting:
            ended = self._together(file, waiting)
            results += ended
            for result in ended:
                del waiting[result.test]
        return [
            self._alone(result.test, tests[result.test]) if result.outcome == Outcome.NEEDS_PROCESSES else result
            for result in results
        ]

    def _together(self, file: str, tests: Mapping[str, Plan]) -> list[Result]:
        report = self.reports / (file.replace("/", ".") + f".{len(tests)}.jsonl")
        output, _ = self._pytest(list(tests), report, self.seconds * len(tests), kept=_kept(tests))
        return _results(report, output, first=next(iter(tests)))

    def _alone(self, test: str, plan: Plan) -> Result:
        report = self.reports / f"alone.{abs(hash(test))}.jsonl"
        output, code = self._pytest([test], report, self.seconds, kept=_kept({test: plan}), alone=True)
        result = _results(report, output, first=test)[0]
        if result.outcome == Outcome.PASSED and code != 0:
            return replace(result, outcome=Outcome.FAILED, message=f"exit code {code}\n{_end(output)}")
        return result

    def _pytest(
        self, arguments: list[str], report: Path, seconds: float, kept: str = "{}", alone: bool = False
    ) -> tuple[str, int]:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            REPORT: str(report),
            KEPT: kept,
        }
        environment |= {ALONE: "1"} if alone else {}
        options = ["-p", "compatibility.lightning_plugin", "-p", "no:cacheprovider", "--tb=short"]
        options += ["--timeout", str(self.seconds), "--timeout-method", "thread"]
        output = report.with_suffix(".txt")
        output.touch()
        code = run([*options, *arguments], self.tests, environment, output, seconds + 60, ranks=alone)
        return output.read_text(errors="replace"), code


def _kept(tests: Mapping[str, Plan]) -> str:
    return json.dumps({test: list(plan.keep) for test, plan in tests.items() if plan.keep})


def _events(report: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []


def _results(report: Path, output: str, first: str) -> list[Result]:
    """What ended; where a process ended within a test, or before `first`, that test has failed."""
    events = _events(report)
    ended = [
        Result(event["test"], Outcome(event["outcome"]), event["message"], event["seconds"], event["made"])
        for event in events
        if event["event"] == "ended"
    ]
    done = {result.test for result in ended}
    began = [event["test"] for event in events if event["event"] == "began"]
    lost = [test for test in began or [first] if test not in done]
    return ended + [Result(test, Outcome.FAILED, f"its process ended\n{_end(output)}") for test in lost[-1:]]


def _end(output: str) -> str:
    return "\n".join(output.splitlines()[-60:])


@app.command()
def main(
    source: Annotated[str, typer.Option(help="A folder that holds tests/, or a git repository.")] = "",
    only: Annotated[str, typer.Option(help="Run the files whose names have this in them, and write nothing.")] = "",
    workers: Annotated[int, typer.Option(help="Files that run beside one another.")] = 1,
    seconds: Annotated[int, typer.Option(help="That a test may take.")] = 120,
    show: Annotated[bool, typer.Option(help="Print what failed.")] = True,
) -> None:
    """Run Lightning's tests, print the counts, and write what became of each test to `compatibility/results`."""
    console, table = Console(highlight=False, soft_wrap=True), Table.load()
    files = [file for file in table.files if only in file]
    with tempfile.TemporaryDirectory() as folder:
        tests, version = copied(source, Path(folder), table)
        console.print(f"Lightning's tests of {version}")
        (tests / "pytest.ini").write_text(_SETTINGS)
        reports = Path(folder, "reports")
        reports.mkdir()
        runner = Runner(tests, reports, seconds)
        plans = table.plans(runner.collected(files), files)
        with ThreadPoolExecutor(workers) as pool:
            results = []
            for file, found in zip(files, pool.map(partial(_file, runner, plans), files), strict=True):
                console.print(f"{file}: {len(found)} tests, {sum(each.outcome.wrong for each in found)} of them wrong")
                results += found
    results += [Result(row, Outcome.GONE, "the table has it, and Lightning has not") for row in table.gone]
    wrong = [result for result in results if result.outcome.wrong]
    for result in wrong if show else ():
        console.print(f"{result.outcome}: {result.test}\n{result.message}\n", markup=False)
    counts = Counter(result.outcome for result in results)
    console.print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    if not only:
        console.print(f"written to {write(_FOLDER, about(tests=version), results)}")
    raise typer.Exit(bool(wrong))


def _file(runner: Runner, plans: Mapping[str, Plan], file: str) -> list[Result]:
    mine = {test: plan for test, plan in plans.items() if test.startswith(f"{file}::")}
    judged = {result.test: result for result in runner.run(file, {t: p for t, p in mine.items() if p.runs})}
    return [plan.judge(test, judged.get(test)) for test, plan in mine.items()]


if __name__ == "__main__":
    app()
