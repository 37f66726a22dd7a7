"""What became of Lightning's tests, and the page that tells of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Any


class Outcome(StrEnum):
    """Of a test.

    PASSED, FAILED: with "mics". DIFFERS: it fails with the error that the table says, and for the reason there.
    NOT_APPLYING: it is not run, for the reason there. UNKNOWN: the table has no row for it. GONE: a row has no test.
    SKIPPED, NEEDS_PROCESSES: as a process tells it; the one is a failure, the other is run again, alone.
    """

    PASSED = "passed"
    FAILED = "failed"
    DIFFERS = "differs"
    NOT_APPLYING = "does not apply"
    UNKNOWN = "unknown"
    GONE = "gone"
    SKIPPED = "skipped"
    NEEDS_PROCESSES = "needs processes"

    @property
    def wrong(self) -> bool:
        """Whether it makes the command fail."""
        return self not in (Outcome.PASSED, Outcome.DIFFERS, Outcome.NOT_APPLYING)


@dataclass(frozen=True)
class Result:
    """Of one test.

    Attributes:
        test: pytest's name of it.
        outcome: see there.
        message: the reason, or the end of what it printed.
        seconds: that it took.
        made: Trainers and Fabrics with "mics".
    """

    test: str
    outcome: Outcome
    message: str = ""
    seconds: float = 0.0
    made: int = 0

    @property
    def file(self) -> str:
        return self.test.partition("::")[0]

    def now(self, outcome: Outcome, message: str) -> Result:
        return replace(self, outcome=outcome, message=message)


_COLUMNS = (Outcome.PASSED, Outcome.DIFFERS, Outcome.NOT_APPLYING, Outcome.FAILED)


def write(folder: Path, about: Mapping[str, Any], results: Iterable[Result]) -> Path:
    """Write a page with the counts of each file, and a line for each test. Returns its path."""
    results = list(results)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    path = folder / f"{about['date'][:10]}-lightning-{about['options']['tests']}.md"
    lines = [
        f'# Lightning\'s own tests of {about["options"]["tests"]} with "mics"',
        "",
        f"{about['date']}, commit {about['commit']}; {versions}.",
        "",
        *counts(results),
    ]
    for file, found in groupby(results, lambda result: result.file):
        lines += ["", f"## {file}", ""]
        lines += [_line(result) for result in found]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def counts(results: Iterable[Result]) -> list[str]:
    """A table of how many tests of each file ended how."""
    lines = [f"| file | {' | '.join(_COLUMNS)} |", "|---|" + "---:|" * len(_COLUMNS)]
    total: Counter[Outcome] = Counter()
    for file, found in groupby(results, lambda result: result.file):
        count = Counter(result.outcome for result in found)
        total += count
        lines.append(_row(f"`{file}`", count))
    return [*lines, _row("all", total)]


def _row(name: str, count: Mapping[Outcome, int]) -> str:
    known = [count.get(outcome, 0) for outcome in _COLUMNS]
    known[-1] = sum(count.values()) - sum(known[:-1])  # whatever is wrong
    return f"| {name} | {' | '.join(map(str, known))} |"


def _line(result: Result) -> str:
    name = result.test.partition("::")[2]
    said = "" if result.outcome == Outcome.PASSED else f": {result.message.strip().splitlines()[-1]}"
    return f"- `{name}` {result.outcome}{said}"
