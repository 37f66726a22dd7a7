"""MiCSAccelerator against Accelerate's own Accelerator, which is DDP on the same ranks."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from tests.distributed.accelerating import Net, data, launched, ours, parameters, theirs
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import assert_close, assert_same_losses

# -- windows -----------------------------------------------------------------------------------------------------------


def train(accelerator: Accelerator, *, epochs: int = 2, clip: float | None = None, **options: Any) -> tuple[Any, ...]:
    """Eleven micro-steps an epoch: the third window is short."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 20))
    torch.manual_seed(5)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, data(shuffle=True), scheduler)
    losses, norms = [], []
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                losses.append(loss.item())
                accelerator.backward(loss)
                if clip and accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), clip)))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return losses, parameters(accelerator, model), norms, scheduler.get_last_lr()


def _windows() -> None:
    with launched():
        for window in (1, 4):
            expected = train(theirs(gradient_accumulation_steps=window), clip=0.05)
            for p in (1, 2, 4):
                what = f"p = {p}, window {window}"
                found = train(ours(p, gradient_accumulation_steps=window), clip=0.05)
                assert_same_losses(found[0], expected[0], what, rtol=1e-6)
                assert_close(found[1], expected[1], what, atol=1e-6)
                assert_same_losses(found[2], expected[2], f"norms, {what}", rtol=1e-6)
                assert found[3] == expected[3]


def test_losses_parameters_and_norms_are_those_of_ddp() -> None:
    run_ranks(4, _windows)
