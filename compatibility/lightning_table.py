"""The table of Lightning's tests: which are run with "mics", which differ from what they say, and which do not apply.

It is `lightning_tests.yaml`. For each file there are tests to `run`; groups that `differ`, each with the reason and the
error that a user gets, which has to come; and groups that do `not_apply`, each with the reason. A test is named by its
function (with its class, if it has one), or together with its parameters, which counts more; `*` stands for any.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from compatibility.lightning_report import Outcome, Result

FILE = Path(__file__).with_name("lightning_tests.yaml")
_KEYS = {"replace", "keep", "run", "differ", "not_apply"}
_GROUP_KEYS = {"differ": {"why", "error", "tests"}, "not_apply": {"why", "tests"}}


@dataclass(frozen=True)
class Plan:
    """What is to become of a test.

    Attributes:
        outcome: PASSED if it has to pass; DIFFERS, NOT_APPLYING, or UNKNOWN.
        why: the reason.
        error: a pattern that the message of one that differs has to have in it.
        keep: names of strategies that stay what they are in it.
    """

    outcome: Outcome
    why: str = ""
    error: str = ""
    keep: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        return self.outcome in (Outcome.PASSED, Outcome.DIFFERS)

    def judge(self, test: str, result: Result | None) -> Result:
        """What became of it, where `result` is that of its run."""
        if result is None:
            return Result(test, self.outcome, self.why)
        if result.outcome == Outcome.SKIPPED:
            return result.now(Outcome.FAILED, f"skipped: {result.message}")
        if result.outcome == Outcome.PASSED and not result.made:
            return result.now(Outcome.FAILED, "it passed, but made no Trainer or Fabric with mics")
        if self.outcome == Outcome.PASSED:
            return result
        if result.outcome == Outcome.PASSED:
            return result.now(Outcome.FAILED, f"it passes, and the table says that it differs: {self.why}")
        if not re.search(self.error, result.message):
            return result.now(Outcome.FAILED, f"not the error {self.error!r}:\n{result.message}")
        return result.now(Outcome.DIFFERS, self.why)


_UNKNOWN = Plan(Outcome.UNKNOWN, "no row of the table names it")


@dataclass(frozen=True)
class Rows:
    """A file's part of the table.

    Attributes:
        plans: by the test's name within the file.
        replace: text in the copy, and what stands there instead.
    """

    plans: Mapping[str, Plan]
    replace: tuple[tuple[str, str], ...] = ()

    @classmethod
    def read(cls, file: str, content: Mapping[str, Any]) -> Rows:
        """Raises:
        ValueError: for what is misspelt, incomplete or there twice.
        """
        _check_keys(file, content, _KEYS)
        keep = content.get("keep", {})
        plans: dict[str, Plan] = {}

        def add(test: str, plan: Plan) -> None:
            if test in plans:
                raise ValueError(f"{file}: {test} stands twice in the table; leave one of the rows")
            plans[test] = plan

        for test in content.get("run", ()):
            add(test, Plan(Outcome.PASSED, keep=tuple(keep.get(test, ()))))
        for key, outcome in (("differ", Outcome.DIFFERS), ("not_apply", Outcome.NOT_APPLYING)):
            for group in content.get(key, ()):
                _check_keys(f"{file}, {key}", group, _GROUP_KEYS[key])
                if missing := _GROUP_KEYS[key] - set(group):
                    raise ValueError(f"{file}, {key}: a group has no {', '.join(sorted(missing))}")
                for test in group["tests"]:
                    add(test, Plan(outcome, group["why"], group.get("error", ""), tuple(keep.get(test, ()))))
        if strangers := set(keep) - set(plans):
            raise ValueError(f"{file}: keep names {', '.join(sorted(strangers))}, which no row does")
        return cls(plans, tuple((old, new) for old, new in content.get("replace", ())))

    def row(self, test: str) -> str | None:
        """The row for a test: of its name with parameters, as they are or as a pattern, or without."""
        function, _, parameters = test.partition("[")
        patterns = (row for row in self.plans if row.startswith(f"{function}[") and "*" in row)
        matching = (row for row in patterns if fnmatchcase(parameters, row.partition("[")[2]))
        return next((row for row in (test, *matching, function) if row in self.plans), None)


def _check_keys(where: str, content: Mapping[str, Any], known: set[str]) -> None:
    if strangers := set(content) - known:
        raise ValueError(f"{where}: {sorted(strangers)} is not understood; choose of {sorted(known)}")


@dataclass
class Table:
    """All of it.

    Attributes:
        files: by path within Lightning's folder `tests`.
        gone: after `plans`: rows, as "file::test", without a test.
    """

    files: Mapping[str, Rows]
    gone: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path = FILE) -> Table:
        """Raises:
        ValueError: as `Rows.read`.
        """
        content = yaml.safe_load(path.read_text())
        return cls({file: Rows.read(file, rows) for file, rows in content.items()})

    def plans(self, tests: Iterable[str], files: Iterable[str]) -> dict[str, Plan]:
        """What is to become of tests, by pytest's names; those that no row names are unknown.

        Args:
            tests: all that were collected in `files`.
            files: those whose rows have to have a test each.
        """
        found: dict[str, Plan] = {}
        used: set[str] = set()
        for test in tests:
            file, _, name = test.partition("::")
            row = self.files[file].row(name)
            found[test] = _UNKNOWN if row is None else self.files[file].plans[row]
            used.add(f"{file}::{row}")
        self.gone = [name for file in files for row in self.files[file].plans if (name := f"{file}::{row}") not in used]
        return found
