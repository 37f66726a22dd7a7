"""Callbacks for any model: what a run is made of, and how fast it goes.

They read the Trainer and the batch alone, so they serve under every strategy; what only MiCS has is shown where the
strategy is MiCS.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only
from rich import get_console
from torch import Tensor
from typing_extensions import override

from lightning_mics.strategy import MiCSStrategy
from lightning_mics.version import __version__
from mics_tools.units import in_units


class RunHeader(pl.Callback):
    """Shows on rank 0, before training, the model, the topology, the window and the bytes that each step will move.

    Args:
        name: what to call the model; by default the class of the LightningModule.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    @override
    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for label, text in self.lines(trainer, pl_module):
            get_console().print(f"{label:<12}{text}", soft_wrap=True, markup=False, highlight=False)

    def lines(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[tuple[str, str]]:
        """The header as pairs of label and text; the strategy must have set up the model."""
        name = self.name or type(pl_module).__name__
        total = sum(parameter.numel() for parameter in pl_module.parameters())
        device = trainer.strategy.root_device.type
        return [
            (f"lightning-mics {__version__}", ""),
            ("model", f"{name}, {in_units(total)} parameters, {trainer.precision} on {device}"),
            *_communication(trainer),
        ]


def _communication(trainer: pl.Trainer) -> list[tuple[str, str]]:
    window = trainer.accumulate_grad_batches
    micro_steps = f"{window} micro-step{'s' * (window > 1)}"
    strategy = trainer.strategy
    if not isinstance(strategy, MiCSStrategy):
        nodes = f"{trainer.num_nodes} node{'s' * (trainer.num_nodes > 1)}"
        return [
            ("ranks", f"n = {trainer.world_size} on {nodes}, {type(strategy).__name__}"),
            ("window", micro_steps),
        ]
    topology, wire = strategy.topology, strategy.mics.wire_bytes(window)
    return [
        ("ranks", f"{topology}  (n = {topology.world_size}, p = {topology.partition_size}, r = {topology.replicas})"),
        ("window", micro_steps),
        (
            "wire",
            f"each rank sends per step: gathers {in_units(wire.gather, 'B')} and hop 1 {in_units(wire.hop_1, 'B')} in "
            f"its partition group, hop 2 {in_units(wire.hop_2, 'B')} between replicas; "
            f"{in_units(wire.inter_node, 'B')} of that leave the node",
        ),
        ("rung", f"{strategy.mics.rung} (parameters/gradients)"),
        *[("blocks" if i == 0 else "", line) for i, line in enumerate(strategy.mics.describe().splitlines())],
    ]


class Throughput(pl.Callback):
    """Logs, once per optimizer step, `<unit>/s` over all ranks and `seconds/step`; validation does not count.

    Host clocks are read, no device is synchronised: on an accelerator single steps blur into their neighbours, and
    their mean is right.

    Args:
        count: how much one batch of one rank holds; by default the elements of `batch["input_ids"]` or, in other
            batches, the size of the first dim of the first tensor found.
        unit: of what `count` counts.
    """

    def __init__(self, count: Callable[[Any], int] | None = None, unit: str = "tokens") -> None:
        self.unit = unit
        self._count = count or size_of
        self._since = 0.0
        self._paused_at = 0.0
        self._counted = 0
        self._step = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._counted += self._count(batch)
        if trainer.global_step == self._step:
            return
        seconds = time.perf_counter() - self._since
        rate = self._counted * trainer.world_size / seconds
        pl_module.log_dict({f"{self.unit}/s": rate, "seconds/step": seconds}, prog_bar=True)
        self._begin(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused_at = time.perf_counter()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since += time.perf_counter() - self._paused_at

    def _begin(self, trainer: pl.Trainer) -> None:
        self._since, self._counted, self._step = time.perf_counter(), 0, trainer.global_step


def size_of(batch: Any) -> int:
    """Elements of `batch["input_ids"]`, or the first dim of the first tensor in a mapping, sequence or tensor.

    Raises:
        TypeError: if there is no tensor.
    """
    if isinstance(batch, Tensor):
        return len(batch)
    if isinstance(batch, Mapping):
        if "input_ids" in batch:
            return int(batch["input_ids"].numel())
        batch = tuple(batch.values())
    if isinstance(batch, tuple | list) and batch:
        return size_of(batch[0])
    raise TypeError(f"no tensor in a batch of type {type(batch).__name__}; give Throughput(count=...)")
