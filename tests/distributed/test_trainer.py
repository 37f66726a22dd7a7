"""The strategy in a Trainer: by name and as an instance, every entry point, precisions, samplers, models built late."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.model_summary import summarize
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_mics import MiCSStrategy
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
    device,
    mics,
    on_cpu,
    optimizer_state,
    parameters,
    seeded,
    trainer,
)


def _is(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise AssertionError(f"{what}: {found!r}, expected {expected!r}")


# -- entry points ------------------------------------------------------------------------------------------------------


def _entry_points() -> None:
    results = []
    for strategy in (lambda: "mics", mics, ddp):
        module = seeded(Toy)
        trainer(strategy(), accumulate_grad_batches=2).fit(module, Batches(8), Batches(1, first=900))
        trainer(strategy()).validate(module, Batches(1, first=901), verbose=False)
        trainer(strategy()).test(module, Batches(1, first=902), verbose=False)
        predicted = trainer(strategy()).predict(module, Batches(2, first=903))
        results.append((module, torch.cat(predicted)))
    for module, predicted in results[:2]:
        assert_same_training(module, results[2][0], "fit, validate, test")
        torch.testing.assert_close(predicted, results[2][1], rtol=1e-5, atol=1e-6)
    whole = sum(p.numel() for p in seeded(Toy).parameters())
    _is(summarize(results[0][0]).total_parameters, whole, "parameters in the summary")
    _is(isinstance(results[0][0].enter.weight, DTensor), True, "sharded, when the run is over")


def test_fit_validate_test_predict_by_name_and_as_an_instance() -> None:
    run_ranks(4, _entry_points)


def _within_inference_mode(path: Path) -> None:
    """A user's own, around whole runs: what is saved and loaded there is what it is outside, and training goes on."""
    losses = []
    for within in (nullcontext, torch.inference_mode):
        module, run = seeded(Toy), trainer(mics(), max_epochs=2)
        run.fit_loop.max_epochs = 1
        run.fit(module, Batches(2))
        with within():
            run.save_checkpoint(path / within.__name__)
            run.test(module, Batches(1, first=900), ckpt_path=path / within.__name__, verbose=False)
        other = seeded(Toy, seed=8)
        trainer(mics(), max_epochs=2).fit(other, Batches(2), ckpt_path=path / within.__name__)
        run.fit_loop.max_epochs = 2
        run.fit(module, Batches(2))
        losses.append((module.losses, module.validated, other.losses))
    _is(losses[1], losses[0], "within inference mode")
    _is(len(losses[0][0]), 4, "losses")


def test_checkpoints_are_saved_and_loaded_within_inference_mode(tmp_path: Path) -> None:
    run_ranks(2, _within_inference_mode, tmp_path)


def _by_pytorch_lightning() -> None:
    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.toy = seeded(Toy)
            self.losses: list[float] = []

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = self.toy.loss(batch)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    runs = []
    for strategy in ("mics", "ddp"):
        module = Module()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        run = pytorch_lightning.Trainer(
            accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, enable_model_summary=False, **quiet
        )
        run.fit(module, Batches(8))
        runs.append(module)
    assert_same_losses(runs[0].losses, runs[1].losses, "pytorch_lightning", rtol=1e-6)
    _is(isinstance(runs[0].toy.enter.weight, DTensor), True, "sharded")


def test_the_name_in_pytorch_lightning() -> None:
    run_ranks(2, _by_pytorch_lightning)


def _one_process() -> None:
    module, alone = seeded(Toy), seeded(Toy)
    trainer("mics", accumulate_grad_batches=2).fit(module, Batches(8), Batches(1))
    trainer("auto", accumulate_grad_batches=2).fit(alone, Batches(8), Batches(1))
    assert_same_training(module, alone, "one process")


def test_one_process() -> None:
    run_ranks(1, _one_process)


