"""A run that is stopped and resumed is the run that was not stopped.

At the same world size and partition size every later loss is equal bit for bit; at others, parameters and optimizer
state are, after the load, and losses stay within fp32 rounding.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.ranks import run_ranks
from tests.distributed.toys import (
    Batch,
    Batches,
    Eager,
    Toy,
    assert_close,
    assert_same_losses,
    batch_of,
    mics,
    optimizer_state,
    parameters,
    seeded,
    trainer,
)

WINDOW = 2


class Saves(pl.Callback):
    """Saves after some optimizer steps, from the hook of a batch's end."""

    def __init__(self, path: Path, *steps: int) -> None:
        self.path, self.steps = path, steps

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self.path / f"step{trainer.global_step}.ckpt")


def _shuffled() -> DataLoader[Any]:
    x = torch.cat([batch_of(i, 0, size=8)[0] for i in range(4)])
    y = torch.cat([batch_of(i, 0, size=8)[1] for i in range(4)])
    return DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)


def _run(module: Toy, data: Any, strategy: Any = None, ckpt_path: Any = None, val: Any = None, **options: Any) -> Any:
    run = trainer(strategy or mics(), **({"accumulate_grad_batches": WINDOW, "max_epochs": 3} | options))
    run.fit(module, data, val, ckpt_path=ckpt_path)
    return run


class OwnOrder(Batches):
    """Batches in an order that a rank draws for itself, and that it alone knows."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(count)
        generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
        self.order = torch.randperm(count, generator=generator).tolist()

    def __iter__(self) -> Any:
        for _, index in zip(super().__iter__(), self.order[self.given % self.count :], strict=False):
            yield batch_of(index, dist.get_rank())

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.order = state["order"]


class Scheduled(Toy):
    """Its learning rate falls with every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _dropping(seed: int = 7) -> Toy:
    return seeded(Scheduled, seed, dropout=0.3)


def _differs_by_rank() -> None:
    torch.manual_seed(1234 + dist.get_rank())


# -- the same ranks ----------------------------------------------------------------------------------------------------


def _resumed_from(path: Path, whole: Toy, data: Any, what: str, **options: Any) -> None:
    """Resume from `path` in another model, under other random numbers, and compare with the later part of `whole`."""
    module = _dropping(seed=99)
    torch.manual_seed(4321)
    _run(module, data, ckpt_path=path, **options)
    if not 0 < len(module.losses) < len(whole.losses):
        raise AssertionError(f"{what}: {len(module.losses)} losses of {len(whole.losses)} after the resume")
    assert_same_losses(module.losses, whole.losses[-len(module.losses) :], what)
    assert_close(parameters(module), parameters(whole), what)


def _mid_epoch(path: Path) -> None:
    whole = _dropping()
    _differs_by_rank()
    _run(whole, Batches(6), callbacks=[Saves(path, 2, 4)], max_epochs=2)
    for step, left in ((2, 8), (4, 4)):  # in the first epoch and in the second, of three optimizer steps each
        _resumed_from(path / f"step{step}.ckpt", whole, Batches(6), f"resumed at step {step}", max_epochs=2)
        if len(whole.losses) - WINDOW * step != left:
            raise AssertionError("the arithmetic of this test")
    validated = {"val": DataLoader(TensorDataset(*batch_of(50, 0))), "val_check_interval": 2 * WINDOW, "max_epochs": 2}
    whole = _dropping()
    _differs_by_rank()
    _run(whole, Batches(6), callbacks=[Saves(path / "validated", 2)], **validated)
    _resumed_from(path / "validated" / "step2.ckpt", whole, Batches(6), "a validation after the save", **validated)


def _own_orders(path: Path) -> None:
    whole = _dropping()
    _differs_by_rank()
    _run(whole, OwnOrder(10, seed=1), callbacks=[Saves(path, 3)], max_epochs=1)
    _resumed_from(path / "step3.ckpt", whole, OwnOrder(10, seed=2), "each rank in its own order", max_epochs=1)


def _epoch_end(path: Path) -> None:
    """Loaders draw from the global generator when they start over, and dropout draws from it too."""
    for when in ("train", "validation"):
        whole = _dropping()
        _differs_by_rank()
        saves = ModelCheckpoint(path / when, "{epoch}", save_top_k=-1, save_on_train_epoch_end=when == "train")
        val = DataLoader(TensorDataset(*batch_of(50, 0))) if when == "validation" else None
        _run(whole, _shuffled(), val=val, callbacks=[saves], enable_checkpointing=True)
        for epoch in (0, 1) if when == "train" else (1,):
            at = path / when / f"epoch={epoch}.ckpt"
            _resumed_from(at, whole, _shuffled(), f"saved after {when} of epoch {epoch}", val=val)


