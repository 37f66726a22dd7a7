"""Accelerate's scripts: what ranks note of functions, what becomes of it, and the table that the document has."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import pytest
import torch
import typer
from accelerate.test_utils import scripts as accelerates

from compatibility import accelerate_scripts, documents, exchanged
from compatibility.accelerate_rank import Notes, Order, label, loaded
from compatibility.accelerate_scripts import (
    SCRIPTS,
    SETTINGS,
    Line,
    Outcome,
    Reason,
    Results,
    Script,
    Setting,
    chosen,
    explained,
    judge,
    newest,
    read,
    table,
)
from compatibility.stand_ins import Metric, pairs


def notes(folder: Path) -> list[tuple[str, str, str]]:
    lines = (folder / "0.jsonl").read_text().splitlines()
    return [tuple(json.loads(line).values()) for line in lines]  # type: ignore[misc]


def script() -> ModuleType:
    """One with a function that calls another, one that fails, and one that is no test."""
    module = ModuleType("a_script")
    source = """
def test_inner(flag, what=None): return flag
def test_outer(flag): return test_inner(flag)
def helper(): raise ValueError("what the\\nmatter is")
def training_check(): helper()
"""
    exec(source, module.__dict__)
    return module


def test_outermost_calls_are_noted_with_arguments_that_can_be_read(tmp_path: Path) -> None:
    module = script()
    Notes(tmp_path, 0).watch(module)
    assert module.test_outer(True) is True
    assert module.test_inner(3, what=object()) == 3
    assert module.test_outer(True) is True
    with pytest.raises(ValueError):
        module.training_check()
    assert [(name, what) for name, what, _ in notes(tmp_path)] == [
        ("test_outer(flag=True)", "begins"),
        ("test_outer(flag=True)", "passes"),
        ("test_inner(flag=3)", "begins"),
        ("test_inner(flag=3)", "passes"),
        ("test_outer(flag=True), call 2", "begins"),
        ("test_outer(flag=True), call 2", "passes"),
        ("training_check()", "begins"),
        ("training_check()", "fails"),
    ]
    assert notes(tmp_path)[-1][2].startswith("ValueError: what the (")


def test_what_is_left_out_is_not_called(tmp_path: Path) -> None:
    module = script()
    Notes(tmp_path, 0, skip=("training_check()",)).watch(module)
    assert module.training_check() is None
    assert not (tmp_path / "0.jsonl").exists()


def test_an_order_arrives_as_it_was_given() -> None:
    order = Order("test_sync", "/a", 2, ("--x",), (("f", {"flag": True}),), ("g()",), stand_ins=True)
    assert Order.parse(order.dump()) == order
    assert label(script().test_inner, (1,), {"what": "x"}) == "test_inner(flag=1, what=x)"


def _write(folder: Path, rank: int, *lines: tuple[str, str, str]) -> None:
    text = [json.dumps(dict(zip(("name", "what", "says"), line, strict=True))) for line in lines]
    (folder / f"{rank}.jsonl").write_text("\n".join(text) + "\n")


def test_a_function_passes_where_it_does_on_every_rank(tmp_path: Path) -> None:
    _write(tmp_path, 0, ("f", "begins", ""), ("f", "passes", ""), ("g", "begins", ""), ("g", "fails", "peer is gone"))
    _write(tmp_path, 1, ("f", "begins", ""), ("f", "passes", ""), ("g", "begins", ""), ("g", "fails", "the cause"))
    _write(tmp_path, 2, ("f", "begins", ""), ("f", "passes", ""), ("g", "begins", ""))
    assert read(tmp_path, "it said") == {"f": Outcome("passes"), "g": Outcome("fails", "the cause")}


def test_what_did_not_end_fails(tmp_path: Path) -> None:
    _write(tmp_path, 0, ("f", "begins", ""))
    assert read(tmp_path, "a\nit was not over after 9 s") == {"f": Outcome("fails", "it was not over after 9 s")}
    empty = tmp_path / "empty"
    empty.mkdir()
    assert read(empty, "") == {"the script": Outcome("fails", "it said nothing")}


def test_what_fails_is_left_out_of_the_next_start(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, tuple[str, ...]]] = []

    def start(script: Script, setting: Setting, calls: Any, skip: tuple[str, ...], model: Path) -> dict[str, Outcome]:
        started.append((len(calls), skip))
        ends = ("test_c",) if calls else ("test_a", "test_b", "main, outside its functions")
        found: dict[str, Outcome] = {}
        for name in (each for each in ends if each not in skip):
            found[name] = Outcome("passes" if name == "test_a" else "fails", name)
            if found[name].result == "fails":
                break
        return found

    monkeypatch.setattr(accelerate_scripts, "_start", start)
    found = judge(Script("x", calls=(("test_c", {}),)), SETTINGS[0], Path())
    assert [name for name, outcome in found.items() if outcome.result == "fails"] == [
        "test_b",
        "main, outside its functions",
        "test_c",
    ]
    skipped = ("test_b", "main, outside its functions")
    assert started == [(0, ()), (0, skipped[:1]), (1, skipped), (1, (*skipped, "test_c"))]


def test_a_failure_has_a_reason_where_it_says_what_the_reason_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(accelerate_scripts.REASONS, "x", (Reason("test_a", "even_batches", "ranks wait"),))
    ours, theirs = Setting(2, 2), Setting(2, None)
    refused = Outcome("fails", "ValueError: even_batches=False")
    assert explained("x", "test_a()", refused, ours) == Outcome("ranks wait", refused.says)
    assert explained("x", "test_a()", refused, theirs) is refused
    assert explained("x", "test_b()", refused, ours) is refused
    other = Outcome("fails", "AssertionError")
    assert explained("x", "test_a()", other, ours) is other
    monkeypatch.setitem(accelerate_scripts.REASONS, "x", (Reason("test_a", "even_batches", "two ranks", to_all=True),))
    assert explained("x", "test_a()", refused, theirs).result == "two ranks"


def test_the_table_numbers_reasons(tmp_path: Path) -> None:
    first, second = SETTINGS[:2]
    lines = [
        Line("test_ops", "test_a()", {first.name: Outcome("passes"), second.name: Outcome("fails", "no")}),
        Line("test_sync, with rows", "test_b()", {second.name: Outcome("why")}),
        Line("test_pippy", why_not="why"),
    ]
    last = table(lines).splitlines()[2:]
    assert last[0] == "| `test_ops` | `test_a()` | passes | fails (1) |  |  |  |"
    assert last[1] == "| `test_sync`, with rows | `test_b()` |  | n/a (2) |  |  |  |"
    assert last[2].startswith("| `test_pippy` |  | n/a (2) | n/a (2) |")
    assert last[-2:] == ["1. no", "2. why"]
    Results({"date": ""}, lines[:1]).save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json").lines == lines[:1]
    assert Line("test_sync", why_not="it was not run") in Results({}, lines[:1]).every()


def test_every_script_that_is_installed_is_named() -> None:
    folder = Path(accelerates.__file__).parent
    found = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("test_*.py")}
    assert {each.name.replace(".", "/") for each in SCRIPTS} == found
    with pytest.raises(typer.BadParameter, match="no script test_x"):
        chosen(["test_x"])
    assert [each.name for each in chosen(["test_metrics"])] == ["external_deps.test_metrics"]


@pytest.mark.parametrize("name", ["test_script", "test_sync", "external_deps.test_metrics"])
def test_the_class_is_exchanged_wherever_scripts_import_it_from(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Accelerate imports the first two itself, with its own class."""
    for module, attribute in (
        (accelerate, "Accelerator"),
        (accelerate.accelerator, "Accelerator"),
        (accelerate.test_utils, "RegressionModel"),
    ):
        monkeypatch.setattr(module, attribute, getattr(module, attribute))
    monkeypatch.setitem(sys.modules, "evaluate", ModuleType("evaluate"))
    whole = f"accelerate.test_utils.scripts.{name}"
    monkeypatch.delitem(sys.modules, whole, raising=False)
    before = loaded(whole)
    with pytest.raises(RuntimeError, match="has another Accelerator than ExchangedAccelerator"):
        exchanged.check_exchanged(before)
    exchanged.exchange(1)
    exchanged.give_rows()
    after = loaded(whole)
    exchanged.check_exchanged(after)
    assert after.Accelerator is exchanged.ExchangedAccelerator and after.RegressionModel is exchanged.RowsModel


