"""What stays whole between forwards and backwards, and that nobody who reads parameters meanwhile is misled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics.groups import Groups
from lightning_mics.ladder import RUNGS, Parameters
from lightning_mics.sharding import MiCSModule, shard
from lightning_mics.topology import Topology
from tests.distributed.ranks import run_ranks

LAYERS = 5


class Tied(nn.Module):
    """Five layers, and a weight that is registered in two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(8, 8, bias=False)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(LAYERS))
        self.leave = nn.Linear(8, 8, bias=False)
        self.leave.weight = self.enter.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)


def sharded(**options: Any) -> MiCSModule:
    root = shard(Tied(), Groups.create(Topology(2, 2, 2), "cpu"), **options)
    root.one_backward = True
    return root


def backward(root: MiCSModule, loss: Tensor) -> None:
    with root.window.backward():
        loss.backward()


def whole_layers(root: MiCSModule) -> list[int]:
    """Which layers' parameters are in memory whole, wherever they are registered."""
    root.residency.show_gathered()
    layers = [i for i, layer in enumerate(root.module.layers) if not isinstance(layer[0].weight, DTensor)]
    root.residency.show_shards()
    return layers


def _whole() -> dict[str, list[list[int]]]:
    """After each forward and each backward of a window of two."""
    results = {}
    for rung in RUNGS:
        root = sharded(rung=rung)
        seen = []
        for boundary in (False, True):
            with root.window.hop_1_only() if not boundary else torch.enable_grad():
                loss = root(torch.ones(1, 8)).sum()
                seen.append(whole_layers(root))
                backward(root, loss)
                seen.append(whole_layers(root))
        results[str(rung.parameters)] = seen
    return results


def test_what_is_needed_next_stays() -> None:
    everything = [*range(LAYERS)]
    for results in run_ranks(2, _whole):
        assert results[Parameters.BLOCK] == [[3, 4], [0, 1], [3, 4], []]
        assert results[Parameters.MICRO_STEP] == [everything, [0, 1], everything, []]
        assert results[Parameters.WINDOW] == [everything, everything, everything, []]


def _read(rung: str) -> tuple[bool, bool, float]:
    """Whether all parameters are shards wherever one may look; whether the optimizer finds the same; a gradient."""
    root = sharded(rung=rung)
    theirs = {id(p) for p in root.parameters()}
    shards = same = True

    def look() -> None:
        nonlocal shards, same
        shards &= all(isinstance(p, DTensor) for p in root.parameters())
        same &= {id(p) for p in root.parameters()} == theirs and root.module.leave.weight is root.module.enter.weight

    with root.window.hop_1_only():
        loss = root(torch.ones(1, 8)).sum()
        look()
        backward(root, loss)
        look()
    root.module.zero_grad()  # in the middle of the window, through the module
    loss = root(torch.ones(1, 8)).sum()
    look()
    backward(root, loss)
    look()
    gradient = root.module.layers[0][0].weight.grad.full_tensor()
    alone = Tied()
    alone(torch.ones(1, 8)).sum().backward()
    return shards, same, float((gradient - alone.layers[0][0].weight.grad).abs().max())


@pytest.mark.parametrize("rung", map(str, RUNGS[::2]))
def test_outside_of_a_forward_parameters_are_shards(rung: str) -> None:
    for shards, same, difference in run_ranks(2, _read, rung):
        assert shards and same
        assert difference < 1e-6


def _frozen() -> tuple[bool, bool]:
    """A layer that is frozen between micro-steps, while it is whole."""
    root = sharded(rung="micro_step/sharded")
    with root.window.hop_1_only():
        backward(root, root(torch.ones(1, 8)).sum())
    root.module.zero_grad()
    for param in root.module.layers[0].parameters():
        param.requires_grad_(False)
    backward(root, root(torch.ones(1, 8)).sum())
    first, second = (root.module.layers[i][0].weight.grad for i in (0, 1))
    return first is None, second is not None


def test_a_layer_may_be_frozen_while_it_is_whole() -> None:
    assert run_ranks(2, _frozen) == [(True, True)] * 2


def _saved(rung: str) -> float:
    """Values loaded in the middle of a window are those of the next forward."""
    root = sharded(rung=rung)
    with root.window.hop_1_only():
        backward(root, root(torch.ones(1, 8)).sum())
    state = {name: value.detach() * 2 for name, value in root.module.state_dict().items()}
    root.module.load_state_dict(state)
    alone = Tied()
    with torch.no_grad():
        for param in alone.parameters():
            param.mul_(2)
        return float((root(torch.ones(1, 8)) - alone(torch.ones(1, 8))).abs().max())


@pytest.mark.parametrize("rung", map(str, RUNGS[::2]))
def test_what_is_loaded_while_something_is_whole_counts(rung: str) -> None:
    assert all(difference < 1e-6 for difference in run_ranks(2, _saved, rung))


def _after_an_exception() -> tuple[bool, float]:
    """A backward that fails half way leaves nothing behind in what is whole."""
    root, fails, shards = sharded(), [True], True

    def fail(gradient: Tensor) -> Tensor:
        if fails[0]:
            raise RuntimeError("as meant")
        return gradient

    # Inside the layer, where its own gradients are there, and hop 1 has not begun.
    root.module.layers[3][0].register_forward_pre_hook(lambda module, args: args[0].register_hook(fail) and None)
    for _ in range(2):
        loss = root(torch.ones(1, 8)).sum()
        try:
            backward(root, loss)
        except RuntimeError:
            root.abort()
            root.release()
            shards &= all(isinstance(p, DTensor) for p in root.parameters())
        fails[0] = False
    alone = Tied()
    alone(torch.ones(1, 8)).sum().backward()
    return shards, max(
        float((p.grad.full_tensor() - q.grad).abs().max())
        for p, q in zip(root.module.parameters(), alone.parameters(), strict=True)
    )


def test_an_exception_leaves_no_gradient_in_what_is_whole() -> None:
    for shards, difference in run_ranks(2, _after_an_exception):
        assert shards and difference < 1e-6


def _freed_before_backward() -> tuple[bool, bool]:
    """A state dict between forward and backward frees what is whole; then the backward fails before it began."""
    root = sharded()
    loss = root(torch.ones(1, 8)).sum()
    before = all(isinstance(value, DTensor) for value in root.module.state_dict().values())
    loss.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward(root, loss)
    root.abort()
    root.release()
    return before, all(isinstance(p, DTensor) for p in root.parameters())


def test_what_was_freed_is_not_shown() -> None:
    assert run_ranks(2, _freed_before_backward) == [(True, True)] * 2
