"""What DDP's users take for granted of Lightning, under `strategy="mics"`: as under DDP, or refused in clear words."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import callbacks
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities.model_summary import summarize
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_mics import MiCSStrategy
from lightning_mics.refusals import check_callbacks, check_optimizers
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import (
    WIDTH,
    Batch,
    Batches,
    Layer,
    Toy,
    assert_close,
    assert_same_losses,
    assert_same_training,
    batch_of,
    ddp,
    mics,
    parameters,
    seeded,
    trainer,
)

Fit = Callable[[pl.Trainer, Toy], None]


class Plain(Toy):
    """SGD: differences stay as small as they begin."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val_loss", self.validated[-1], sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def _fit(run: pl.Trainer, module: Toy) -> None:
    run.fit(module, Batches(8), Batches(2, first=900))


def _as_under_ddp(what: str, module: type[Toy] = Plain, fit: Fit = _fit, rtol: float = 1e-6, **options: Any) -> None:
    """Trains the module with both strategies; a callable among the options is called anew for each."""
    modules = []
    for strategy in (mics(), ddp()):
        made = {name: value() if callable(value) else value for name, value in options.items()}
        modules.append(seeded(module))
        fit(trainer(strategy, **made), modules[-1])
    assert modules[0].losses, what
    assert_same_training(modules[0], modules[1], what, rtol=rtol, atol=rtol)


# -- the Trainer's arguments and its loops -----------------------------------------------------------------------------


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Seven samples a rank, of which the last batch has one."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(7):
            x, y = batch_of(index, dist.get_rank(), size=1)
            yield x[0], y[0]


class Uneven(Batches):
    """The last batch is of another size on each rank."""

    def __iter__(self) -> Iterator[Batch]:
        for index in range(self.count):
            last = index == self.count - 1
            yield batch_of(index, dist.get_rank(), size=1 + dist.get_rank() if last else 2)


def _overfits(run: pl.Trainer, module: Toy) -> None:
    data = DataLoader(TensorDataset(*batch_of(0, 0, size=64)), batch_size=2)
    run.fit(module, data, data)


def _thrice(run: pl.Trainer, module: Toy) -> None:
    """One Trainer twice, and another; optimizers begin anew each time."""
    run.fit(module, Batches(4), Batches(1))
    run.fit_loop.max_epochs = 2  # type: ignore[misc]
    run.fit(module, Batches(4))
    trainer(type(run.strategy)(*([2] if isinstance(run.strategy, MiCSStrategy) else []))).fit(module, Batches(4))


def _loops() -> None:
    stops = lambda: [  # noqa: E731
        callbacks.EarlyStopping("val_loss", patience=1, min_delta=10.0),
        callbacks.GradientAccumulationScheduler({0: 1, 1: 4}),
    ]
    debugging = {"detect_anomaly": True, "inference_mode": False, "val_check_interval": 3}
    _as_under_ddp("stops early, accumulates by epoch", callbacks=stops, max_epochs=5, **debugging)
    _as_under_ddp("overfit_batches", fit=_overfits, overfit_batches=2, max_epochs=2)
    _as_under_ddp("fast_dev_run", fast_dev_run=True)
    window = {"accumulate_grad_batches": 3, "max_epochs": 2}
    _as_under_ddp("iterable", fit=lambda run, m: run.fit(m, DataLoader(Stream(), batch_size=2)), **window)
    _as_under_ddp("uneven last batches", fit=lambda run, m: run.fit(m, Uneven(5)), **window)
    _as_under_ddp("fit, fit again, another Trainer", fit=_thrice)


def test_the_trainers_loops_and_arguments() -> None:
    run_ranks(4, _loops)


# -- callbacks, loggers and profilers ----------------------------------------------------------------------------------


def _watches() -> list[str]:
    module = seeded(Plain)
    watching = [
        callbacks.LearningRateMonitor(),
        callbacks.DeviceStatsMonitor(cpu_stats=True),
        callbacks.Timer(duration="00:01:00:00"),
        callbacks.ThroughputMonitor(lambda batch: len(batch[0]), window_size=3),
        callbacks.RichModelSummary(max_depth=2),
    ]
    logger = CSVLogger(".")
    run = trainer(mics(), logger=logger, log_every_n_steps=1, callbacks=watching, profiler="simple")
    run.fit(module, Batches(8), Batches(2, first=900))
    for profiler in ("advanced", PyTorchProfiler(dirpath=".", filename="profile")):
        trainer(mics(), profiler=profiler).fit(seeded(Plain), Batches(6))
    dist.barrier()
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        return [*next(csv.reader(file)), *sorted(os.listdir("."))]


