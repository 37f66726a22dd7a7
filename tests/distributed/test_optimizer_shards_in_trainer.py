"""Optimizer state over all ranks in a Trainer: what it trains, saves, resumes, tells and refuses.

The reference is the same Trainer in the plain form, equal bit for bit with two replicas; for clipping it is DDP.
"""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics import consolidate
from tests.distributed.counting import collectives
from tests.distributed.ranks import run_ranks
from tests.distributed.test_optimizer_shards import FORMS, OnRequest
from tests.distributed.test_windows import SkipsStep
from tests.distributed.toys import (
    Batch,
    Batches,
    Toy,
    assert_close,
    assert_same_losses,
    assert_same_training,
    ddp,
    local,
    mics,
    optimizer_state,
    parameters,
    seeded,
    trainer,
)

# -- training ----------------------------------------------------------------------------------------------------------


class SkipsBackward(Toy):
    """Runs a forward, and no backward, inside a window and at a boundary."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.trainer.fit_loop._skip_backward = batch_idx in (5, 11)


class Seldom(Toy):
    """One module is used by a single rank in a single micro-step of each window, one by none."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.seldom = nn.Linear(8, 3), nn.Linear(8, 3)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        uses = dist.get_rank() == 1 and batch_idx % 4 == 2
        return loss + self.seldom(batch[0]).square().mean() if uses else loss


class Thaws(Toy):
    """A layer is frozen until the third window, another from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].requires_grad_(False)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 8:
            self.requires_grad_(True)
            self.layers[2].requires_grad_(False)


class AddsGroup(Toy):
    """Trains its last layer from the third window on, and freezes the first between a boundary and its step."""

    def configure_optimizers(self) -> Any:
        self.layers[2].requires_grad_(False)
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.lr)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 8:
            self.layers[2].requires_grad_(True)
            self.optimizers().add_param_group({"params": [*self.layers[2].parameters()], "lr": 0.02})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.layers[0].requires_grad_(self.global_step != 3)


class DropsGradients(Toy):
    """Drops them after some backwards: inside the second window, at the boundary of the third."""

    def on_after_backward(self) -> None:
        if len(self.losses) - 1 in (5, 10):
            self.trainer.strategy.mics.window.drop()


class FailsOnce(Toy):
    """Raises in the seventh training step, inside a window."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if len(self.losses) == 7:
            raise ValueError("as meant")
        return loss


def _fit(module: Toy, data: Batches, partition_size: int, form: str, **options: Any) -> Any:
    run = trainer(mics(partition_size, optimizer_state=form), **({"accumulate_grad_batches": 4} | options))
    val = Batches(2, first=900) if "val_check_interval" in options else None
    with suppress(ValueError) if isinstance(module, FailsOnce) else nullcontext():
        run.fit(module, data, val)
    return run


def _trained_alike(partition_size: int, cases: list[tuple[type[Toy], dict[str, Any]]]) -> None:
    for make, options in cases:
        modules = []
        for form in FORMS:
            module = seeded(make)
            run = _fit(module, Batches(14, skip={4}), partition_size, form, **options)
            if make is FailsOnce:
                run = _fit(module, Batches(8, first=100), partition_size, form, **options)
            modules.append((module, optimizer_state(run.optimizers[0])))
            held = [p for group in run.optimizers[0].param_groups for p in group["params"]]
            assert {isinstance(p, DTensor) and p.device_mesh.ndim == 2 for p in held} == {form == "world"}
        what = f"{make.__name__}, {options}"
        assert_same_training(modules[1][0], modules[0][0], what, rtol=0.0, atol=0.0)
        assert_close(modules[1][1], modules[0][1], what)


