"""What Fabric's strategy says before any process is started, and optimizers whose parameters get successors."""

from __future__ import annotations

from typing import Any

import lightning_fabric
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_mics import MiCSFabricStrategy
from lightning_mics.fabric import LightningFabricMiCSStrategy, register
from lightning_mics.successors import Successors, check_state


def made(strategy: Any = "mics", **options: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=4, strategy=strategy, **options)


def test_the_name_is_known_in_both_trees() -> None:
    register()  # once more
    fabric = made()
    assert type(fabric.strategy) is MiCSFabricStrategy
    assert str(fabric.strategy.topology) == "4 ranks on 1 node of 4: 1 partition group of 4"
    other = lightning_fabric.Fabric(accelerator="cpu", devices=4, num_nodes=2, strategy="mics")
    assert type(other.strategy) is LightningFabricMiCSStrategy
    assert str(other.strategy.topology) == "8 ranks on 2 nodes of 4: 2 partition groups of 4"


def test_an_instance_and_all_precisions_are_taken() -> None:
    for precision in ("32-true", "bf16-mixed", "bf16-true", "64-true"):
        assert made(MiCSFabricStrategy(2), precision=precision).strategy.topology.replicas == 2


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"partition_size": 3}, ValueError, "partition_size=3 does not divide world_size=4; choose one of 1, 2, 4"),
        ({"partition_size": "auto"}, ValueError, 'partition_size="auto" is planned when a Trainer begins a fit.*plan'),
        ({"micro_batch": "auto"}, ValueError, "micro_batch='auto': under Fabric batches are the loop's own"),
        ({"rung": "block/half"}, ValueError, "rung='block/half'"),
        ({"memory_budget": 0}, ValueError, "memory_budget=0 must be"),
        ({"optimizer_state": "node"}, ValueError, "optimizer_state='node' is not understood; choose one of partition"),
        ({"writers": "some"}, ValueError, "writers='some' is not understood; choose one of all, group"),
        ({"verify": "no"}, ValueError, "verify='no' is not understood; choose one of auto, full, off"),
        ({"writers": "group", "optimizer_state": "world"}, ValueError, 'choose writers="all"'),
        ({"compile": "max"}, TypeError, "compile='max' must be True, False or a mapping"),
        ({"param_dtype": "bf16"}, ValueError, "param_dtype='bf16' must be a floating-point torch.dtype"),
        ({"async_save": True}, TypeError, "async_save"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        made(MiCSFabricStrategy(**arguments))


def sharded(module: nn.Linear) -> None:
    """What sharding does to a module, as far as optimizers see it."""
    module.weight, module.bias = nn.Parameter(module.weight.detach()), nn.Parameter(module.bias.detach())


def held(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def test_optimizers_hold_successors_in_their_order_and_with_their_state() -> None:
    module, other = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    groups = [{"params": [module.bias], "lr": 0.1}, {"params": [other, module.weight]}]
    adagrad = torch.optim.Adagrad(groups, lr=0.2, initial_accumulator_value=3)
    lbfgs = torch.optim.LBFGS(module.parameters())
    successors = Successors()
    with successors.sharding(module, [adagrad, lbfgs]):
        assert [len(group["params"]) for group in adagrad.param_groups] == [0, 0]
        sharded(module)
    assert all(a is b for a, b in zip(held(adagrad), [module.bias, other, module.weight], strict=True))
    assert adagrad.param_groups[0]["lr"] == 0.1
    assert set(adagrad.state) == {module.bias, other, module.weight}
    assert torch.equal(adagrad.state[module.weight]["sum"], torch.full((2, 2), 3.0))
    module(torch.ones(1, 2)).sum().backward()
    lbfgs.step(lambda: torch.tensor(1.0))  # knows its parameters by the list itself
    assert not torch.equal(module.bias, torch.zeros(2))


def test_an_optimizer_that_was_not_told_follows_later() -> None:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    successors = Successors()
    with successors.sharding(module):
        before = held(optimizer)
        sharded(module)
    assert all(map(successors.knows, before)) and not successors.knows(module.weight)
    successors.follow(optimizer)
    assert all(a is b for a, b in zip(held(optimizer), module.parameters(), strict=True))


def test_where_sharding_fails_optimizers_hold_what_the_module_has() -> None:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ArithmeticError), Successors().sharding(module, [optimizer]):
        raise ArithmeticError
    assert all(a is b for a, b in zip(held(optimizer), module.parameters(), strict=True))


def test_state_that_nobody_can_shard() -> None:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.state[module.weight]["rows"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"rows of a parameter of shape \(2, 2\) has another shape"):
        check_state(optimizer)