class Looks(callbacks.Callback):
    """Calls the module by itself, between steps and within a window."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        with torch.no_grad():
            self.seen.append(pl_module(batch_of(99, 0)[0]))


class Shown(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(5, 8)


def _called_from_outside() -> None:
    seen, modules = [], []
    for strategy in (mics(rung="window/whole"), mics(optimizer_state="world"), ddp()):
        looks, summary = Looks(), callbacks.ModelSummary(max_depth=2)
        modules.append(seeded(Shown))
        options = {"accumulate_grad_batches": 2, "enable_model_summary": True}
        trainer(strategy, callbacks=[looks, summary], **options).fit(modules[-1], Batches(6))
        seen.append(torch.stack(looks.seen))
    for ours, module in zip(seen[:2], modules[:2], strict=True):
        assert_same_training(module, modules[2], "called by callbacks")
        torch.testing.assert_close(ours, seen[2], rtol=1e-5, atol=1e-6)
    sizes = {
        layer.layer_type: (layer.in_size, layer.out_size) for layer in summarize(modules[0])._layer_summary.values()
    }
    assert sizes["Linear"] == ([5, WIDTH], [5, 3])


def test_the_module_may_be_called_outside_its_steps() -> None:
    run_ranks(4, _called_from_outside)


def test_monitors_summaries_and_profilers() -> None:
    for found in run_ranks(2, _watches):
        for what in ("lr-SGD", "DeviceStatsMonitor", "train/device/batches_per_sec", "train_loss", "fit-profile-1"):
            assert any(name.startswith(what) for name in found), (what, found)


def _finds_learning_rates() -> None:
    found, modules = [], []
    for strategy in (mics(), ddp()):
        module, finder = seeded(Plain), callbacks.LearningRateFinder(num_training_steps=30, max_lr=10)
        trainer(strategy, callbacks=[finder], max_steps=6).fit(module, Batches(40))
        assert finder.optimal_lr is not None
        found.append(finder.optimal_lr.suggestion())
        modules.append(module)
        assert module.lr == found[-1]
    assert found[0] is not None and found[0] == found[1]
    assert_close(parameters(modules[0]), parameters(modules[1]), "trains from where it began", atol=1e-6)


def test_the_learning_rate_finder_finds_what_it_finds_under_ddp() -> None:
    run_ranks(2, _finds_learning_rates)


class Fails(Plain):
    fails = True

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.fails and self.current_epoch == 1 and batch_idx == 2:
            raise RuntimeError("on every rank")
        return super().training_step(batch, batch_idx)


def _excepted() -> None:
    """A checkpoint of the moment of the failure, between two windows."""
    options = {"accumulate_grad_batches": 2, "max_epochs": 2, "enable_checkpointing": True}
    data = DataLoader(TensorDataset(*batch_of(0, 0, size=32)), batch_size=2)
    failed, whole, resumed = seeded(Fails), seeded(Plain), seeded(Plain)
    with pytest.raises(RuntimeError, match="on every rank"):
        trainer(mics(), callbacks=[callbacks.OnExceptionCheckpoint(".", "failed")], **options).fit(failed, data)
    trainer(mics(), **options).fit(whole, data)
    trainer(mics(), **options).fit(resumed, data, ckpt_path="failed.ckpt")
    assert_same_losses(resumed.losses, whole.losses[10:], "after the failure")
    assert_close(parameters(resumed), parameters(whole), "after the failure")


def test_a_checkpoint_on_exception_resumes() -> None:
    run_ranks(2, _excepted)


# -- optimizers and frozen parameters ----------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, fused=True),
    "AdamW, one by one": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
}


class Optimized(Toy):
    make: Callable[[Any], Optimizer]

    def configure_optimizers(self) -> Any:
        return type(self).make(self.parameters())


def _optimized(name: str) -> type[Toy]:
    return type(name, (Optimized,), {"make": staticmethod(OPTIMIZERS[name])})


class Adapted(Layer):
    """A frozen layer with a low-rank update beside it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class LowRank(Toy):
    def __init__(self) -> None:
        super().__init__()
        for part in (self.enter, self.leave):
            part.requires_grad_(False)
        self.layers = nn.ModuleList(Adapted() for _ in range(3))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Headed(Plain):
    """The layers are a backbone, which the callback gives to the optimizer when it unfreezes them."""

    @property
    def backbone(self) -> nn.Module:
        return self.layers

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.enter.parameters(), *self.leave.parameters()], lr=self.lr)


