"""Callbacks for any model: what a run is made of, how fast it goes, and the average of its weights.

They read the Trainer and the batch alone, so they serve under every strategy; what only MiCS has is shown where the
strategy is MiCS.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr, lightning_setattr
from rich import get_console
from torch import Tensor
from typing_extensions import override

from lightning_mics._compat import loaders_are_the_modules
from lightning_mics.averages import AVERAGE, CURRENT, KEY, Averages
from lightning_mics.checkpoint import part_of
from lightning_mics.climb import Budget
from lightning_mics.strategy import MiCSStrategy, MiCSStrategyMixin
from lightning_mics.trials import Trials
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


class WeightAveraging(pl.Callback):
    """Averages the weights along training: sharded as they are, in fp32, without communication.

    Validation within a fit runs on the averages, and so does all that begins with a checkpoint of this run or follows
    on the fit: a checkpoint has the averages where the weights are looked for, to be tested or exported, and the
    weights beside them, from which `ckpt_path=` goes on, with the averages. (One that is saved with
    `save_weights_only=True` has the weights alone, as Lightning's own averages have it.) Buffers are not averaged.

    Args:
        decay: of the exponential moving average; None for the equal mean of all updates, as stochastic weight
            averaging has it.
        every_n_steps: optimizer steps between updates.
        start_step: the first optimizer step, from 1, after which there is an update.
        validate: whether validation within a fit runs on the averages, once there are any.

    Raises:
        ValueError: for a `decay` outside (0, 1), or steps that are not positive.
        TypeError: in a fit under another strategy.
    """

    def __init__(
        self,
        decay: float | None = 0.999,
        *,
        every_n_steps: int = 1,
        start_step: int = 1,
        validate: bool = True,
    ) -> None:
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay={decay} must be between 0 and 1, or None for the equal mean")
        for name, value in {"every_n_steps": every_n_steps, "start_step": start_step}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.decay, self.every_n_steps, self.start_step, self.validate = decay, every_n_steps, start_step, validate
        self.averages: Averages | None = None
        self._step = 0

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, MiCSStrategyMixin):
            raise TypeError(
                f"{type(self).__name__} averages the shards of MiCSStrategy, and the strategy is "
                f"{type(strategy).__name__}; use lightning.pytorch.callbacks.EMAWeightAveraging there"
            )
        self._at_rest(trainer)
        self.averages = strategy.averages = Averages(pl_module, self.decay)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step  # which a checkpoint may have set

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        if step >= self.start_step and (step - self.start_step) % self.every_n_steps == 0:
            self._at_rest(trainer)
            self._kept.update()

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and self.validate and self._kept.updates:
            self._at_rest(trainer)
            self._kept.show()

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        self._kept.hide()
        self._at_rest(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.averages is not None:
            self.averages.hide()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._kept.updates:
            self._at_rest(trainer)
            self._kept.copy_to_module()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.averages is not None and self.averages.updates:
            state = self.averages.into(checkpoint["state_dict"])
            checkpoint[KEY] = {"updates": self.averages.updates, "state": state}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.averages is None or trainer.state.fn != "fit":
            return
        saved = checkpoint.get(KEY)
        if saved is None:
            self.averages.begin()
            return
        whole = {field: {n: f[field] for n, f in saved["state"].items() if field in f} for field in (AVERAGE, CURRENT)}
        parts = {
            field: {name: part_of(tensor, self.averages.target(name, field)) for name, tensor in tensors.items()}
            for field, tensors in whole.items()
        }
        self.averages.loaded(saved["updates"], parts[AVERAGE], parts[CURRENT])

    @property
    def _kept(self) -> Averages:
        assert self.averages is not None
        return self.averages

    def _at_rest(self, trainer: pl.Trainer) -> None:
        """Shards are complete, and nothing is gathered that was made of other values."""
        mics = trainer.strategy.mics  # type: ignore[attr-defined]
        mics.finish_updates()
        mics.release()


class BatchSizeFinder(callbacks.BatchSizeFinder):
    """Lightning's, for the ranks of a fit: the largest batch that the fullest of them has memory for, on all of them.

    Trials grow as Lightning's do, but none runs out of memory, which would leave other ranks waiting: from what smaller
    batches have held on any rank it is computed, before a trial begins, whether the next one fits `memory_budget`. So
    the first, of `init_val`, has to fit, and what a batch holds may not grow faster than its size. All that was trained
    in the trials is undone.

    Args:
        mode: "power" or "binsearch".
        steps_per_trial: optimizer steps.
        init_val: size of the first trial.
        max_trials: at the most.
        batch_arg_name: attribute of the LightningModule or LightningDataModule, which their loaders read.
        margin: by which "binsearch" reduces what it has found.
        max_val: the largest size to try.
        memory_budget: bytes (an int), or a share of the device's memory (a float); on CPU, of an equal part of the
            node's.

    Raises:
        ValueError: when a fit begins, for loaders that are given to `fit`, a missing attribute, a rung of "auto", and
            where there is no fit.
        TypeError: under another strategy.
    """

    def __init__(
        self,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
        memory_budget: int | float = 0.9,
    ) -> None:
        super().__init__(mode, steps_per_trial, init_val, max_trials, batch_arg_name, margin, max_val)
        self._attribute, self._first, self._budget = batch_arg_name, init_val, Budget(memory_budget)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str | None = None) -> None:
        name = type(self).__name__
        if not isinstance(trainer.strategy, MiCSStrategyMixin):
            raise TypeError(f"{name} is for MiCSStrategy; use lightning.pytorch.callbacks.BatchSizeFinder on one rank")
        if stage != "fit":
            raise ValueError(f"{name} tries batches of a fit, not of {trainer.state.fn.value}; leave it out there")
        if trainer.strategy.climbs:
            raise ValueError(f'{name} and rung="auto" both measure what is left of the memory; choose a rung')
        if not loaders_are_the_modules(trainer):
            raise ValueError(f"{name} changes what loaders read: let the module or the data module make them")
        if not lightning_hasattr(pl_module, self._attribute):
            raise ValueError(f"{name}: neither the module nor the data module has an attribute {self._attribute!r}")

    @override
    def scale_batch_size(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy: Any = trainer.strategy
        device = strategy.root_device
        budget = self._budget.bytes(device, strategy.topology.ranks_per_node)
        trials = Trials(budget, device, lambda: int(lightning_getattr(pl_module, self._attribute)))
        if not trainer.fast_dev_run:  # otherwise nothing is tried
            lightning_setattr(pl_module, self._attribute, self._first)  # before the first loader is made
        with strategy.trying(trials):
            super().scale_batch_size(trainer, pl_module)


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
