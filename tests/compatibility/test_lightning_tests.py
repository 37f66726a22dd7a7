"""Lightning's tests as a judge: the table, what a strategy becomes, and what is told of a test."""

from __future__ import annotations

import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric import strategies as fabric_strategies
from lightning.pytorch import strategies as pytorch_strategies
from torch import nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, always_wrap_policy

from compatibility import lightning_counterparts as counterparts
from compatibility.lightning_report import Outcome, Result, counts
from compatibility.lightning_source import nearest
from compatibility.lightning_table import Plan, Rows, Table
from compatibility.lightning_tests import Runner

_FILE = "tests_pytorch/test_toys.py"
_TOYS = """
import os
import time
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.testing import _runif_reasons

def made(**kwargs):
    return Trainer(logger=False, enable_checkpointing=False, **kwargs)

@pytest.mark.skipif(bool(_runif_reasons(min_cuda_gpus=2, standalone=True)[0]), reason="lifted")
@pytest.mark.parametrize("strategy", ["fsdp", FSDPStrategy(sharding_strategy="NO_SHARD")])
def test_on_gpus(strategy):
    trainer = made(accelerator="gpu", devices=2, strategy=strategy)
    assert (trainer.strategy.strategy_name, trainer.num_devices) == ("mics", 2)
    assert trainer.strategy.root_device.type == "cpu"

def test_kept():
    made(accelerator="cpu")
    assert type(made(strategy="ddp", accelerator="cpu").strategy).__name__ == "DDPStrategy"

def test_without_a_trainer():
    pass

def test_fails():
    made()
    raise ValueError("as it should")

def test_ends_the_process():
    made()
    os._exit(3)

@pytest.mark.timeout(1)
def test_hangs():
    made()
    time.sleep(60)

def test_skipped():
    pytest.skip("no reason")
"""


def test_lightning_is_what_it_is_where_the_command_runs() -> None:
    assert "compatibility.lightning_plugin" not in sys.modules  # it changes Trainer and Fabric


def test_the_table_is_well_formed() -> None:
    table = Table.load()
    assert table.files
    for file, rows in table.files.items():
        assert re.fullmatch(r"(tests_pytorch|tests_fabric|parity_fabric)/[\w/]+\.py", file)
        for test, plan in rows.plans.items():
            assert plan.outcome == Outcome.PASSED or plan.why.strip(), f"{file}::{test}"
            assert plan.outcome != Outcome.DIFFERS or plan.error, f"{file}::{test}"
            re.compile(plan.error)


def test_what_is_misspelt_in_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="'runs'"):
        Rows.read("a.py", {"runs": []})
    with pytest.raises(ValueError, match="test_a stands twice"):
        Rows.read("a.py", {"run": ["test_a", "test_a"]})
    with pytest.raises(ValueError, match="a group has no error"):
        Rows.read("a.py", {"differ": [{"why": "because", "tests": ["test_a"]}]})
    with pytest.raises(ValueError, match="keep names test_b"):
        Rows.read("a.py", {"run": ["test_a"], "keep": {"test_b": ["ddp"]}})


def test_tests_without_a_row_and_rows_without_a_test() -> None:
    gpus = {"why": "no GPU", "tests": ["test_a[*gpu*]", "test_a[2]"]}
    table = Table({"a.py": Rows.read("a.py", {"run": ["test_a", "test_gone"], "not_apply": [gpus]})})
    names = ["test_a[1]", "test_a[x-gpu-y]", "test_a[2]", "test_new"]
    plans = table.plans([f"a.py::{name}" for name in names], ["a.py"])
    assert [plan.outcome for plan in plans.values()] == [
        Outcome.PASSED,
        Outcome.NOT_APPLYING,
        Outcome.NOT_APPLYING,
        Outcome.UNKNOWN,
    ]
    assert table.gone == ["a.py::test_gone"]
    assert Outcome.UNKNOWN.wrong and Outcome.GONE.wrong and Outcome.FAILED.wrong


def test_what_a_run_has_to_show() -> None:
    passed, failed = Result("t", Outcome.PASSED, made=1), Result("t", Outcome.FAILED, "ValueError: no", made=1)
    runs, differs = Plan(Outcome.PASSED), Plan(Outcome.DIFFERS, "on purpose", "ValueError: n")
    assert runs.judge("t", passed) == passed
    assert runs.judge("t", failed) == failed
    assert "made no Trainer" in runs.judge("t", Result("t", Outcome.PASSED)).message
    assert runs.judge("t", Result("t", Outcome.SKIPPED, "no GPU")).outcome == Outcome.FAILED
    assert differs.judge("t", failed) == Result("t", Outcome.DIFFERS, "on purpose", made=1)
    assert differs.judge("t", passed).outcome == Outcome.FAILED
    assert differs.judge("t", Result("t", Outcome.FAILED, "KeyError", made=1)).outcome == Outcome.FAILED
    assert Plan(Outcome.NOT_APPLYING, "no").judge("t", None) == Result("t", Outcome.NOT_APPLYING, "no")


