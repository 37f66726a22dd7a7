"""Models of every kind, unmodified, train under `strategy="mics"` as they do under DDP.

Two windows of two micro-steps of SGD with momentum and weight decay, which tells a gradient of zeros from none. Where
ranks go different ways DDP itself is wrong (a parameter that is used in a window, and by no rank in its last
micro-step, keeps what each rank has by itself), and the reference averages gradients by hand.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics.network import Network, Tier
from tests.distributed.models import CASES, Batch, Case
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import assert_close, assert_same_losses, ddp, mics, parameters, trainer, wholes

WINDOW, MICRO_STEPS = 2, 4
# A network without latency, so that both tiers are used however small the model.
NETWORK = Network(Tier(0.0, 1e9), Tier(0.0, 1e8))
WAYS = {
    "p=2": mics,
    "p=4 on two nodes": functools.partial(mics, 4, ranks_per_node=2, network=NETWORK),
    "p=2, whole for a window": functools.partial(mics, rung="window/whole"),
}
# Trained in all of these ways, the others in the first.
HARD = (
    "t5",
    "mixtral",
    "shared across blocks",
    "control flow differs",
    "experts without a token",
)


class Trained(pl.LightningModule):
    """A case as a user would train it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.model = case.seeded()
        self.losses: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.case.loss(self.model, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer(self)


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


class Batches:
    """This rank's batches."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __len__(self) -> int:
        return MICRO_STEPS

    def __iter__(self) -> Iterator[Batch]:
        return (self.case.of(dist.get_rank(), micro) for micro in range(MICRO_STEPS))


Result = tuple[list[float], dict[str, Tensor]]


def _by_trainer(case: Case, strategy: Any) -> Result:
    module = Trained(case)
    run = trainer(strategy, accumulate_grad_batches=WINDOW, gradient_clip_val=1.0)
    run.fit(module, Batches(case))
    return module.losses, wholes(module.model.state_dict())


def _by_hand(case: Case) -> Result:
    """Each rank by itself; before a step, gradients are averaged over all ranks."""
    model, losses = case.seeded(), []
    step = optimizer(model)
    for micro, batch in enumerate(Batches(case)):
        loss = case.loss(model, batch)
        losses.append(loss.item())
        (loss / WINDOW).backward()
        if micro % WINDOW == WINDOW - 1:
            _average(model)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            step.step()
            step.zero_grad()
    return losses, {name: value.detach() for name, value in model.state_dict().items()}


def _average(model: nn.Module) -> None:
    for param in model.parameters():
        used = torch.tensor(float(param.grad is not None))
        gradient = torch.zeros_like(param) if param.grad is None else param.grad
        for tensor in (used, gradient):
            dist.all_reduce(tensor)
        param.grad = gradient / dist.get_world_size() if used else None


def _differences(names: list[str]) -> dict[str, str]:
    """What is wrong with each model, if anything, by its name and how it was trained."""
    wrong = {}
    for name in names:
        case = CASES[name]
        losses, state = _by_hand(case) if case.by_hand else _by_trainer(case, ddp())
        for how, strategy in (WAYS if name in HARD else {"p=2": WAYS["p=2"]}).items():
            ours = _by_trainer(case, strategy())
            try:
                assert_same_losses(ours[0], losses, "losses", rtol=2e-6)
                assert_close(_comparable(case, ours[1]), _comparable(case, state), "state", atol=2e-6)
            except AssertionError as error:
                wrong[f"{name}, {how}"] = str(error)
    return wrong


def _comparable(case: Case, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Buffers are rank 0's; on other ranks they are nobody's."""
    buffers = dict(case.build().named_buffers())
    return {name: value for name, value in state.items() if dist.get_rank() == 0 or name not in buffers}


TRANSFORMERS = ("bert", "llama, untied", "t5", "vit", "mixtral", "whisper")


def test_every_kind_of_module_trains_as_under_ddp() -> None:
    assert run_ranks(4, _differences, [name for name in CASES if name not in TRANSFORMERS]) == [{}] * 4


@pytest.mark.slow
def test_every_kind_of_transformer_trains_as_under_ddp() -> None:
    assert run_ranks(4, _differences, [*TRANSFORMERS]) == [{}] * 4


# -- parameters without dimensions, which have no rows to shard --------------------------------------------------------


class Adam(Trained):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Manual(Trained):
    automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        step, boundary = self.optimizers(), batch_idx % WINDOW == WINDOW - 1
        with step.toggle_model(sync_grad=boundary):
            self.manual_backward(super().training_step(batch, batch_idx) / WINDOW)
        if boundary:
            step.step()
            step.zero_grad()


def _scalars() -> None:
    case = CASES["scalar parameters"]
    for module in (Adam, Manual):
        expected = module(case)
        window = WINDOW if expected.automatic_optimization else 1
        trainer(ddp(), accumulate_grad_batches=window, max_epochs=2).fit(expected, Batches(case))
        for options in ({}, {"optimizer_state": "world"}, {"param_dtype": torch.float32, "partition_size": 4}):
            if options.get("optimizer_state") and module is Manual:
                continue  # refused
            before, after = module(case), module(case)
            run = trainer(mics(**options), accumulate_grad_batches=window)
            run.fit(before, Batches(case))
            run.save_checkpoint("epoch.ckpt")
            run = trainer(mics(**options), accumulate_grad_batches=window, max_epochs=2)
            run.fit(after, Batches(case), ckpt_path="epoch.ckpt")
            what = f"{module.__name__}, {options}"
            assert_same_losses(before.losses + after.losses, expected.losses, what, rtol=2e-6)
            assert_close(parameters(after), parameters(expected), what, atol=2e-5)
            assert after.model.logit_scale.shape == torch.Size([])


def test_scalar_parameters_are_averaged_and_saved() -> None:
    run_ranks(4, _scalars)
