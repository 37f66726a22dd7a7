"""Predicted on a GPU: its errors, what the planner is asked, and a small run, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.gpu_cases import TINY
from benchmarks.gpu_predicted import SETUPS, Measured, Result, Setup, app
from lightning_mics.offload import Offload
from lightning_mics.optimizer_shards import OptimizerState


def test_errors_are_shares_of_what_was_measured_and_of_the_fullest_rank() -> None:
    result = Result("", Measured([80, 100], [0, 0], [3.0, 2.0, 1.0]), 110, "", {}, {}, {"measured": 1.5})
    assert result.memory_error == pytest.approx(0.10)
    assert result.seconds_error("measured") == pytest.approx(-0.25)


def test_the_planner_is_asked_about_what_is_trained() -> None:
    setup = Setup(TINY["tiny gpt2"], "bf16-mixed", 2, 4, 2, "window/whole", "world")
    workload = setup.workload()
    assert (setup.topology.replicas, workload.optimizer_state) == (2, OptimizerState.WORLD)
    assert workload.activation_checkpointing and workload.precision.param_dtype == torch.bfloat16
    assert {param.dtype for param in workload.module.parameters()} == {torch.float32}
    assert workload.batch(3).shape == (3, 16)
    offloading = Setup(TINY["tiny bert"], offload="parameters").workload()
    assert offloading.offload == Offload.PARAMETERS
    assert {param.dtype for param in offloading.module.parameters()} == {torch.bfloat16}
    assert len({str(each) for each in SETUPS}) == len(SETUPS)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--case", "tiny gpt2", "--folder", str(tmp_path), "--commit", "this one"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "predicted.json").read_text())
    assert content["about"]["commit"] == "this one"
    one, several = content["results"]
    assert len(one["measured"]["seconds"]) == 5 and all(each > 0 for each in one["seconds"].values())
    assert one["seconds"].keys() == one["figures"].keys() == {"its block", "a tiny block"}
    assert len(several["measured"]["grown"]) == 2 and not several["measured"]["seconds"]
    told = CliRunner().invoke(app, ["--again", str(tmp_path)], catch_exceptions=False)
    assert told.exit_code == 0 and "tiny gpt2, 2 x 1" in told.output
    assert several["bytes"] == sum(several["by_kind"].values()) > 0