def test_counts_of_files() -> None:
    found = {"a.py::x": Outcome.PASSED, "a.py::y": Outcome.GONE, "b.py::z": Outcome.DIFFERS}
    table = counts(Result(test, outcome) for test, outcome in found.items())
    assert table[2:] == ["| `a.py` | 1 | 0 | 0 | 1 |", "| `b.py` | 0 | 1 | 0 | 0 |", "| all | 1 | 1 | 0 | 1 |"]


@pytest.mark.parametrize("strategies", [pytorch_strategies, fabric_strategies])
def test_arguments_have_counterparts(strategies: Any) -> None:
    policy, minute = ModuleWrapPolicy({nn.Linear}), timedelta(minutes=1)
    fsdp, ddp, parallel = strategies.FSDPStrategy, strategies.DDPStrategy, strategies.ModelParallelStrategy

    def of(asked: Any, *names: str) -> dict[str, Any]:
        found = counterparts.arguments(asked)
        assert found is not None
        return {name: found.get(name) for name in names}

    size = "partition_size"
    assert of(fsdp(), size) == {size: None}
    assert of(fsdp(sharding_strategy="NO_SHARD"), size) == {size: 1}
    assert of(fsdp(auto_wrap_policy=policy, sharding_strategy="HYBRID_SHARD"), size, "blocks") == {
        size: "node",
        "blocks": policy,
    }
    assert of(fsdp(device_mesh=(2, 4), sharding_strategy="HYBRID_SHARD"), size) == {size: 4}
    assert of(fsdp(activation_checkpointing_policy={nn.Linear}), "activation_checkpointing")["activation_checkpointing"]
    assert of(ddp(timeout=minute, process_group_backend="gloo"), "timeout", "process_group_backend") == {
        "timeout": minute,
        "process_group_backend": "gloo",
    }
    made = (
        (lambda **sizes: parallel(**sizes))
        if strategies is pytorch_strategies
        else (lambda **sizes: parallel(lambda module, _: module, **sizes))
    )
    assert of(made(data_parallel_size=2, tensor_parallel_size=1), size) == {size: None}
    with pytest.raises(counterparts.NoCounterpartError, match="tensor_parallel_size=2"):
        counterparts.arguments(made(tensor_parallel_size=2))
    with pytest.raises(counterparts.NoCounterpartError, match="cpu_offload"):
        counterparts.arguments(fsdp(cpu_offload=True))


def test_names_devices_and_policies() -> None:
    assert counterparts.arguments("ddp_spawn") == counterparts.arguments("auto") == {}
    assert counterparts.arguments("deepspeed") is None
    assert counterparts.accelerator("gpu") == counterparts.accelerator("auto") == "cpu"
    assert counterparts.accelerator("tpu") == "tpu"
    assert (counterparts.devices([0, 1]), counterparts.devices(2)) == (2, 2)
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(4, 4))
    every = counterparts.blocks(always_wrap_policy)
    large = counterparts.blocks(lambda module, recurse, nonwrapped_numel: nonwrapped_numel > 10)
    assert [name for name, module in model.named_modules() if every(name, module)] == ["0", "2"]
    assert [name for name, module in model.named_modules() if large(name, module)] == ["2"]
    nested = nn.Sequential(model, nn.Linear(2, 2))
    assert [name for name, module in nested.named_modules() if every(name, module)] == ["0.0", "0.2", "1"]
    assert [name for name, module in nested.named_modules() if large(name, module)] == ["0.2"]


def test_the_nearest_tag() -> None:
    tags = ["2.5.9", "2.6.0", "2.6.5", "2.6.7", "2.6.6rc0", "app/2.6.6"]
    assert nearest("2.6.6", tags) == "2.6.5"
    assert nearest("2.6.7", tags) == "2.6.7"
    assert nearest("2.5.1", tags) == "2.5.9"
    with pytest.raises(ValueError, match="no tag"):
        nearest("2.7.0", tags)


@pytest.mark.slow
def test_runs_and_tells_what_became_of_each_test(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    (tests / "tests_pytorch").mkdir(parents=True)
    (tests / _FILE).write_text(_TOYS)
    runner = Runner(tests, tmp_path, seconds=60)
    found = runner.collected([_FILE])
    assert len(found) == 8
    plans = {test: Plan(Outcome.PASSED, keep=("ddp",) if "kept" in test else ()) for test in found}
    results = {result.test.partition("::")[2]: result for result in runner.run(_FILE, plans)}
    assert {name: (result.outcome, result.made) for name, result in results.items()} == {
        "test_on_gpus[fsdp]": (Outcome.PASSED, 1),
        "test_on_gpus[strategy1]": (Outcome.PASSED, 1),
        "test_kept": (Outcome.PASSED, 1),
        "test_without_a_trainer": (Outcome.PASSED, 0),
        "test_fails": (Outcome.FAILED, 1),
        "test_ends_the_process": (Outcome.FAILED, 0),
        "test_hangs": (Outcome.FAILED, 0),
        "test_skipped": (Outcome.SKIPPED, 0),
    }
    assert "ValueError: as it should" in results["test_fails"].message
    assert "Timeout" in results["test_hangs"].message