class FreezesLate(callbacks.BackboneFinetuning):
    """DDP leaves parameters out that are frozen when it takes the module, and never averages them later."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.freeze_before_training(pl_module)
        super().on_fit_start(trainer, pl_module)


def _unfreezes() -> None:
    modules = []
    for strategy, kind in ((mics(), callbacks.BackboneFinetuning), (ddp(), FreezesLate)):
        modules.append(seeded(Headed))
        callback = kind(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5)
        run = trainer(strategy, callbacks=[callback], max_epochs=3, accumulate_grad_batches=2)
        run.fit(modules[-1], Batches(6))
        assert len(run.optimizers[0].param_groups) == 2
    assert_same_training(modules[0], modules[1], "a backbone unfrozen after sharding")


def _unfreezes_when_resumed(path: Path) -> None:
    runs = []
    for epochs, resumed in ((2, None), (3, path)):
        callback = callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1)
        runs.append(trainer(mics(), callbacks=[callback], max_epochs=epochs))
        runs[-1].fit(seeded(Headed), Batches(2), ckpt_path=resumed)
        runs[-1].save_checkpoint(path)
    groups = [[len(group["params"]) for group in run.optimizers[0].param_groups] for run in runs]
    assert groups[0] == groups[1] and len(groups[0]) == 2, groups


def _optimizers(path: Path) -> None:
    clipped = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    for name in OPTIMIZERS:
        _as_under_ddp(name, _optimized(name), lambda run, m: run.fit(m, Batches(4)), rtol=1e-5, **clipped)
    _as_under_ddp("low-rank updates of a frozen model", LowRank, max_epochs=2, **clipped)
    _unfreezes()
    _unfreezes_when_resumed(path / "unfrozen.ckpt")


def test_optimizers_and_frozen_parameters(tmp_path: Path) -> None:
    run_ranks(4, _optimizers, tmp_path)


class Orthogonal(Toy):
    def configure_optimizers(self) -> Any:
        return torch.optim.Muon([p for p in self.parameters() if p.ndim == 2], lr=1.0, weight_decay=0.0, momentum=0.0)


class Large(Batches):
    """Samples enough for gradients of full rank."""

    def __iter__(self) -> Iterator[Batch]:
        yield batch_of(0, dist.get_rank(), size=64)


def _muon() -> None:
    """An update of shards by themselves would have singular values up to the root of p."""
    before, steps = parameters(seeded(Orthogonal)), []
    for strategy in (mics(2), ddp()):
        module = seeded(Orthogonal)
        trainer(strategy).fit(module, Large(1))
        steps.append({name: value - before[name] for name, value in parameters(module).items()})
    for name, step in steps[1].items():
        if step.ndim == 2:
            ours, theirs = (torch.linalg.svdvals(s[name]) for s in steps)
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
            off = ((steps[0][name] - step).norm() / step.norm()).item()
            assert off < 0.1, (name, off)  # it computes in 8 bits of mantissa


def test_muon_steps_whole_matrices() -> None:
    run_ranks(2, _muon)


# -- LightningCLI ------------------------------------------------------------------------------------------------------


def _by_command_line() -> None:
    sys.argv = ["train.py"]
    for words in (
        ["--trainer.strategy=mics"],
        [
            "--trainer.strategy=lightning_mics.MiCSStrategy",
            "--trainer.strategy.partition_size=1",
            "--trainer.strategy.between_nodes=torch.bfloat16",
        ],
    ):
        quiet = ["accelerator=cpu", "devices=2", "logger=false", "enable_checkpointing=false", "max_epochs=1"]
        args = [*words, *(f"--trainer.{word}" for word in (*quiet, "enable_progress_bar=false"))]
        cli = LightningCLI(Toy, run=False, save_config_callback=None, auto_configure_optimizers=False, args=args)
        cli.trainer.fit(cli.model, Batches(2))
        strategy = cli.trainer.strategy
        assert isinstance(strategy, MiCSStrategy) and len(cli.model.losses) == 2
    assert strategy.topology.partition_size == 1 and strategy.mics.precision.between_nodes is torch.bfloat16


def test_lightnings_command_line() -> None:
    run_ranks(2, _by_command_line)


# -- refusals ----------------------------------------------------------------------------------------------------------


class Quasi(Toy):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class InBackward(Toy):
    def configure_optimizers(self) -> None:
        return None


class Hooked(Toy):
    """As soon as it is sharded, or, which is for the caller, before."""

    def on_fit_start(self) -> None:
        self.leave.weight.register_post_accumulate_grad_hook(lambda param: None)


def _refused() -> list[str]:
    """Before anything is trained; ranks are in step after each."""
    said: list[str] = []
    hooks: list[str] = []
    normed = seeded(Toy)
    normed.norm = nn.BatchNorm1d(3)
    in_backward = seeded(InBackward)
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, in_backward.parameters(), {"lr": 0.1})
    watched, stepping = seeded(Toy), seeded(Toy)
    watched.enter.weight.register_hook(lambda gradient: gradient * 2)
    stepping.layers[1].linear.bias.register_post_accumulate_grad_hook(lambda param: param.data.sub_(param.grad))
    for module in (watched, stepping, seeded(Hooked)):
        with pytest.raises(ValueError, match="a shard's gradient is there when backward is over") as error:
            trainer(mics()).fit(module, Batches(2))
        hooks.append(str(error.value).split(" has a hook")[0])
    assert hooks == ["enter.weight", "layers.1.linear.bias", "a parameter of what lies outside the blocks"]
    trainer(mics(1)).fit(watched, Batches(2))
    for module, options in (
        (seeded(Quasi), {}),
        (normed, {"sync_batchnorm": True}),
        (in_backward, {}),
        (seeded(Toy), {"callbacks": [callbacks.BatchSizeFinder()]}),
    ):
        with pytest.raises(ValueError) as error:
            trainer(mics(), **options).fit(module, Batches(2))
        said.append(str(error.value))
        assert not module.losses
    modules = [seeded(Quasi), seeded(Quasi)]
    for strategy, module in zip((mics(1), ddp()), modules, strict=True):
        trainer(strategy).fit(module, Batches(3))
    assert_same_training(modules[0], modules[1], "LBFGS of whole parameters", rtol=1e-4, atol=1e-4)
    return said


def test_what_cannot_be_is_refused_before_training() -> None:
    for said in run_ranks(2, _refused):
        for text, what in zip(
            said,
            (
                "LBFGS lays all parameters out as one vector, which shards are not; choose",
                "sync_batchnorm=True: torch synchronises batch norms on accelerators alone",
                "enter.weight is stepped by an optimizer in backward, before its gradient has been averaged",
                "BatchSizeFinder is not supported with distributed strategies: .* callbacks.BatchSizeFinder()",
            ),
            strict=True,
        ):
            assert all(part in text for part in what.split(" .* ")), text


def test_refusals_name_what_to_use_instead() -> None:
    params = [nn.Parameter(torch.zeros(2, 2))]
    for optimizer in (torch.optim.LBFGS(params), torch.optim.Adafactor(params), torch.optim.Rprop(params)):
        with pytest.raises(ValueError, match=r"choose an optimizer .* as AdamW or SGD, or keep parameters whole"):
            check_optimizers([optimizer])
    sharding = type("ZeroRedundancyOptimizer", (torch.optim.AdamW,), {})
    with pytest.raises(ValueError, match=r'sharded already: .* optimizer_state="world" over all ranks; use the'):
        check_optimizers([sharding(params)])
    foreign = type("AdamW8bit", (torch.optim.AdamW,), {"__module__": "bitsandbytes.optim.adamw"})
    with pytest.raises(ValueError, match=r"AdamW8bit of bitsandbytes .* use torchao's .* partition_size=1"):
        check_optimizers([foreign(params)])
    for callback in (callbacks.StochasticWeightAveraging(1e-2), callbacks.EMAWeightAveraging()):
        with pytest.raises(ValueError, match=r"use lightning_mics\.callbacks\.WeightAveraging"):
            check_callbacks([callback])
