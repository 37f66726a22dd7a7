"""The optimizer and its schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recipes.optim import adamw, warmup_cosine


def small_module() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))


def test_biases_and_norms_do_not_decay() -> None:
    module = small_module()
    optimizer = adamw(module, lr=1e-3, weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: decay[id(p)] for name, p in module.named_parameters()}
    assert by_name == {"0.weight": 0.3, "1.weight": 0.3, "1.bias": 0.0, "2.weight": 0.0, "2.bias": 0.0}


def test_frozen_parameters_are_left_out() -> None:
    module = small_module()
    module[0].requires_grad_(False)  # type: ignore[index]
    optimizer = adamw(module, lr=1e-3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_fused_only_where_asked_and_where_the_device_has_it() -> None:
    assert adamw(small_module(), lr=1e-3).defaults["fused"] is True
    assert adamw(small_module(), lr=1e-3, fused=False).defaults["fused"] is False
    assert adamw(small_module().to("meta"), lr=1e-3).defaults["fused"] is False


def test_learning_rate_rises_linearly_then_falls_along_a_cosine() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=2.0)
    schedule = warmup_cosine(optimizer, 103, warmup=0.03, floor=0.1)
    rates = []
    for _ in range(110):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    # int(0.03 * 103) = 3 steps rise by 2.0 / 4; from step 3 a cosine over the 100 that are left.
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[53] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[103] == rates[109] == pytest.approx(0.2)


@pytest.mark.parametrize("argument", ["warmup", "floor"])
def test_shares_outside_their_range_are_refused(argument: str) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    with pytest.raises(ValueError, match=f"{argument}=1.5 is not a share"):
        warmup_cosine(optimizer, 10, **{argument: 1.5})
