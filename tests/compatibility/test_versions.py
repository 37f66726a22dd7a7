"""Rows of versions: what is installed for them, what they report, and the table that the document has."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from compatibility import documents, versions
from compatibility.environments import Unavailable, constraints, interpreter, last_line
from compatibility.versions import CASES, Case, Claims, Results, Row, chosen, newest, outcomes, table

_FOUND = {"torch": "2.13.0+cpu", "lightning": "2.6.6", "accelerate": "1.15.0"}


def test_a_case_takes_the_place_of_what_is_constrained() -> None:
    lines = ["# a comment", "", "torch==2.13.0", "pytorch-lightning==2.6.6", "PyYAML==6.0.3", "lightning==2.6.6"]
    pins = {"torch": "2.11.0", "lightning": "", "pyyaml": "6.0.2"}
    assert constraints(lines, pins, without=["pytorch-lightning"]) == ["torch==2.11.0", "pyyaml==6.0.2"]
    assert constraints(lines, {}) == lines[2:]


def test_what_pip_says_last_is_told_without_addresses() -> None:
    said = "Looking in indexes: https://a.b/simple\nERROR: No matching distribution for x at https://a.b/x.whl\n\n"
    assert last_line(said) == "No matching distribution for x at ..."


def test_an_interpreter_is_one_that_runs_and_is_of_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    stand_in = tmp_path / f"python{own}"
    stand_in.write_text("#!/bin/sh\nexit 127\n")
    stand_in.chmod(0o755)
    assert interpreter(own, [stand_in, Path(sys.executable)]) == Path(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=f"there is no Python {own}"):
        interpreter(own)


def test_a_row_without_its_interpreter_is_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_copy", lambda folder: folder)
    row = versions.run(Case("old", python="2.0"))
    assert (row.result, row.reason, row.versions) == ("untested", "there is no Python 2.0 here", {})


def test_what_pytest_reports() -> None:
    report = """<testsuites><testsuite>
    <testcase classname="tests.a" name="one"/>
    <testcase classname="tests.a" name="two"><skipped message="why"/></testcase>
    <testcase classname="tests.a" name="three[x]"><failure>no</failure></testcase>
    <testcase classname="" name="tests.b"><error>no such module</error></testcase>
    </testsuite></testsuites>"""
    assert outcomes(report) == (1, ["tests.a::three[x]", "tests.b"])


def test_rows_go_by_name_and_stay_in_order(tmp_path: Path) -> None:
    first, second = (Row(case, "passes", passed=3, versions=_FOUND) for case in CASES[:2])
    again = Row(CASES[0], "untested", reason="no")
    results = Results({"date": "2026"}, []).with_row(second).with_row(first).with_row(again)
    path = tmp_path / "2026-01-01-versions.json"
    results.save(path)
    assert Results.load(path) == Results({"date": "2026"}, [again, second])
    assert [row.reason for row in results.every()] == ["no", "", *["not run"] * (len(CASES) - 2)]
    (tmp_path / "2025-12-31-versions.json").write_text("{}")
    assert newest(tmp_path) == path


def test_the_table_names_what_was_found_or_asked_for() -> None:
    rows = [
        Row(Case("a"), "passes", passed=7, versions=_FOUND),
        Row(Case("b", torch=""), "untested", reason="no matching distribution"),
        Row(Case("c"), "fails", versions=_FOUND | {"lightning": "2.5.5"}, failed=["a::x", "y"], reason="mended"),
    ]
    assert table(rows).splitlines()[2:] == [
        "| 3.11 | 2.13.0 | 2.6.6 | 1.15.0 | passes (7 tests) | yes |",
        "| 3.11 | newest | 2.6.6 | 1.15.0 | untested: no matching distribution |  |",
        "| 3.11 | 2.13.0 | 2.5.5 | 1.15.0 | fails: `x`, `y`; mended | no |",
    ]


@pytest.mark.parametrize(
    ("change", "admits"),
    [({}, True), ({"torch": "2.10.0"}, False), ({"lightning": "2.7.0"}, False), ({"accelerate": "1.0.0"}, False)],
)
def test_what_the_package_admits(change: dict[str, str], admits: bool) -> None:
    assert Claims.read().admit("3.11", _FOUND | change) is admits
    assert not Claims.read().admit("3.10", _FOUND | change)


def test_an_unknown_row_is_refused_with_those_that_there_are() -> None:
    assert [case.name for case in chosen(["newest"])] == ["newest"]
    assert chosen([]) == [*CASES]
    with pytest.raises(typer.BadParameter, match=r"no row torch-1; choose of torch-2\.11"):
        chosen(["torch-1"])


def test_every_test_of_a_row_is_there() -> None:
    for name in versions.TESTS:
        path, _, function = name.partition("::")
        text = (versions.ROOT / path).read_text()
        assert not function or f"\ndef {function.partition('[')[0]}(" in text, name


def test_the_document_has_the_newest_results() -> None:
    path = newest()
    assert path is not None
    assert documents.between(versions.DOCUMENT.read_text(), "versions") == table(Results.load(path).every())


def test_bounds_are_what_passed() -> None:
    """No row within the bounds fails as it stands, and the lowest torch that they admit has a row that passes."""
    path = newest()
    assert path is not None
    rows = Results.load(path).rows
    assert not [row.case.name for row in rows if row.claimed and row.result == "fails" and not row.reason]
    passed = [row.versions for row in rows if row.result == "passes"]
    torch = next(each for each in Claims.read().requirements if each.name == "torch")
    lowest = next(bound.version for bound in torch.specifier if bound.operator == ">=")
    assert any(found["torch"].startswith(lowest) for found in passed)


def test_results_of_another_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"format": 0}')
    loads: list[Any] = [Results.load]
    for load in loads:
        with pytest.raises(ValueError, match="format 0 is not 1"):
            load(path)
