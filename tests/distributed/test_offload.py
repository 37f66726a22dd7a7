"""What is on the host: the numbers of a run that has all on its device, bit for bit.

Here host and device are one memory. What goes between them is copied nevertheless, but for what the engine's own policy
moves; `tests/test_offload.py` has what can be told of two memories without an accelerator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lightning_mics.optimizer_shards import parameter_of
from tests.distributed import accelerating, fabrics
from tests.distributed.ranks import run_ranks
from tests.distributed.test_optimization import Rivals
from tests.distributed.toys import (
    Batches,
    Toy,
    assert_close,
    assert_same_losses,
    assert_same_training,
    mics,
    on_cpu,
    optimizer_state,
    parameters,
    seeded,
    trainer,
)

HOW = ("optimizer", "parameters")


def _apart() -> float:
    """By how much a step on the host may differ: not at all where it is the device."""
    return 0.0 if on_cpu() else 1e-6


class Watches(Toy):
    """Has a parameter without dimensions, and notes at each step whether it is copies that are stepped."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.copies: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()

        def look(*_: Any) -> None:
            self.copies.append(all(parameter_of(param) is not param for param in _held(optimizer)))

        optimizer.register_step_post_hook(look)
        return optimizer


def _held(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _ran(offload: str | None, partition_size: int = 2, rung: str = "block/sharded", **options: Any) -> tuple[Any, Any]:
    module, ckpt_path = seeded(Watches), options.pop("ckpt_path", None)
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5} | options
    run = trainer(mics(partition_size, rung=rung, offload=offload), **options)
    run.fit(module, Batches(8), Batches(1, first=900), ckpt_path=ckpt_path)
    return run, module


def _trains() -> None:
    cases: list[dict[str, Any]] = [
        {"partition_size": 4, "rung": "window/whole"},
        {"partition_size": 1},
        {"rung": "micro_step/sharded", "precision": "bf16-mixed"},
        {"precision": "bf16-true"},
    ]
    for case in cases:
        plain, expected = _ran(None, **case)
        state = optimizer_state(plain.optimizers[0])
        for how in HOW:
            # Where it has them whole otherwise, what lies together in hop 2 is another: four terms, in another order.
            off = 1e-6 if (how, case) == ("parameters", {"partition_size": 1}) else _apart()
            run, module = _ran(how, **case)
            assert_same_training(module, expected, f"{how}, {case}", rtol=off, atol=off)
            assert_close(optimizer_state(run.optimizers[0]), state, f"{how}, {case}, state", atol=off)
            assert module.copies == [how == "optimizer"] * 3
            assert all(any(param is own for own in module.parameters()) for param in _held(run.optimizers[0]))


def _resumes() -> None:
    """From a checkpoint of any form in any other."""
    options: dict[str, Any] = {"enable_checkpointing": True, "max_epochs": 2}
    _, whole = _ran(None, **options)
    for saves, goes_on in ((None, "optimizer"), ("optimizer", "parameters"), ("parameters", None)):
        run, _ = _ran(saves, **options | {"max_epochs": 1})
        path = f"{saves}-{goes_on}.ckpt"
        run.save_checkpoint(path)
        _, resumed = _ran(goes_on, **options, ckpt_path=Path(path))
        assert_same_losses(resumed.losses, whole.losses[8:], path, rtol=_apart())
        assert_close(parameters(resumed), parameters(whole), path, atol=_apart())


def _steps_by_hand() -> None:
    """Two optimizers, each with its own parameters."""
    modules = []
    for how in (None, *HOW):
        modules.append(seeded(Rivals))
        trainer(mics(offload=how)).fit(modules[-1], Batches(4))
    for module in modules[1:]:
        assert_close(parameters(module), parameters(modules[0]), "manual optimization")


def _other_loops() -> None:
    losses, found = [], []
    for how in (None, *HOW):
        fabric = fabrics.mics(offload=how)
        model, optimizer = fabrics.set_up(fabric)

        def clip(fabric: Any = fabric, model: Any = model, optimizer: Any = optimizer) -> None:
            fabric.clip_gradients(model, optimizer, max_norm=0.5)

        losses.append(fabrics.train(fabric, model, optimizer, before_step=clip))
        found.append(parameters(model.module))
    with accelerating.launched():
        for how in (None, *HOW):
            accelerator = accelerating.ours(offload=how, gradient_accumulation_steps=2)
            net = accelerating.Net()
            adam = torch.optim.AdamW(net.parameters(), lr=1e-2)
            model, adam, data = accelerator.prepare(net, adam, accelerating.data(24))
            losses.append([_accelerated(accelerator, model, adam, batch) for batch in data])
            found.append(accelerating.parameters(accelerator, model))
    for first in (0, 3):
        for index in (first + 1, first + 2):
            assert_same_losses(losses[index], losses[first], "another's loop", rtol=_apart())
            assert_close(found[index], found[first], "another's loop", atol=_apart())


def _accelerated(accelerator: Any, model: Any, optimizer: Any, batch: Any) -> float:
    with accelerator.accumulate(model):
        loss = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.item())


def _refused() -> list[str]:
    said = []
    scaled = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    for how in HOW:
        with pytest.raises(ValueError) as error:
            trainer(mics(offload=how), **scaled).fit(seeded(Toy), Batches(1))
        said.append(str(error.value))
    module = seeded(Toy)
    trainer(mics()).fit(module, Batches(1))
    with pytest.raises(ValueError) as error:
        trainer(mics(offload="parameters")).fit(module, Batches(1))
    trainer(mics(offload="optimizer")).fit(module, Batches(1))
    return [*said, str(error.value)]


def _by_hand_in_other_loops_and_refused() -> list[str]:
    _other_loops()
    _steps_by_hand()
    return _refused()


@pytest.mark.slow
def test_numbers_are_those_of_a_run_that_has_all_on_its_device() -> None:
    run_ranks(4, _trains)


@pytest.mark.slow
def test_a_checkpoint_of_any_form_goes_on_in_any_other() -> None:
    run_ranks(4, _resumes)


def test_loops_of_the_users_own_and_what_cannot_be_right() -> None:
    for *scaled, moved in run_ranks(4, _by_hand_in_other_loops_and_refused):
        for how, said in zip(HOW, scaled, strict=True):
            assert said.startswith(f'offload="{how}" does not go with a gradient scaler')
        assert 'is to be run with offload="parameters" now, which would move its shards' in moved