@pytest.mark.parametrize(
    ("partition_size", "says"),
    [
        (3, r"partition_size=3 does not divide world_size=4; choose one of 1, 2, 4"),
        (8, r"partition_size=8 does not divide world_size=4"),
        (0, r"partition_size=0 .* 1, 2, 4"),
        ("half", r"partition_size='half' .* 1, 2, 4"),
    ],
)
def test_a_bad_partition_size_is_refused_when_the_trainer_is_made(partition_size: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        pl.Trainer(accelerator="cpu", devices=4, strategy=MiCSStrategy(partition_size), logger=False)


# -- data --------------------------------------------------------------------------------------------------------------


class SeesItems(Toy):
    """Keeps the numbers of the items that it is given in each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = {}

    def see(self, stage: str, batch: Tensor) -> Tensor:
        self.seen.setdefault(stage, []).extend(batch.tolist())
        return self(batch_of(0, 0)[0]).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.see(f"train {self.current_epoch}", batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.see("validation", batch)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.see("predict", batch)


def _items() -> dict[str, list[int]]:
    module = seeded(SeesItems)
    loader: DataLoader[Any] = DataLoader(range(24), batch_size=3, shuffle=True)
    in_order: DataLoader[Any] = DataLoader(range(24), batch_size=3)
    trainer(mics(), max_epochs=2, check_val_every_n_epoch=2).fit(module, loader, in_order)
    trainer(mics()).predict(module, in_order)
    return module.seen


def test_samplers_give_every_item_to_one_rank() -> None:
    seen = run_ranks(4, _items)
    for stage in ("train 0", "train 1", "validation", "predict"):
        assert sorted(item for rank in seen for item in rank[stage]) == list(range(24)), stage
    assert [rank["train 0"] for rank in seen] != [rank["train 1"] for rank in seen], "shuffled anew"


# -- models built late, and used twice ---------------------------------------------------------------------------------


class BuiltLate(Toy):
    """Has no parameters until `configure_model`; keeps the ones it starts with."""

    def __init__(self) -> None:
        super().__init__()
        del self.enter, self.layers, self.leave

    def configure_model(self) -> None:
        if not hasattr(self, "enter"):
            self.enter, self.leave = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
            self.layers = nn.ModuleList(Layer() for _ in range(3))

    def on_train_start(self) -> None:
        self.started_with = parameters(self)


class BuiltOnMeta(BuiltLate):
    def configure_model(self) -> None:
        with torch.device("meta"):
            super().configure_model()


class BuiltEmpty(BuiltLate):
    """Built at once, under `init_module(empty_init=True)`."""

    def __init__(self) -> None:
        super().__init__()
        self.configure_model()


def _built_late() -> list[float]:
    firsts = []
    for cls in (BuiltLate, BuiltOnMeta, BuiltEmpty):
        run = trainer(mics(), accumulate_grad_batches=2)
        torch.manual_seed(100 + dist.get_rank())  # ranks that disagree
        with run.init_module(empty_init=cls is BuiltEmpty):
            module = cls()
        _is(any(p.is_meta for p in module.parameters()), cls is BuiltEmpty, f"{cls.__name__} on the meta device")
        run.fit(module, Batches(8))
        other = seeded(Toy)
        other.load_state_dict(module.started_with)
        trainer(ddp(), accumulate_grad_batches=2).fit(other, Batches(8))
        assert_same_training(module, other, cls.__name__)
        firsts.append(module.started_with["leave.weight"].sum().item())
    return firsts


def test_models_built_in_configure_model_and_on_the_meta_device() -> None:
    firsts = run_ranks(4, _built_late)
    assert all(rank == firsts[0] for rank in firsts), "every rank starts from the same values"


def _second_trainer() -> None:
    module, other = seeded(Toy), seeded(Toy)
    for strategy, each in ((mics, module), (ddp, other)):
        trainer(strategy()).fit(each, Batches(4))
        trainer(strategy()).fit(each, Batches(4, first=50))
    assert_same_training(module, other, "two Trainers, one after the other")
    for strategy, precision in ((mics(4), "32-true"), (mics(), "bf16-mixed")):
        with pytest.raises(ValueError, match=r"the model is sharded already, for .*; build a new model, or keep"):
            trainer(strategy, precision=precision).fit(module, Batches(4))
    with pytest.raises(RuntimeError, match="the model is not sharded yet"):
        _ = mics().mics


def test_a_second_trainer_takes_the_model_at_the_same_partition_size_and_precision_only() -> None:
    run_ranks(4, _second_trainer)


def _callbacks() -> None:
    for callback in (pl.callbacks.StochasticWeightAveraging(1e-2), pl.callbacks.EMAWeightAveraging()):
        with pytest.raises(ValueError, match="averages copies of whole parameters and cannot average shards"):
            trainer(mics(), callbacks=[callback]).fit(seeded(Toy), Batches(4))


def test_callbacks_that_copy_parameters_are_refused() -> None:
    run_ranks(2, _callbacks)


# -- precision ---------------------------------------------------------------------------------------------------------

# What trains, and how far the losses of six steps may lie from those in fp32.
PRECISIONS = {
    "32-true": (torch.float32, 1e-6),
    "64-true": (torch.float64, 1e-5),
    "bf16-mixed": (torch.float32, 0.05),
    "16-mixed": (torch.float32, 0.05),
    "bf16-true": (torch.bfloat16, 0.1),
}


class SixtyFour(Toy):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        dtype = next(self.parameters()).dtype
        wide = dtype if dtype == torch.float64 else torch.float32
        loss = nn.functional.mse_loss(self(batch[0].to(dtype)).to(wide), batch[1].to(wide))
        self.losses.append(loss.item())
        return loss


def _precisions() -> None:
    scaled = set() if on_cpu() else {"16-mixed"}  # a scaler skips steps, under DDP as here
    references = {precision: seeded(SixtyFour) for precision in {"32-true", *scaled}}
    for precision, reference in references.items():
        trainer(ddp(), precision=precision).fit(reference, Batches(6))
    for precision, (dtype, rtol) in PRECISIONS.items():
        reference, pair = references[precision if precision in scaled else "32-true"], []
        for strategy in ("mics", mics(2)):  # the name means p = n = 2 here, on one node
            module = seeded(SixtyFour)
            trainer(strategy, precision=precision).fit(module, Batches(6))
            _is({p.dtype for p in module.parameters()}, {dtype}, f"{precision}, parameters")
            pair.append(module)
        assert_same_losses(pair[0].losses, reference.losses, precision, rtol)
        off = 0.0 if on_cpu() else rtol  # where each rank is a node, the name means p = 1
        assert_same_training(pair[1], pair[0], f"{precision}, instance and name", rtol=off, atol=off)


def test_precisions_for_the_name_and_an_instance_alike() -> None:
    run_ranks(2, _precisions)


class Overflows(Toy):
    """On rank 1, in its third step, one element of one gradient is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.scales: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if dist.get_rank() == 1 and batch_idx == 2:
            loss = loss + self.enter.weight[0, 0].float() * float("inf")
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())


