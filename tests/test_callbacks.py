"""Callbacks: the header's numbers against a count by hand, and throughput against a clock that the test moves."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_mics import MiCSStrategy
from lightning_mics import callbacks as module
from lightning_mics.callbacks import RunHeader, Throughput, size_of
from tests.distributed.ranks import run_ranks


class Stack(pl.LightningModule):
    """Three blocks of 10 * 10 + 10 = 110 parameters and a head of 10 * 2 = 20: 350 in all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(10, 10) for _ in range(3))
        self.head = nn.Linear(10, 2, bias=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = batch["x"]
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_for(strategy: Any, devices: int, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=devices,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def batches(count: int) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader([{"x": torch.ones(10)} for _ in range(count)], batch_size=1)


def header_of_mics() -> list[tuple[str, str]]:
    header, model = RunHeader("stack"), Stack()
    trainer = trainer_for(MiCSStrategy(2), 4, max_steps=1, accumulate_grad_batches=3)
    trainer.fit(model, batches(12))
    return header.lines(trainer, model)


def test_header_tells_topology_window_and_bytes() -> None:
    headers = run_ranks(4, header_of_mics)
    assert headers[0] == headers[3]
    header = dict(headers[0])
    assert header["model"] == "stack, 350 parameters, 32-true on cpu"
    assert header["ranks"].endswith("(n = 4, p = 2, r = 2)")
    assert header["window"] == "3 micro-steps"
    # fp32, p = 2: half of each gathered or reduced byte is sent. Blocks (110) are gathered twice a micro-step, but two
    # of three stay at each of five turns, the head (20) once: ((3 * 6 - 10) * 110 + 3 * 20) * 4 / 2 = 1880 bytes.
    # Hop 1: 3 * 350 * 4 / 2 = 2100. Hop 2: an all-reduce of 350 / 2 elements over r = 2 sends 2 * (1 / 2) of their
    # bytes: 700. There is one node to stay in.
    assert re.findall(r"[\d.]+ k?B", header["wire"]) == ["1.88 kB", "2.1 kB", "700 B", "0 B"]
    assert header["rung"].startswith("block/sharded")
    assert header["blocks"].startswith("3 x Linear of 110 parameters")


def test_header_serves_other_strategies(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_for("auto", 1, RunHeader(), max_steps=1)
    trainer.fit(Stack(), batches(1))
    printed = capsys.readouterr().out
    assert re.search(r"model +Stack, 350 parameters, 32-true on cpu", printed)
    assert "n = 1 on 1 node, SingleDeviceStrategy" in printed
    assert "wire" not in printed


class Clock(pl.Callback):
    """Time that passes only where a test lets it: before a batch ends, and in validation."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def on_train_batch_start(self, *args: Any) -> None:
        self.now += 2.0

    def on_validation_batch_start(self, *args: Any) -> None:
        self.now += 1000.0


class Validated(Stack):
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Time passes in it."""


def test_throughput_counts_windows_and_leaves_validation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    seen: list[tuple[float, float]] = []

    class Reader(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            metrics = trainer.callback_metrics
            if "samples/s" in metrics:
                seen.append((float(metrics["samples/s"]), float(metrics["seconds/step"])))

    trainer = trainer_for(
        *("auto", 1, clock, Throughput(lambda batch: 6, unit="samples"), Reader()),
        max_epochs=1,
        accumulate_grad_batches=3,
        val_check_interval=2,
        num_sanity_val_steps=0,
    )
    trainer.fit(Validated(), batches(6), batches(1))
    # A window is 3 batches of 2 s and 6 samples; validations of 1000 s fall inside both windows.
    assert trainer.global_step == 2
    assert set(seen) == {(3.0, 6.0)}


def test_size_of_batches() -> None:
    ids = torch.zeros(4, 8)
    assert size_of({"labels": ids[:1], "input_ids": ids}) == 32
    assert size_of({"x": ids}) == size_of((ids, ids[:1])) == size_of([[ids]]) == size_of(ids) == 4
    with pytest.raises(TypeError, match=r"batch of type int; give Throughput\(count=\.\.\.\)"):
        size_of(3)
