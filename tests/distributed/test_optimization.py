"""Whatever steps the parameters under DDP steps them alike under MiCS.

Manual and automatic optimization, optimizers, schedulers, clipping, frozen and unused parameters, logged means: four
ranks in two partition groups against Lightning's DDP on the same ranks, or, where DDP cannot do it, one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.ranks import run_ranks
from tests.distributed.toys import (
    WIDTH,
    Batch,
    Batches,
    Layer,
    Toy,
    assert_same_losses,
    assert_same_training,
    batch_of,
    ddp,
    mics,
    seeded,
    trainer,
    whole,
)


def _compare(make: Callable[[], Toy], what: str = "", batches: int = 12, **options: Any) -> tuple[Toy, Toy]:
    """Train under MiCS and under DDP, and hold one against the other."""
    ours, theirs = make(), make()
    trainer(mics(), **options).fit(ours, Batches(batches))
    trainer(ddp(), **options).fit(theirs, Batches(batches))
    assert_same_training(ours, theirs, what or type(ours).__name__)
    return ours, theirs


# -- manual optimization -----------------------------------------------------------------------------------------------


class Manual(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def kept(self, loss: Tensor) -> Tensor:
        self.losses.append(loss.item())
        return loss


class Rivals(Manual):
    """A generator and a discriminator in one root, each with its optimizer and its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = nn.Sequential(nn.Linear(3, WIDTH), Layer(), nn.Linear(WIDTH, 1))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        maker, judge = self.optimizers()
        (noise, real), score = batch, nn.functional.softplus
        self.toggle_optimizer(maker)
        loss = self.kept(score(-self.judge(self(noise))).mean())
        maker.zero_grad()
        self.manual_backward(loss)
        maker.step()
        self.untoggle_optimizer(maker)

        self.toggle_optimizer(judge)
        fake = self(noise).detach()
        loss = self.kept((score(-self.judge(real)) + score(self.judge(fake))).mean())
        judge.zero_grad()
        self.manual_backward(loss)
        judge.step()
        self.untoggle_optimizer(judge)

    def configure_optimizers(self) -> Any:
        judges = {id(p) for p in self.judge.parameters()}
        makers = [p for p in self.parameters() if id(p) not in judges]
        return torch.optim.AdamW(makers, lr=1e-2), torch.optim.SGD(self.judge.parameters(), lr=0.1, momentum=0.9)


class TogglesSync(Manual):
    """Three micro-steps that do not synchronise, then one that does."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer, boundary = self.optimizers(), batch_idx % 4 == 3
        with optimizer.toggle_model(sync_grad=boundary):
            self.manual_backward(self.kept(self.loss(batch)) / 4)
        if boundary:
            optimizer.step()
            optimizer.zero_grad()


class NeverSyncs(Manual):
    """Forgets to ask for synchronisation before it steps, where DDP would step on each rank's own sums."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        with optimizer.toggle_model(sync_grad=False):
            self.manual_backward(self.kept(self.loss(batch)) / 4)
        if batch_idx % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()


class Accumulates(Manual):
    """Every backward synchronises; every other batch steps."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.kept(self.loss(batch)) / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            optimizer.zero_grad()


class TwoPasses(Manual):
    """Two forwards and backwards in one training step, then a step; the parameters outside blocks serve in both."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.kept(self.loss(batch)))
        self.manual_backward(self.kept(self.loss((-batch[0], batch[1]))))
        optimizer.step()


class Plain(Accumulates):
    """A module without repeated layers: nothing is gathered but the root."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()


def _manual() -> None:
    for module in (TogglesSync, Accumulates):
        _compare(lambda module=module: seeded(module))
    ours, theirs = seeded(NeverSyncs), seeded(TogglesSync)
    trainer(mics()).fit(ours, Batches(12))
    trainer(ddp()).fit(theirs, Batches(12))
    assert_same_training(ours, theirs, "synchronised by the step")


def _plain() -> None:
    _compare(lambda: seeded(Plain))


def _two_passes() -> None:
    _compare(lambda: seeded(TwoPasses))


def _rivals() -> None:
    _compare(lambda: seeded(Rivals))


def test_manual_accumulation() -> None:
    run_ranks(4, _manual)


def test_manual_optimization_without_blocks() -> None:
    run_ranks(4, _plain)


def test_two_passes_in_one_training_step() -> None:
    run_ranks(4, _two_passes)


def test_two_optimizers_that_take_turns() -> None:
    run_ranks(4, _rivals)


# -- optimizers, schedulers, clipping ----------------------------------------------------------------------------------


class Optimized(Toy):
    """Steps by `make(parameters)` under a schedule, and keeps the norm of the gradients that each step sees."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.make = make
        self.norms: list[float] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        self.norms.append(whole(norm).item())
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 2}}


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def _fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def _optimizers() -> None:
    for make, clip in ((_sgd, {"norm": 0.05}), (_adamw, {"value": 0.01}), (_fused, {"norm": 0.1})):
        ((algorithm, value),) = clip.items()
        ours, theirs = _compare(
            lambda make=make: seeded(Optimized, make=make),
            f"{make.__name__} clipped by {algorithm}",
            accumulate_grad_batches=2,
            gradient_clip_val=value,
            gradient_clip_algorithm=algorithm,
        )
        assert_same_losses(ours.norms, theirs.norms, f"{make.__name__}, norms", rtol=2e-6)
        assert_same_losses(ours.rates, theirs.rates, f"{make.__name__}, learning rates")
        if min(ours.norms) < value:
            raise AssertionError(f"{make.__name__}: nothing was clipped")


