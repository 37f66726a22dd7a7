"""MiCSAccelerator(partition_size="auto") on real ranks: one plan for all, nothing lost, errors everywhere."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils import ModelOutput

from lightning_mics.accelerate import MiCSAccelerator
from lightning_mics.accelerate_planning import loss_of_call
from tests.distributed.accelerating import Net, data, launched, ours
from tests.distributed.ranks import run_ranks
from tests.distributed.test_planning import Endless, hurry
from tests.raising import raised

STEPS = 3


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss: Tensor = (model(batch[0]) - batch[1]).square().mean()
    return loss


def losses(accelerator: MiCSAccelerator, **options: Any) -> list[float]:
    """Of some micro-steps on data that is shuffled."""
    model: Any = Net(dropout=0.1)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(11 + dist.get_rank())
    model, optimizer, loader = accelerator.prepare(model, optimizer, data(shuffle=True))
    found = []
    for (x, y), _ in zip(loader, range(STEPS), strict=False):
        with accelerator.accumulate(model):
            loss = (model(x) - y).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found


def _plans() -> None:
    hurry()
    with launched():
        planned = ours("auto", rung="auto", ranks_per_node=2, gradient_accumulation_steps=2, training_step=squared)
        assert planned.topology.partition_size == 2
        trained = losses(planned)
        sizes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(sizes, planned.topology.partition_size)
        assert len({*sizes}) == 1, sizes
        (root,) = planned.roots()
        assert root.groups.topology == planned.topology
        assert root.window.climb is not None and root.window.climb.first == planned._planned_rung
        pinned = ours(sizes[0], rung="auto", ranks_per_node=2, gradient_accumulation_steps=2)
        assert losses(pinned) == trained, "planning took a sample or drew a random number"


def _refuses() -> None:
    hurry()
    needs_both = 'partition_size="auto" plans from one model and its data loader, prepared in one call'
    with launched():
        for options, objects, says in (
            ({"memory_budget": 1000}, lambda: (Net(), data()), "the model does not fit 2 nodes"),
            ({}, lambda: (Net(), DataLoader(Endless(), 2)), "gives one only by taking it out of the training data"),
            ({"training_step": _fails}, lambda: (Net(), data()), "as meant; choose .* or give training_step"),
            ({}, lambda: (Net(),), needs_both),
            ({}, lambda: (Net(), Net(), data()), needs_both),
        ):
            accelerator = ours("auto", ranks_per_node=2, **options)
            error = raised(partial(accelerator.prepare, *objects()))
            assert error.startswith("ValueError: ")
            with pytest.raises(ValueError, match=says):
                raise ValueError(error)
        accelerator = ours("auto", ranks_per_node=2)
        assert needs_both in raised(partial(accelerator.prepare_model, Net()))


def _fails(model: nn.Module, batch: Any) -> Tensor:
    raise RuntimeError("as meant")


def test_all_ranks_take_one_plan_and_lose_nothing() -> None:
    run_ranks(4, _plans)


def test_what_cannot_be_planned_is_refused_on_all_ranks() -> None:
    run_ranks(4, _refuses)


class Named(nn.Module):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        loss = None if labels is None else (x - labels).sum()
        return ModelOutput(loss=loss, logits=2 * x, hidden=(x,))


def test_a_loss_is_found_in_what_a_call_returns() -> None:
    x, labels = torch.ones(3, requires_grad=True), torch.zeros(3)
    assert loss_of_call(Named(), {"x": x, "labels": labels}).item() == 3
    assert loss_of_call(Named(), {"x": x}).item() == 9
    assert loss_of_call(nn.Identity(), (x, labels)).item() == 3
    assert loss_of_call(nn.Identity(), x).item() == 3
    with pytest.raises(ValueError, match="Identity returns nothing that could be trained on"):
        loss_of_call(nn.Identity(), [labels])