class Noisy(TensorDataset):
    """Draws what it adds to its samples from the generator that dropout draws from."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn_like(x), y


def _without_state(path: Path) -> None:
    """Plain loaders, which Lightning would begin anew, the eager ones in the order of the first epoch."""
    x, y = _shuffled().dataset.tensors  # type: ignore[attr-defined]
    validated = {"val": DataLoader(TensorDataset(*batch_of(50, 0))), "val_check_interval": WINDOW}
    cases: list[tuple[Any, dict[str, Any], tuple[int, ...]]] = [  # of four steps each epoch
        (lambda: DataLoader(Noisy(x, y), batch_size=1, shuffle=True), {"reload_dataloaders_every_n_epochs": 1}, (3, 6)),
        (lambda: DataLoader(Noisy(x, y), batch_size=1), validated, (6,)),
        (lambda: Eager(TensorDataset(x, y), batch_size=1, shuffle=True), {}, (4, 6)),
    ]
    for number, (loader, options, steps) in enumerate(cases):
        whole, folder = _dropping(), path / str(number)
        _differs_by_rank()
        _run(whole, loader(), callbacks=[Saves(folder, *steps)], **options)
        for step in steps:
            with warnings.catch_warnings(record=True) as told:
                _resumed_from(folder / f"step{step}.ckpt", whole, loader(), f"loader {number}, step {step}", **options)
            if any("not resumable" in str(warning.message) for warning in told):
                raise AssertionError("Lightning's warning, which is not true here")


@pytest.mark.slow
def test_plain_loaders_go_on_at_the_next_sample(tmp_path: Path) -> None:
    run_ranks(4, _without_state, tmp_path)


def test_resume_in_mid_epoch_with_dropout_is_exact(tmp_path: Path) -> None:
    run_ranks(4, _mid_epoch, tmp_path)


def test_a_loader_goes_on_in_the_order_of_its_own_rank(tmp_path: Path) -> None:
    run_ranks(4, _own_orders, tmp_path)


def test_resume_at_the_epochs_end_with_dropout_and_shuffling_is_exact(tmp_path: Path) -> None:
    run_ranks(4, _epoch_end, tmp_path)


# -- saving leaves no trace --------------------------------------------------------------------------------------------


def _saving_changes_nothing(path: Path) -> None:
    runs = []
    for callbacks in ([], [SavesAtStart(path), Saves(path, 1, 2)]):
        module = _dropping()
        _differs_by_rank()
        _run(module, Batches(10), callbacks=callbacks, max_epochs=1)
        runs.append(module)
    assert_same_losses(runs[1].losses, runs[0].losses, "with saving")
    assert_close(parameters(runs[1]), parameters(runs[0]), "with saving")
    resumed = _dropping(seed=3)
    _run(resumed, Batches(10), ckpt_path=path / "start.ckpt", max_epochs=1)
    assert_same_losses(resumed.losses, runs[0].losses, "resumed before the first step")


class SavesAtStart(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path / "start.ckpt")


def test_saving_changes_nothing_before_the_first_step_or_later(tmp_path: Path) -> None:
    run_ranks(4, _saving_changes_nothing, tmp_path)


# -- other ranks -------------------------------------------------------------------------------------------------------


class SharesTheBatch(Toy):
    """Sees the four ranks' batches of each micro-step, however many ranks there are."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        index = self.trainer.current_epoch * 10 + batch_idx
        batches = [batch_of(index, rank) for rank in range(4)][mine]
        loss = torch.stack([self.loss(each) for each in batches]).mean()
        everyone = self.trainer.strategy.reduce(loss.detach())
        self.losses.append(everyone.item())
        return loss


class LooksAfterLoad(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.parameters = parameters(pl_module)
        self.state = optimizer_state(trainer.optimizers[0])


def _save_and_go_on(path: Path, p: int) -> Any:
    """Train, saving after the third step and looking at the state there; the later losses."""
    module = seeded(SharesTheBatch)
    first = _run(module, Batches(6), mics(p), callbacks=[Saves(path, 3)], max_epochs=1)
    look = {"parameters": parameters(module), "state": optimizer_state(first.optimizers[0])}
    if dist.get_rank() == 0:
        torch.save(look, path / "look.pt")
    whole = seeded(SharesTheBatch)
    _run(whole, Batches(6), mics(p))
    return whole.losses[6:]


def _told_in_mid_epoch(path: Path) -> list[str]:
    """Saved by four after four of six batches, resumed by however many there are."""
    if dist.get_world_size() == 4:
        _run(seeded(SharesTheBatch), Batches(6), mics(2), callbacks=[Saves(path, 2)], max_epochs=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _run(seeded(SharesTheBatch), Batches(6), mics(2), path / "step2.ckpt", max_epochs=1)
    return [str(warning.message) for warning in told if "of an epoch" in str(warning.message)]


def test_other_ranks_in_mid_epoch_are_told_what_becomes_of_their_batches(tmp_path: Path) -> None:
    assert not any(run_ranks(4, _told_in_mid_epoch, tmp_path))
    told, others = run_ranks(2, _told_in_mid_epoch, tmp_path)
    assert len(told) == 1 and "It was saved after batch 4 of an epoch" in told[0] and not others


def _load_and_go_on(path: Path, p: int) -> Any:
    module, looks = seeded(SharesTheBatch, 99), LooksAfterLoad()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _run(module, Batches(6), mics(p), path / "step3.ckpt", callbacks=[looks])
    said = [str(warning.message) for warning in told if "was saved by" in str(warning.message)]
    saved = torch.load(path / "look.pt", weights_only=True)
    assert_close(looks.parameters, saved["parameters"], f"parameters at p={p}")
    assert_close(looks.state, saved["state"], f"optimizer state at p={p}")
    return module.losses, said


@pytest.mark.parametrize(("saved", "loaded"), [((4, 2), ((4, 4), (4, 1), (2, 2), (1, 1))), ((1, 1), ((4, 2),))])
def test_resume_at_another_partition_size_and_world_size(
    tmp_path: Path, saved: tuple[int, int], loaded: tuple[tuple[int, int], ...]
) -> None:
    expected = run_ranks(saved[0], _save_and_go_on, tmp_path, saved[1])[0]
    for world, p in loaded:
        losses, said = run_ranks(world, _load_and_go_on, tmp_path, p)[0]
        if world == saved[0]:
            assert not said
        else:
            assert f"step3.ckpt was saved by {saved[0]} ranks and is resumed by {world}: " in said[0]
            assert "after batch 6 of an epoch" not in said[0], "the epoch had ended"
        assert losses == pytest.approx(expected, rel=1e-5), f"{saved} -> {(world, p)}"