def test_optimizers_schedules_and_clipping() -> None:
    run_ranks(4, _optimizers)


# -- frozen and unused parameters --------------------------------------------------------------------------------------


class Thaws(Toy):
    """A layer and a bias are frozen until the third window; then another layer freezes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].requires_grad_(False)
        self.enter.bias.requires_grad_(False)

    def thaw(self) -> None:
        self.requires_grad_(True)
        self.layers[2].requires_grad_(False)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 8:
            self.thaw()


def _frozen() -> None:
    ours, theirs = seeded(Thaws), seeded(Thaws)
    trainer(mics(), accumulate_grad_batches=4).fit(ours, Batches(16))
    optimizer = theirs.configure_optimizers()
    for index in range(16):  # DDP decides what trains when it wraps the module, so that it cannot be the reference
        if index == 8:
            theirs.thaw()
        losses = [theirs.loss(batch_of(index, rank)) for rank in range(4)]
        theirs.losses.append(losses[dist.get_rank()].item())
        (torch.stack(losses).mean() / 4).backward()
        if index % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert_same_training(ours, theirs, "frozen, then unfrozen")


def test_frozen_parameters_and_unfreezing() -> None:
    run_ranks(4, _frozen)


class Spares(Toy):
    """One module that no rank uses, one that a single rank uses in a single micro-step of each window."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(WIDTH, WIDTH)
        self.seldom = nn.Linear(8, 3)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + self.seldom(batch[0]).square().mean() if self.uses_seldom(batch_idx) else loss

    def uses_seldom(self, batch_idx: int) -> bool:
        return dist.get_rank() == 1 and batch_idx % 4 == 2

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.never.weight.grad is not None or self.seldom.weight.grad is None:
            raise AssertionError("a gradient where none was due, or none where one was")

    def configure_optimizers(self) -> Any:
        return _adamw(self.parameters())


class Boundary(Spares):
    """The same, at the boundary: where DDP looks for what is used."""

    def uses_seldom(self, batch_idx: int) -> bool:
        return dist.get_rank() == 1 and batch_idx % 4 == 3


def _unused() -> None:
    _compare(lambda: seeded(Boundary), accumulate_grad_batches=4)
    ours, theirs = seeded(Spares), seeded(Spares)
    trainer(mics(), accumulate_grad_batches=4).fit(ours, Batches(12))
    optimizer = theirs.configure_optimizers()
    for index in range(12):  # DDP misses a gradient that came before the boundary, and only there
        losses = [theirs.loss(batch_of(index, rank)) for rank in range(4)]
        theirs.losses.append(losses[dist.get_rank()].item())
        if index % 4 == 2:
            losses[1] = losses[1] + theirs.seldom(batch_of(index, 1)[0]).square().mean()
        (torch.stack(losses).mean() / 4).backward()
        if index % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert_same_training(ours, theirs, "used by one rank before the boundary")


def test_parameters_that_no_rank_or_one_rank_uses() -> None:
    run_ranks(4, _unused)


# -- logging -----------------------------------------------------------------------------------------------------------


class Logs(Toy):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        value = float(10 * dist.get_rank() + batch_idx)
        for name in ("mean", "sum", "max", "min"):
            self.log(f"step_{name}", value, reduce_fx=name, sync_dist=True, on_epoch=True, on_step=False)
        self.log("whole", dist.get_rank(), sync_dist=True)
        self.log("mine", value)
        return loss


def _logged() -> None:
    metrics = []
    for strategy in (mics(), ddp()):
        run = trainer(strategy, accumulate_grad_batches=2)
        run.fit(seeded(Logs), Batches(4))
        metrics.append({name: float(value) for name, value in run.callback_metrics.items()})
    if metrics[0] != metrics[1]:
        raise AssertionError(f"logged {metrics[0]}, under DDP {metrics[1]}")


def test_logged_values_are_reduced_over_all_ranks() -> None:
    run_ranks(4, _logged)
