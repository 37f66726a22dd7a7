"""A block by itself: called as its model calls it, with gradients that add up, on values of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mics._compat import FakeTensorMode
from lightning_mics.planner.block_call import BlockCall
from lightning_mics.planner.fakes import Integers, as_input
from lightning_mics.precision import Precision
from tests.planner.models import gpt2, loss, tokens

CPU = torch.device("cpu")


def test_a_block_is_called_as_its_model_calls_it() -> None:
    module = gpt2(3, 64, 8)
    called = BlockCall.of(module, tokens(2, 8), loss, CPU)
    hidden = called.args[0]
    assert hidden.shape == (2, 8, 64) and hidden.requires_grad and hidden.isfinite().all()
    assert len(called.blocks) == 3, "small ones are as many as the model's, so that none finds itself in a cache"
    assert {type(block) for block in called.blocks} == {type(module.transformer.h[0])}  # type: ignore[union-attr,index]
    for _ in called.blocks:
        called.run()
    once = [param.grad.clone() for param in called.blocks[0].parameters() if param.grad is not None]
    assert once and hidden.grad is None
    called.run()
    twice = [param.grad for param in called.blocks[0].parameters()]
    assert all(torch.allclose(b, 2 * a) for a, b in zip(once, twice, strict=True) if b is not None)
    called.drop_gradients()
    assert all(param.grad is None for block in called.blocks for param in block.parameters())
    assert all(param.grad is None for param in module.parameters())


class Odd(nn.Module):
    """Blocks that are called with what `extra` is; `calls` says whether they are called at all."""

    def __init__(self, extra: Any, calls: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(3))
        self._extra, self._calls = extra, calls

    def forward(self, batch: Tensor) -> Tensor:
        for block in self.blocks if self._calls else ():
            batch = block(batch, self._extra)
        return batch


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, batch: Tensor, extra: Any) -> Tensor:
        out: Tensor = self.inner(batch)
        return out if extra is None else out + 0 * extra[0] if isinstance(extra, Tensor) else out


def _mean(module: nn.Module, batch: Tensor) -> Tensor:
    total: Tensor = module(batch).mean()
    return total


def test_integers_keep_their_values_and_16_bits_travel() -> None:
    places = torch.tensor([7, 3])
    called = BlockCall.of(Odd(places), torch.ones(2, 4), _mean, CPU, Layer, Precision(param_dtype=torch.bfloat16))
    assert called.args[1].tolist() == [7, 3] and called.args[1] is not places
    assert {param.dtype for param in called.blocks[0].parameters()} == {torch.bfloat16}


def test_integers_without_values_are_zeros() -> None:
    """A buffer that is an index, of a module on the meta device: what lies in memory would be out of its bounds."""
    dirt = [torch.full((100,), 7) for _ in range(100)]
    del dirt
    with FakeTensorMode(), Integers():
        found = as_input(torch.empty(100, dtype=torch.long, device="meta"))
    assert torch.equal(found, torch.zeros(100, dtype=torch.long))


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Odd(object()), "called with object cannot be timed by itself"),
        (Odd(None, calls=False), "Layer is a block, and the training step does not call it; give blocks"),
        (nn.Linear(4, 4), "Linear has no blocks of which one could be timed; give blocks"),
    ],
)
def test_what_cannot_be_timed_is_refused(module: nn.Module, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BlockCall.of(module, torch.ones(2, 4), _mean, CPU)