# Windows of four, and of one; what is irregular, at one partition size or the other, and at both what no rank uses.
CASES: dict[tuple[int, int], list[tuple[type[Toy], dict[str, Any]]]] = {
    (4, 2): [
        (Toy, {"accumulate_grad_batches": 1}),
        (Toy, {"val_check_interval": 3}),
        *((make, {}) for make in (SkipsBackward, Seldom, AddsGroup, FailsOnce)),
    ],
    (2, 1): [
        (Toy, {"accumulate_grad_batches": 1}),
        *((make, {}) for make in (Toy, SkipsStep, Seldom, Thaws, DropsGradients)),
    ],
}


@pytest.mark.parametrize(("n", "p"), [pytest.param(4, 2, marks=pytest.mark.slow), (2, 1)])
def test_a_trainer_trains_alike_bit_for_bit(n: int, p: int) -> None:
    run_ranks(n, _trained_alike, p, CASES[n, p])


def _clipped() -> None:
    free = seeded(Toy)
    trainer(mics(2, optimizer_state="world"), accumulate_grad_batches=2).fit(free, Batches(6))
    for clip in ({"norm": 0.05}, {"value": 0.01}):
        ((algorithm, value),) = clip.items()
        options = {"gradient_clip_val": value, "gradient_clip_algorithm": algorithm, "accumulate_grad_batches": 2}
        ours, theirs = seeded(Toy), seeded(Toy)
        trainer(mics(2, optimizer_state="world"), **options).fit(ours, Batches(6))
        trainer(ddp(), **options).fit(theirs, Batches(6))
        assert_same_training(ours, theirs, f"clipped by {algorithm}")
        with pytest.raises(AssertionError):
            assert_same_training(ours, free, "not clipped")


@pytest.mark.slow
def test_clipping_by_norm_and_by_value_is_ddps() -> None:
    run_ranks(4, _clipped)


# -- checkpoints -------------------------------------------------------------------------------------------------------


class Saves(pl.Callback):
    """Saves after the second step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            trainer.save_checkpoint(self.path)


class Looks(pl.Callback):
    """Keeps the optimizer's state as it was loaded."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.state = optimizer_state(trainer.optimizers[0])


def _run(module: Toy, p: int, form: str, ckpt_path: Path | None = None, callbacks: Any = ()) -> Any:
    run = trainer(mics(p, optimizer_state=form), accumulate_grad_batches=2, callbacks=[*callbacks])
    run.fit(module, Batches(8), ckpt_path=ckpt_path)
    return run


def _checkpoints(path: Path) -> None:
    whole = seeded(Toy, dropout=0.3)
    torch.manual_seed(dist.get_rank())
    _run(whole, 2, "partition")
    for saved in FORMS:
        at, file, module = path / f"{saved}.ckpt", path / f"{saved}.file", seeded(Toy, dropout=0.3)
        torch.manual_seed(dist.get_rank())
        _run(module, 2, saved, callbacks=[Saves(at)])
        if dist.get_rank() == 0:
            consolidate(at, file)
        dist.barrier()
        states = {}
        (other,) = {*FORMS} - {saved}
        for loaded, p, source in ((other, 2, at), (saved, 1, at), (other, 2, file)):
            resumed, looks = seeded(Toy, 99, dropout=0.3), Looks()
            _run(resumed, p, loaded, source, [looks])
            what = f"saved in the form {saved}, resumed in the form {loaded} at p={p} from {source.name}"
            states[what] = looks.state
            assert_close(looks.state, next(iter(states.values())), what)
            if (p, source) == (2, at):
                assert_same_losses(resumed.losses, whole.losses[-len(resumed.losses) :], what)
                assert_close(parameters(resumed), parameters(whole), what)
        if dist.get_rank() == 0:
            torch.save(torch.load(file, weights_only=True)["optimizer_states"], path / f"{saved}.state")
    dist.barrier()
    files = [torch.load(path / f"{form}.state", weights_only=True) for form in FORMS]
    for plain, world in zip(files[0][0]["state"].values(), files[1][0]["state"].values(), strict=True):
        assert_close(world, plain, "in a single file")


@pytest.mark.slow
def test_checkpoints_are_the_same_in_both_forms_and_each_resumes_in_the_other(tmp_path: Path) -> None:
    run_ranks(4, _checkpoints, tmp_path)


