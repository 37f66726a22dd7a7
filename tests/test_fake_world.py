"""512 ranks in one process: the real engine over groups that move nothing, seen from one rank at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_mics.groups import Groups
from lightning_mics.sharding import shard
from lightning_mics.topology import Topology
from tests.distributed.test_wire import assert_wire, gpt, local_numel, window_of_calls

WORLD = 512


@pytest.fixture(params=[0, 261])
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    dist.init_process_group("fake", rank=request.param, world_size=WORLD, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("partition_size", [1, 8, 64, WORLD])
def test_traffic_of_512_ranks(rank: int, partition_size: int) -> None:
    topology = Topology(WORLD, 8, partition_size)
    began = time.process_time()
    groups = Groups.create(topology, "cpu")
    assert time.process_time() - began < 5
    root = shard(gpt(), groups)
    numels = [param.numel() for param in gpt().parameters()]
    assert_wire(window_of_calls(root), topology, rank, numels, local_numel(root))
