"""A window cut short in any way never leaks into the next.

Four ranks in two partition groups, windows of four micro-steps. The reference is Lightning's own DDP where that is
right; where DDP steps on sums that it has not synchronised, it is `by_hand`, a plain loop in one process over the data
of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import GradientAccumulationScheduler, timer
from torch import Tensor

from lightning_mics.groups import Groups
from lightning_mics.ladder import RUNGS
from lightning_mics.sharding import shard
from lightning_mics.topology import Topology
from tests.distributed.counting import collectives
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import (
    Batch,
    Batches,
    Toy,
    assert_same_training,
    batch_of,
    ddp,
    mics,
    seeded,
    trainer,
)

WINDOW = 4
VALIDATION = 900
LOWEST, HIGHEST = map(str, (RUNGS[0], RUNGS[-1]))
"""Rungs of the memory ladder: everything in shards; parameters and gradients whole for the window."""


def _validation() -> Batches:
    return Batches(2, first=VALIDATION)


def _fit(strategy: Any, module: Toy, data: Any, val: Any = None, **options: Any) -> Toy:
    trainer(strategy, **({"accumulate_grad_batches": WINDOW} | options)).fit(module, data, val)
    return module


def _compare(
    what: str, make: Callable[[], Toy], fits: Callable[[Any, Toy], object], rungs: Sequence[str] = (LOWEST,)
) -> None:
    """`fits(strategy, module)` under MiCS and under DDP end alike; `strategy()` makes one for each Trainer."""
    theirs = make()
    fits(ddp, theirs)
    for rung in rungs:
        ours = make()
        fits(partial(mics, rung=rung), ours)
        assert_same_training(ours, theirs, f"{what}, {rung}")


def by_hand(module: Toy, micro_steps: int, skipped: Collection[int] = (), unstepped: Collection[int] = ()) -> Toy:
    """Train as the strategy should: on all ranks' batches, in one process, one window after the other.

    Args:
        module: trained in place; keeps the losses of this rank's batches, and validates after every window.
        micro_steps: how many.
        skipped: micro-steps that add nothing to their window.
        unstepped: windows that end without an optimizer step.
    """
    optimizer, mine = module.configure_optimizers(), dist.get_rank()
    for window in range(micro_steps // WINDOW):
        optimizer.zero_grad()
        for index in range(window * WINDOW, (window + 1) * WINDOW):
            losses = [module.loss(batch_of(index, rank)) for rank in range(dist.get_world_size())]
            if index not in skipped:
                module.losses.append(losses[mine].item())
                (torch.stack(losses).mean() / WINDOW).backward()
        if window not in unstepped:
            optimizer.step()
        module.validated += [module.loss(batch_of(VALIDATION + i, mine)).item() for i in range(2)]
    return module


# -- the data or the schedule ends a window early ----------------------------------------------------------------------


def _short_windows() -> None:
    def seven(strategy: Any, module: Toy, **options: Any) -> None:
        _fit(strategy(), module, Batches(7), max_epochs=3, **options)

    def scheduled(strategy: Any, module: Toy) -> None:
        windows = GradientAccumulationScheduler({0: 1, 1: 4, 2: 2})
        seven(strategy, module, accumulate_grad_batches=1, callbacks=[windows])

    _compare("short window at the epoch's end", lambda: seeded(Toy), seven)
    _compare("GradientAccumulationScheduler", lambda: seeded(Toy), scheduled)
    _compare("the epoch given up in mid-window", lambda: seeded(GivesUp), seven)
    _compare("gradients zeroed, not dropped", lambda: seeded(KeepsZeros), lambda s, m: _fit(s(), m, Batches(8)))


class GivesUp(Toy):
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 1 and batch_idx == 5 else None


class KeepsZeros(Toy):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


def test_short_windows() -> None:
    run_ranks(4, _short_windows)


# -- batches and backwards that are skipped ----------------------------------------------------------------------------


class SkipsBackward(Toy):
    """Runs a forward, and no backward, at some micro-steps, in the way of Lightning's StochasticWeightAveraging."""

    def __init__(self, skip: Collection[int]) -> None:
        super().__init__()
        self.skip = skip

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.trainer.fit_loop._skip_backward = batch_idx in self.skip

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch) if batch_idx in self.skip else super().training_step(batch, batch_idx)


# Of windows of four, 4 begins the second, 9 is inside the third, 15 is the boundary of the fourth. Lightning does not
# clear gradients at a beginning that it skips.
SKIPPED = {4, 9, 15}


def _skipped(what: str, make: Callable[[], Toy], data: Batches, unstepped: Collection[int]) -> None:
    hand = by_hand(seeded(Toy), 20, SKIPPED, unstepped)
    validated, hand.validated = hand.validated, []
    for rung in (LOWEST, HIGHEST):
        assert_same_training(_fit(mics(rung=rung), make(), data), hand, f"{what}, {rung}")
    hand.validated = validated  # which clears gradients, too
    assert_same_training(_fit(mics(), make(), data, _validation(), val_check_interval=WINDOW), hand, what)


def _skipped_batches() -> None:
    # Nor does Lightning step at a boundary without a batch.
    _skipped("batches of None", lambda: seeded(Toy), Batches(20, skip=SKIPPED), unstepped={3})


def _skipped_backwards() -> None:
    make = partial(seeded, SkipsBackward, skip=SKIPPED)
    _skipped("forwards without a backward", make, Batches(20), unstepped=())


def test_skipped_batches_add_nothing_and_leak_nothing() -> None:
    run_ranks(4, _skipped_batches)


def test_a_boundary_without_backward_steps_on_the_synchronised_window() -> None:
    run_ranks(4, _skipped_backwards)


