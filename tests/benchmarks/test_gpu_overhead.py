"""Overhead on one GPU: its formulas, its comparison of losses, and the whole command, on a CPU and small models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_exercise
from benchmarks.gpu_cases import CASES, TINY, Case, loss_of, peak_flops
from benchmarks.gpu_exercise import Check
from benchmarks.gpu_overhead import LOSS_BOUND, LossesDiffer, Plan, Row, main, measure, table
from benchmarks.gpu_ways import PLAIN, WAYS, Plain, Way

CPU = torch.device("cpu")
SHORT = Plan(steps=2, rounds=2)


# -- formulas ----------------------------------------------------------------------------------------------------------


def parameters_of(case: Case) -> int:
    return sum(p.numel() for p in case.build(torch.device("meta")).parameters())


@pytest.mark.parametrize(
    ("name", "parameters", "attention"),
    [
        # 12 x 24 layers x 512 tokens x 1024 wide; 6 x 48 x 1024 x 1600.
        ("bert-large", 335_174_458, 150_994_944),
        ("gpt2-xl", 1_557_611_200, 471_859_200),
    ],
)
def test_the_published_models_and_their_operations(name: str, parameters: int, attention: int) -> None:
    case = CASES[name]
    assert parameters_of(case) == parameters
    assert case.flops(parameters) == (6 * parameters + attention) * case.batch * case.tokens


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_formula_counts_what_a_model_computes(family: Any) -> None:
    """Against the products that torch counts: what attention masks as well, and no embeddings."""
    case = Case("counted", family, layers=3, width=64, heads=4, vocabulary=128, tokens=32, batch=2)
    model = case.build(CPU)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss_of(model, case.batches(CPU)[0]).backward()
    tokens = case.batch * case.tokens
    looked_up = case.tokens * case.width + (2 * case.width if family == "bert" else 0)  # positions, token types
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    whole = replace(case, family="bert").flops(parameters_of(case) - looked_up - vectors)
    assert counter.get_total_flops() == whole
    assert case.flops(0) == tokens * (6 if family == "gpt2" else 12) * 3 * 32 * 64


@pytest.mark.parametrize(
    ("device", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
    ],
)
def test_the_peak_of_a_device(device: str, tera: float) -> None:
    assert peak_flops(device) == pytest.approx(1e12 * tera)


def test_a_device_without_a_known_peak_has_no_utilization() -> None:
    assert peak_flops("cpu") is None
    row = Row("case", "way", 1000, 6e12, None, [2.0], [1.0], 0, 1.0, 0.0)
    assert row.utilization is None and row.tokens_per_second == 500
    assert replace(row, peak_flops=10e12).utilization == pytest.approx(0.3)
    assert " 30.0% " in table([replace(row, peak_flops=10e12)])


# -- the ways ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_all_ways_train_alike(name: str) -> None:
    """On a CPU to the bit: the same kernels, in the same order."""
    rows = measure(TINY[name], CPU, SHORT, peak=1e12)
    assert [row.way for row in rows] == [*WAYS]
    for row in rows:
        assert row.loss_difference == 0
        assert len(row.seconds) == len(row.issued) == SHORT.rounds
        assert all(0 < issued <= seconds for issued, seconds in zip(row.issued, row.seconds, strict=True))
        assert row.utilization and row.utilization > 0
    assert rows[0].over_plain == 1.0


def test_checkpointing_changes_no_loss_and_recomputes() -> None:
    case = TINY["tiny gpt2"]
    ids = case.batches(CPU)[0]
    calls = []
    losses = []
    for each in (case, replace(case, checkpointing=False)):
        model = each.build(CPU)
        for layer in each.layers_of(model):
            layer.ln_1.register_forward_pre_hook(lambda *_: calls.append(0))  # type: ignore[operator, union-attr]
        loss = loss_of(model, ids)
        loss.backward()
        losses.append(loss.item())
        calls.append(1)
    assert losses[0] == losses[1]
    assert calls == [0] * 4 + [1] + [0] * 2 + [1]


class Faster(Plain):
    """A loop that learns faster than the others."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        self._optimizer.param_groups[0]["lr"] *= 100


def test_no_time_is_told_where_losses_differ() -> None:
    ways: dict[str, Callable[[Case, torch.device], Way]] = {PLAIN: Plain, "faster": Faster}
    with pytest.raises(
        LossesDiffer, match=rf"tiny bert: the loss of step \d is .* by faster .* allowed {LOSS_BOUND:.0e}"
    ):
        measure(TINY["tiny bert"], CPU, SHORT, None, ways)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [
        "--device",
        "cpu",
        "--case",
        "tiny bert",
        "--batch",
        "1",
        "--steps",
        "1",
        "--rounds",
        "2",
        "--no-exercise",
    ]
    assert main([*chosen, "--peak", "1", "--commit", "abc", "--folder", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["about"]["commit"] == "abc"
    assert content["about"]["machine"]["device"] == "cpu"
    assert [row["way"] for row in content["rows"]] == [*WAYS]
    assert {(row["case"], row["tokens"], row["peak_flops"]) for row in content["rows"]} == {
        ("tiny bert, batch 1", 16, 1e12)
    }
    printed = (tmp_path / "table.txt").read_text()
    assert printed in capsys.readouterr().out
    assert printed.count("tiny bert, batch 1") == 3


def test_a_case_that_differs_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(WAYS, "lightning-mics, n = 1", Faster)
    assert main(["--device", "cpu", "--case", "tiny bert", "--no-exercise", "--folder", str(tmp_path)]) == 1
    assert "No time is told" in capsys.readouterr().err


@pytest.mark.slow
def test_the_exercise(tmp_path: Path) -> None:
    assert main(["--device", "cpu", "--exercise", "--ranks", "2", "--folder", str(tmp_path)]) == 0
    checks = [Check(**check) for check in json.loads((tmp_path / "results.json").read_text())["exercise"]]
    assert len(checks) == 18 + 2 * 6  # collectives; rungs at p = 1 and 2
    assert all(check.passed for check in checks)
    assert any(check.error > 0 for check in checks)  # sums in another order: nothing was compared with itself


def test_a_check_that_is_over_its_bound_or_no_number_fails() -> None:
    good = Check("cuda", "training", 1e-6, 1e-7, 1e-5)
    assert good.passed and "DIFFERS" not in gpu_exercise.table([good])
    for bad in (replace(good, error=2e-5), replace(good, loss_error=2e-5), replace(good, error=float("nan"))):
        assert not bad.passed
        assert "DIFFERS" in gpu_exercise.table([good, bad])
