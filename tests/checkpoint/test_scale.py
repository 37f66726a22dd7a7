"""What 64 ranks would write of a model with billions of parameters: every row once, and little said about it."""

from __future__ import annotations

import pytest

from benchmarks.checkpoint_scale import measure

WORLD = 64


@pytest.mark.parametrize(("partition_size", "world_state"), [(8, False), (8, True), (WORLD, False)])
def test_planning(partition_size: int, world_state: bool) -> None:
    """`measure` makes the index, which refuses what is not whole."""
    scale = measure(WORLD, partition_size, 1, world_state=world_state)
    tensors, replicas = 4 * 26, WORLD // partition_size  # a parameter, two states of its shape, and a step
    sharded_over_all = tensors if partition_size == WORLD else 2 * 26 if world_state else 0
    cuts = 2 * partition_size * replicas  # two lines for each place in a group: of the model, and of the optimizer
    assert scale.pieces <= partition_size * tensors + cuts + WORLD * sharded_over_all
    assert scale.arrives / WORLD < 10_000 + 400 * scale.pieces / WORLD  # the random state, and a record of a piece
