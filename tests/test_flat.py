"""Gradients that lie together are one piece of memory; any others are not taken for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_mics.flat import ShardGradient, together

SHAPES, ROOMS = [(2, 3), (4,), (0, 3), (3,)], [6, 6, 3, 3]  # the second and the third leave room


def laid_out(memory: Tensor) -> list[ShardGradient]:
    gradients, offset = [], 0
    for shape, room in zip(SHAPES, ROOMS, strict=True):
        local = memory.as_strided(shape, torch.empty(shape).stride(), offset)
        gradients.append(ShardGradient(local, room))
        offset += room
    return gradients


def test_together_they_are_the_memory_that_they_lie_in() -> None:
    memory = torch.arange(sum(ROOMS), dtype=torch.float32)
    flat = together(laid_out(memory))
    assert flat is not None and flat.data_ptr() == memory.data_ptr() and torch.equal(flat, memory)


def replaced(gradients: list[ShardGradient]) -> list[ShardGradient]:
    return [*gradients[:-1], ShardGradient(gradients[-1].local.clone(), ROOMS[-1])]


def swapped(gradients: list[ShardGradient]) -> list[ShardGradient]:
    return [gradients[1], gradients[0], *gradients[2:]]


def some(gradients: list[ShardGradient]) -> list[ShardGradient]:
    return gradients[:-1]


def transposed(gradients: list[ShardGradient]) -> list[ShardGradient]:
    return [ShardGradient(gradients[0].local.view(3, 2).t(), 6), *gradients[1:]]


def of_another_dtype(gradients: list[ShardGradient]) -> list[ShardGradient]:
    return [*gradients[:-1], ShardGradient(gradients[-1].local.view(torch.int32), ROOMS[-1])]


def none(gradients: list[ShardGradient]) -> list[ShardGradient]:
    return []


@pytest.mark.parametrize("change", [replaced, swapped, some, transposed, of_another_dtype, none])
def test_any_others_are_not(change: Callable[[list[ShardGradient]], list[ShardGradient]]) -> None:
    assert together(change(laid_out(torch.zeros(sum(ROOMS))))) is None


def test_padded_to_their_room() -> None:
    padded = laid_out(torch.arange(18.0))[1].padded()
    assert padded.tolist() == [6, 7, 8, 9, 0, 0]