# -- guards that drop gradients or steps -------------------------------------------------------------------------------


class DropsGradients(Toy):
    """A guard against bad gradients that drops them after some backwards."""

    def on_after_backward(self) -> None:
        if len(self.losses) - 1 in (5, 11):  # inside the second window, at the boundary of the third
            self.zero_grad()


class SkipsStep(Toy):
    """A guard that runs the closure of the second window's boundary, and leaves the step out."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx == 7:
            optimizer_closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


def _guards() -> None:
    for guard in (DropsGradients, SkipsStep):
        _compare(guard.__name__, lambda guard=guard: seeded(guard), lambda s, m: _fit(s(), m, Batches(16)))


def test_guards_that_drop_gradients_or_steps() -> None:
    run_ranks(4, _guards)


# -- validation in between ---------------------------------------------------------------------------------------------


def _validation_between() -> None:
    for every in (3, 4):  # inside windows; at their boundaries, where the step has just changed the parameters
        _compare(
            f"validation every {every}",
            lambda: seeded(Toy),
            lambda s, m, every=every: _fit(s(), m, Batches(8), _validation(), val_check_interval=every),
        )


def test_validation_in_between() -> None:
    run_ranks(4, _validation_between)


# -- runs that stop in mid-window, and a second fit of the same model --------------------------------------------------


class Stops(Toy):
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.trainer.should_stop = len(self.losses) == 6


class Clock:
    """A clock that a test sets."""

    now = 0.0

    @classmethod
    def monotonic(cls) -> float:
        return cls.now


class TakesLong(Toy):
    """Its sixth training step takes an hour."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        Clock.now += 3600.0 * (len(self.losses) == 5)
        return super().training_step(batch, batch_idx)


def _stopped_then_again() -> None:
    def twice(strategy: Any, module: Toy, **options: Any) -> None:
        _fit(strategy(), module, Batches(8), **options)
        if len(module.losses) != 6:
            raise AssertionError(f"stopped after {len(module.losses)} micro-steps, not after 6")
        _fit(strategy(), module, Batches(8, first=100))

    _compare("should_stop", lambda: seeded(Stops), twice, [LOWEST, HIGHEST])
    with patch.object(timer, "time", Clock):
        _compare("max_time", lambda: seeded(TakesLong), lambda s, m: twice(s, m, max_time={"minutes": 30}))


class Fails(Toy):
    """Raises in the seventh training step, on every rank: in forward, or in the midst of backward."""

    def __init__(self, error: type[BaseException], where: str) -> None:
        super().__init__()
        self.error, self.where = error, where

    def forward(self, x: Tensor) -> Tensor:
        fails = self.training and len(self.losses) == 6
        x = self.layers[0](self.enter(x))
        if fails and self.where == "forward":
            raise self.error("as meant")
        if fails and self.where == "backward":
            x.register_hook(self._raise)
        return self.leave(self.layers[2](self.layers[1](x)))

    def _raise(self, gradient: Tensor) -> None:
        raise self.error("as meant")


def _fails_then_again(
    error: type[BaseException], where: str, caught: type[BaseException], rungs: Sequence[str]
) -> None:
    def twice(strategy: Any, module: Toy) -> None:
        try:
            _fit(strategy(), module, Batches(8))
        except caught:
            module.losses.append(0.0)
        else:
            raise AssertionError("nothing was raised")
        _fit(strategy(), module, Batches(8, first=100))

    _compare(f"{error.__name__} in {where}", lambda: seeded(Fails, error=error, where=where), twice, rungs)


def _exceptions_then_again() -> None:
    _fails_then_again(ValueError, "forward", ValueError, [LOWEST, HIGHEST])
    _fails_then_again(ValueError, "backward", ValueError, [LOWEST, HIGHEST])
    _fails_then_again(KeyboardInterrupt, "forward", SystemExit, [LOWEST])


class ReturnsNone(Toy):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if len(self.losses) == 7 else loss


def _none_then_again() -> None:
    """Lightning refuses a training_step that returns None on several ranks; the module trains on all the same."""

    def twice(strategy: Any, module: Toy) -> None:
        try:
            _fit(strategy(), module, Batches(8))
        except RuntimeError as refusal:
            if "returning None" not in str(refusal):
                raise
        _fit(strategy(), module, Batches(8, first=100))

    _compare("training_step returns None", lambda: seeded(ReturnsNone), twice)


def test_stopped_in_mid_window_then_fit_again() -> None:
    run_ranks(4, _stopped_then_again)


def test_an_exception_in_mid_window_then_fit_again() -> None:
    run_ranks(4, _exceptions_then_again)


def test_a_training_step_of_none_then_fit_again() -> None:
    run_ranks(4, _none_then_again)


def _bracketed() -> list[int]:
    """Messages of hop 2 in backward passes after brackets that ended in every way."""
    n = dist.get_world_size()
    root = shard(torch.nn.Linear(4, 4), Groups.create(Topology(n, n, 1), "cpu"))
    root.one_backward = True

    def messages() -> int:
        with collectives() as calls, root.window.backward():
            root(torch.ones(1, 4)).sum().backward()
        return len(calls)

    plain = messages()
    with root.window.hop_1_only():
        with root.window.hop_1_only():
            inside = [messages()]
        inside.append(messages())  # the inner bracket has not ended the outer one
    after = [messages()]
    with suppress(KeyError), root.window.hop_1_only():
        raise KeyError
    after.append(messages())
    return [plain, *inside, *after]


def test_synchronisation_is_back_on_however_a_bracket_ends() -> None:
    for plain, *inside_and_after in run_ranks(2, _bracketed):
        assert plain > 0
        assert inside_and_after == [0, 0, plain, plain]
