"""One of Accelerate's scripts on one rank, and what became of each of its functions.

    torchrun --nproc-per-node 2 -m compatibility.accelerate_rank '{"script": "test_sync", ...}'

See `Order` for what it is told. Each rank writes a line of JSON when a function begins and when it ends, so that what
hangs, or takes the process down, is known by name.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import os
import runpy
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from compatibility.exchanged import check_exchanged, compare_whole, exchange, give_rows
from compatibility.stand_ins import install

PACKAGE = "accelerate.test_utils.scripts"


@dataclass(frozen=True)
class Order:
    """What a rank is to run.

    Attributes:
        script: below Accelerate's `test_utils/scripts`, as "external_deps.test_metrics".
        report: the folder of the ranks' files.
        partition_size: None leaves Accelerate's own Accelerator in its place.
        arguments: of the command line.
        calls: functions to call, with keyword arguments, in the place of the script's `main`.
        skip: functions to leave out, by their labels.
        stand_ins: whether there are tiny stand-ins for data sets and metrics of a hub.
        rows: whether the scripts' model has rows to shard, and what they compare is made whole before.
    """

    script: str
    report: str
    partition_size: int | None = None
    arguments: tuple[str, ...] = ()
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    skip: tuple[str, ...] = ()
    stand_ins: bool = False
    rows: bool = False

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Order:
        given: dict[str, Any] = json.loads(text)
        given["calls"] = [(name, arguments) for name, arguments in given["calls"]]
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        return cls(**plain)


class Notes:
    """What a rank tells of its functions.

    Args:
        folder: where its file is to lie.
        rank: whose it is.
        skip: labels of functions that are not called.
    """

    def __init__(self, folder: Path, rank: int, skip: tuple[str, ...] = ()) -> None:
        self._path = folder / f"{rank}.jsonl"
        self._skip = skip
        self._depth = 0
        self._times: Counter[str] = Counter()
        self._failed: BaseException | None = None

    def watch(self, module: ModuleType) -> None:
        """Note each outermost call of the module's tests, by whoever looks them up there."""
        for name, value in [*vars(module).items()]:
            if inspect.isfunction(value) and value.__module__ == module.__name__ and is_test(name):
                setattr(module, name, self.noted(value))

    def noted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            name = label(function, args, kwargs)
            self._times[name] += 1
            if (times := self._times[name]) > 1:
                name = f"{name}, call {times}"
            return None if name in self._skip else self.run(name, lambda: function(*args, **kwargs))

        return call

    def run(self, name: str, function: Callable[[], Any]) -> Any:
        """Call a function between two notes."""
        self._write(name, "begins")
        self._depth += 1
        try:
            result = function()
        except BaseException as error:
            if isinstance(error, SystemExit) and not error.code:
                self._write(name, "passes")
            else:
                self.failed(name, error)
            raise
        finally:
            self._depth -= 1
        self._write(name, "passes")
        return result

    def failed(self, name: str, error: BaseException) -> None:
        """Note what was raised, once, where it was raised first."""
        if error is not self._failed:
            self._write(name, "fails", _said(error))
        self._failed = error

    def _write(self, name: str, what: str, says: str = "") -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"name": name, "what": what, "says": says}) + "\n")


def is_test(name: str) -> bool:
    """Whether a function of this name is one of a script's tests."""
    return name.startswith(("test_", "check_seedable")) or name.endswith("_check")


def label(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """As "test_x(split_batches=True)": with the arguments that can be read."""
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    said = [f"{name}={_value(value)}" for name, value in given.items() if isinstance(value, bool | int | str)]
    return f"{function.__name__}({', '.join(said)})"


def _value(value: Any) -> str:
    return str(getattr(value, "value", value))


def _said(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first} ({Path(where.filename).name}:{where.lineno})"


def run(order: Order, rank: int) -> None:
    """Run what is ordered. What a function raises ends it."""
    if order.stand_ins:
        install()
    if order.partition_size is not None:
        exchange(order.partition_size)
    if order.rows:
        give_rows()
    notes = Notes(Path(order.report), rank, order.skip)
    name = f"{PACKAGE}.{order.script}"
    sys.argv = [order.script, *order.arguments]
    if not has_main(name):
        notes.run("the script", lambda: runpy.run_module(name, run_name="__main__"))
        return
    module = loaded(name)
    if order.partition_size is not None:
        check_exchanged(module)
    if order.rows:
        compare_whole(module)
    notes.watch(module)
    if not order.calls:
        return _run_main(notes, module)
    for function, arguments in order.calls:
        getattr(module, function)(**arguments)


def has_main(name: str) -> bool:
    """Whether a module has a function `main`, and not its code at the end alone."""
    return "\ndef main(" in Path(str(_spec(name).origin)).read_text()


def loaded(name: str) -> ModuleType:
    """A module executed anew: Accelerate imports some of its scripts itself, before anything can be exchanged."""
    spec = _spec(name)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


def _spec(name: str) -> ModuleSpec:
    if (spec := importlib.util.find_spec(name)) is None:
        raise ValueError(f"the installed Accelerate has no {name}")
    return spec


def _run_main(notes: Notes, module: ModuleType) -> None:
    if not any(is_test(name) and inspect.isfunction(value) for name, value in vars(module).items()):
        notes.run("main", module.main)
        return
    try:
        module.main()
    except Exception as error:
        notes.failed("main, outside its functions", error)
        raise


if __name__ == "__main__":
    run(Order.parse(sys.argv[1]), int(os.environ.get("RANK", 0)))