def _overflow() -> None:
    runs = []
    for strategy in (mics(), ddp()):
        module = seeded(Overflows)
        kind = device().type
        plugin = MixedPrecision("16-mixed", kind, scaler=torch.amp.GradScaler(kind, init_scale=1024.0))
        run = trainer(strategy, plugins=[plugin])
        run.fit(module, Batches(6))
        steps = {v.item() for (_, key), v in optimizer_state(run.optimizers[0]).items() if key == "step"}
        runs.append((module, steps))
    (ours, our_steps), (theirs, their_steps) = runs
    _is(our_steps, {5.0}, "steps that every parameter took on this rank")
    _is(their_steps, {5.0}, "steps under DDP")
    _is(ours.scales, [1024.0] * 2 + [512.0] * 4, "scales")
    _is(ours.scales, theirs.scales, "scales, under DDP")
    assert_close(parameters(ours), parameters(theirs), "parameters", atol=2e-2)


def test_an_overflow_on_one_rank_skips_the_step_on_every_rank() -> None:
    run_ranks(4, _overflow)


# -- the memory ladder -------------------------------------------------------------------------------------------------


class GatheredNow(pl.Callback):
    """Names of parameters that are whole when a training batch begins, and the rung of each."""

    def __init__(self) -> None:
        self.whole: list[list[str]] = []
        self.rungs: list[str] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.whole.append([name for name, p in pl_module.named_parameters() if not isinstance(p, DTensor)])
        self.rungs.append(str(trainer.strategy.mics.rung))  # type: ignore[attr-defined]


def _rungs() -> None:
    plain = seeded(Toy)
    trainer(ddp(), accumulate_grad_batches=2).fit(plain, Batches(8))
    for rung in ("micro_step/sharded", "window/whole", "auto"):
        module, seen = seeded(Toy), GatheredNow()
        strategy = MiCSStrategy(partition_size=2, rung=rung, memory_budget=10**12)
        fit = trainer(strategy, accumulate_grad_batches=2, callbacks=[seen])
        fit.fit(module, Batches(8))
        assert_same_training(module, plain, rung)
        expected = ["block/sharded"] * 3 + ["window/whole"] * 5 if rung == "auto" else [rung] * 8
        _is(seen.rungs, expected, "rungs, as each batch begins")  # a window's first batch begins on the last one's
    # A second Trainer takes the module on from another rung.
    trainer(MiCSStrategy(partition_size=2), accumulate_grad_batches=2).fit(module, Batches(2))
    _is(str(module.trainer.strategy.mics.rung), "block/sharded", "rung of the second Trainer")


def test_every_rung_trains_as_ddp_and_auto_climbs() -> None:
    run_ranks(4, _rungs)


def _evaluation_keeps_nothing() -> None:
    for rung in ("block/sharded", "micro_step/sharded", "window/sharded"):
        seen = GatheredNow()
        fit = trainer(
            MiCSStrategy(partition_size=2, rung=rung), callbacks=[seen], num_sanity_val_steps=1, val_check_interval=2
        )
        fit.fit(seeded(Toy), Batches(4), Batches(1, first=900))
        _is(seen.whole, [[]] * 4, f"whole after a step or an evaluation, {rung}")


def test_evaluation_leaves_nothing_gathered() -> None:
    run_ranks(4, _evaluation_keeps_nothing)


def test_a_rung_that_is_none_is_refused_with_the_strategy() -> None:
    with pytest.raises(ValueError, match=r"rung='fast' is not on the memory ladder; choose one of block/sharded, .*"):
        MiCSStrategy(rung="fast")
    with pytest.raises(ValueError, match=r"memory_budget=1\.5 must be"):
        MiCSStrategy(rung="auto", memory_budget=1.5)
    with pytest.raises(ValueError, match=r"between_nodes='bf16' must be a floating-point torch.dtype"):
        MiCSStrategy(between_nodes="bf16")  # type: ignore[arg-type]