# -- hooks that read parameters ----------------------------------------------------------------------------------------


class Reads(Toy):
    """Keeps the shards as they are when a batch ends. Nothing has come by then unless it was awaited."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.on_request = OnRequest(self.trainer.strategy.mics.wire.hop_2.channel, [])
        self.on_request.__enter__()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.seen = {name: local(param).clone() for name, param in self.named_parameters()}
        self.on_request.__exit__()


def _hooks() -> None:
    found = []
    for form in FORMS:
        module = seeded(Reads)
        _fit(module, Batches(1), 1, form, accumulate_grad_batches=1)
        found.append(module.seen)
    assert_close(found[1], found[0], "in on_train_batch_end")


def test_a_hook_that_runs_after_the_step_reads_complete_parameters() -> None:
    run_ranks(2, _hooks)


class Watches(pl.Callback):
    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        held = [param.grad for group in optimizer.param_groups for param in group["params"]]
        self.seen = ([*(grad is not None for grad in held)], [param.grad for param in module.parameters()])


def _watched() -> tuple[list[str], list[str]]:
    told = []
    for form in FORMS:
        watches = Watches()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _fit(seeded(Toy), Batches(1), 1, form, accumulate_grad_batches=1, callbacks=[watches])
        told.append([text for each in caught if "optimizer_state" in (text := str(each.message))])
        assert all(watches.seen[0])
        assert (form == "world") == all(grad is None for grad in watches.seen[1])
    return told[0], told[1]


def test_who_watches_gradients_is_told_where_they_are() -> None:
    (plain, world), (elsewhere, there) = run_ranks(2, _watched)
    assert not plain and not elsewhere and not there  # rank 0 alone tells
    assert "Watches.on_before_optimizer_step will find gradients in pieces" in world[0]


def _forms_in_turn() -> None:
    """A Trainer takes over a module that another sharded in the other form."""
    modules = seeded(Toy), seeded(Toy)
    for first, second in ((FORMS[0], FORMS[0]), FORMS, FORMS[::-1]):
        for module, form in zip(modules, (first, second), strict=True):
            run = _fit(module, Batches(4), 1, form, accumulate_grad_batches=2)
            assert (run.strategy.mics.window.optimizer_shards is not None) == (form == "world")
        assert_same_training(modules[1], modules[0], "forms in turn", rtol=0.0, atol=0.0)


def test_a_module_is_trained_in_one_form_and_then_in_the_other() -> None:
    run_ranks(2, _forms_in_turn)


# -- refusals ----------------------------------------------------------------------------------------------------------


class Manual(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Newton(Toy):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Twice(torch.optim.SGD):
    """Runs its closure again after a first step, as sharpness-aware optimizers do."""

    def step(self, closure: Any = None) -> Any:
        closure()
        super().step()
        return super().step(closure)


class LooksAhead(Toy):
    def configure_optimizers(self) -> Any:
        return Twice(self.parameters(), lr=0.1)


def _refused(make: type[Toy]) -> tuple[str, int]:
    with collectives() as calls:
        try:
            trainer(mics(1, optimizer_state="world"), max_steps=1).fit(seeded(make), Batches(2))
        except (ValueError, RuntimeError) as error:
            return str(error), sum(call.kind == "send" for call in calls)
    return "", 0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Manual, 'optimizer_state="world" needs automatic optimization'),
        (
            Newton,
            'optimizer_state="world" .* LBFGS runs several forwards in a step.* choose optimizer_state="partition"',
        ),
        (LooksAhead, 'optimizer_state="world" .* Twice runs several forwards in a step'),
    ],
)
def test_what_cannot_be_right_is_refused_on_every_rank(make: type[Toy], says: str) -> None:
    for said, sent in run_ranks(2, _refused, make):
        assert re.search(says, said), said
        assert make is LooksAhead or sent == 0


def test_a_form_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer_state='both' is not understood; choose one of partition, world"):
        mics(1, optimizer_state="both")