def test_a_script_compares_as_torch_does() -> None:
    module = ModuleType("a_script")
    exchanged.compare_whole(module)
    one = torch.ones(2)
    assert module.torch.allclose(one, one) and not module.torch.allclose(one, one + 1)
    assert module.torch.allclose(one, one + 1, atol=2.0) and module.torch.manual_seed is torch.manual_seed


def test_stand_ins_are_the_same_each_time_and_measure_as_the_hubs_do() -> None:
    assert pairs(8, seed=1) == pairs(8, seed=1) != pairs(8, seed=2)
    metric = Metric()
    metric.add_batch(predictions=[1, 1, 0], references=torch.tensor([1, 0, 0]))
    metric.add_batch(predictions=[0], references=[1])
    assert metric.compute() == {"accuracy": 0.5, "f1": 0.5}  # one hit of class 1, two predicted, two there


def test_the_document_has_the_newest_results() -> None:
    path = newest()
    assert path is not None
    results = Results.load(path)
    assert documents.between(accelerate_scripts.DOCUMENT.read_text(), "scripts") == table(results.every())
    assert {line.script for line in results.every()} == {each.title for each in SCRIPTS}
    assert not [
        (line.script, line.function)
        for line in results.lines
        for setting in SETTINGS
        if setting.partition_size is not None and (found := line.under(setting)) is not None and found.result == "fails"
    ]


def test_what_lies_between_the_marks_is_replaced() -> None:
    begin, end = documents.marks("x")
    document = f"a\n{begin}\nold\n{end}\nb\n"
    new = documents.replace(document, "x", "| new |")
    assert documents.between(new, "x") == "| new |" and new.startswith("a\n") and new.endswith("\nb\n")
    for bad in (f"a {begin}", f"{end} {begin}", f"{begin}{begin}{end}"):
        with pytest.raises(ValueError, match="must have"):
            documents.replace(bad, "x", "")
