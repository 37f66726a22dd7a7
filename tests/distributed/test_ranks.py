"""The harness itself: results in order, failures told, collectives seen."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.distributed.counting import collectives
from tests.distributed.ranks import run_ranks


def _sum() -> tuple[int, float, list[str]]:
    value = torch.tensor([float(dist.get_rank())])
    with collectives() as calls:
        dist.all_reduce(value)
    return dist.get_rank(), value.item(), [call.kind for call in calls]


def _fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("as meant")


def test_results_come_in_rank_order_and_collectives_are_seen() -> None:
    assert run_ranks(3, _sum) == [(rank, 3.0, ["all_reduce"]) for rank in range(3)]


def test_a_failure_is_told_with_its_rank() -> None:
    with pytest.raises(AssertionError, match=r"rank 1:[\s\S]*as meant"):
        run_ranks(2, _fail_on_one)
