"""A pytest plugin under which a test of Lightning's runs its Trainers and Fabrics with "mics", on the CPU.

    python -m pytest -p compatibility.lightning_plugin tests_pytorch/...

What a test asks for, `accelerator="cuda", strategy="fsdp", devices=2` say, becomes `accelerator="cpu",
strategy="mics"` on as many processes (`lightning_counterparts`). Conditions about GPUs are lifted. A checkpoint
directory of ours that is read as one file is exported first, as `mics export --to lightning` does.

`lightning_tests` starts it, and tells it by the environment where to report.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping
from functools import wraps
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.fabric
import lightning.fabric.connector
import lightning.fabric.plugins.io.torch_io as torch_io
import lightning.fabric.strategies.launchers.subprocess_script as fabric_launcher
import lightning.fabric.utilities.cloud_io as cloud_io
import lightning.fabric.utilities.testing
import lightning.pytorch.core.saving
import lightning.pytorch.strategies.launchers.subprocess_script as pytorch_launcher
import lightning.pytorch.trainer.connectors.accelerator_connector
import lightning.pytorch.utilities.testing
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from compatibility import lightning_counterparts as counterparts
from compatibility.lightning_processes import ALONE, KEPT, REPORT, Rank
from lightning_mics import MiCSFabricStrategy, MiCSStrategy, consolidate
from lightning_mics.checkpoint import number_parameters

_SECONDS_TO_END = 5.0  # of a thread
_LIFTED = {"min_cuda_gpus": 0, "bf16_cuda": False, "standalone": False}


class NeedsProcessesError(Exception):
    """A test is about to start further processes, and runs beside others, which these would run, too."""


class Watch:
    """What a test has done, and the report of it."""

    def __init__(self) -> None:
        self.listen()

    def listen(self) -> None:
        """To what the environment says."""
        main = "LOCAL_RANK" not in os.environ and "RANK" not in os.environ
        self.report = os.environ.get(REPORT) if main else None
        self.alone = ALONE in os.environ
        self.kept: Mapping[str, list[str]] = json.loads(os.environ.get(KEPT, "{}"))
        self.begin("")

    def begin(self, test: str) -> None:
        self.keep = self.kept.get(test, [])
        self.made = 0
        self.needs_processes = False
        self.outcome, self.message, self.seconds = "passed", "", 0.0

    def tell(self, event: str, **what: Any) -> None:
        if self.report is not None:
            with open(self.report, "a") as file:
                file.write(json.dumps({"event": event, **what}) + "\n")

    def see(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        if report.outcome != "passed" and self.outcome == "passed":
            skipped = report.skipped and not hasattr(report, "wasxfail")
            self.outcome = "skipped" if skipped else "xfailed" if report.skipped else "failed"
            self.message = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)


_watch = Watch()


def pytest_configure(config: pytest.Config) -> None:
    _watch.listen()


# -- what a test asks for ----------------------------------------------------------------------------------------------


def _with_mics(connector: Any, strategy_class: Any) -> None:
    """Have a connector, which reads the arguments of a Trainer or a Fabric, read ours."""
    original = connector.__init__
    parameters = signature(original)

    @wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = parameters.bind(self, *args, **kwargs)
        bound.apply_defaults()
        asked = bound.arguments
        kept = asked["strategy"] in _watch.keep
        given = None if kept else counterparts.arguments(asked["strategy"])
        if given is not None:
            asked["strategy"] = strategy_class(**given)
        if given is not None or kept:
            asked["accelerator"] = counterparts.accelerator(asked["accelerator"])
            asked["devices"] = counterparts.devices(asked["devices"])
        original(*bound.args, **bound.kwargs)
        _watch.made += isinstance(getattr(self, "strategy", None), MiCSStrategy | MiCSFabricStrategy)

    connector.__init__ = init


def _launched(fabric: Any) -> None:
    """Have a Fabric of one process launched when it is made, as nobody tells one of a single device to."""
    original = fabric.__init__

    @wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        strategy = self._strategy
        if isinstance(strategy, MiCSFabricStrategy) and strategy.num_processes * strategy.num_nodes == 1:
            self.launch()

    fabric.__init__ = init


def _in_own_processes(module: Any) -> None:
    """Have a launcher start further ranks by `Rank`, and only for a test that runs alone."""
    launcher, module.subprocess = module._SubprocessScriptLauncher, SimpleNamespace(Popen=Rank)
    original = launcher._call_children_scripts

    @wraps(original)
    def call(self: Any) -> None:
        if self.num_processes > 1 and not _watch.alone:
            _watch.needs_processes = True
            raise NeedsProcessesError
        original(self)

    launcher._call_children_scripts = call


def _watched(module: Any) -> None:
    """Have no thread look after children where there are none: a test would wait five seconds for it to notice."""
    original = module._launch_process_observer
    module._launch_process_observer = lambda children: original(children) if children else None


def _lift_conditions(module: Any) -> None:
    original = module._runif_reasons

    @wraps(original)
    def reasons(**asked: Any) -> Any:
        return original(**{name: _LIFTED.get(name, value) for name, value in asked.items()})

    module._runif_reasons = reasons


def _exported(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def loaded(f: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(f, str | os.PathLike) or not Path(f).is_dir():
            return load(f, *args, **kwargs)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "whole.ckpt")
            consolidate(Path(f), file, weights_only=False)
            return load(file, *args, **kwargs)

    return loaded


def whole(found: Any) -> Any:
    """What a test compares, by tensors that are whole: a tensor, a state dict, or an optimizer's. Collective."""
    if isinstance(found, DTensor):
        return found.full_tensor().detach().clone()
    if isinstance(found, Tensor):
        return found.detach().clone()
    if isinstance(found, dict):
        found = {key: whole(value) for key, value in found.items()}
        return number_parameters(found) if "param_groups" in found else found
    return found


_with_mics(lightning.pytorch.trainer.connectors.accelerator_connector._AcceleratorConnector, MiCSStrategy)
_with_mics(lightning.fabric.connector._Connector, MiCSFabricStrategy)
_launched(lightning.fabric.Fabric)
for _launcher in (pytorch_launcher, fabric_launcher):
    _in_own_processes(_launcher)
    _watched(_launcher)
for _module in (lightning.pytorch.utilities.testing, lightning.fabric.utilities.testing):
    _lift_conditions(_module)
torch.load = _exported(torch.load)
lightning.pytorch.core.saving.pl_load = torch_io.pl_load = cloud_io._load = _exported(cloud_io._load)


# -- the report --------------------------------------------------------------------------------------------------------


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        _watch.tell("collected", test=item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    _watch.begin(item.nodeid)
    _watch.tell("began", test=item.nodeid)
    result = yield
    outcome = "needs processes" if _watch.needs_processes else _watch.outcome
    _watch.tell(
        "ended",
        test=item.nodeid,
        outcome=outcome,
        made=_watch.made,
        seconds=round(_watch.seconds, 2),
        message=_watch.message,
    )
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """Lightning wants no thread left, and one of ours ends with the module that it is of: have no cycle hold that."""
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("mics-"):
            thread.join(_SECONDS_TO_END)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _watch.see(report)
