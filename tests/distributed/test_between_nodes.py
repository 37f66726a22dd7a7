"""16 bits between nodes: what is rounded, what is not, what it saves, and that replicas stay equal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_mics.collectives import Collectives
from lightning_mics.exchange import Exchange
from lightning_mics.groups import Groups
from lightning_mics.native import Native
from lightning_mics.network import Network, Tier
from lightning_mics.pipelined import Pipelined
from lightning_mics.precision import Precision
from lightning_mics.sharding import shard
from lightning_mics.topology import Topology
from tests.distributed.counting import collectives
from tests.distributed.ranks import run_ranks
from tests.distributed.test_equality import STEPS, build, train
from tests.distributed.toys import local

NUMEL = 1000
NETWORK = Network(Tier(0.0, 1e9), Tier(0.0, 1e8))


def gathered(form: type[Collectives], topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """What a rank gathered, and what the ranks had."""
    groups = Groups.create(topology, "cpu")
    assert groups.gather is not None
    had = torch.stack([torch.randn(NUMEL, generator=torch.Generator().manual_seed(r)) for r in range(4)])
    buffer = torch.zeros_like(had)
    buffer[dist.get_rank()] = had[dist.get_rank()]
    form(groups.gather, NETWORK, torch.bfloat16).all_gather(buffer.view(-1))
    return buffer.numpy(), had.numpy()


@pytest.mark.parametrize("form", [Exchange, Native, Pipelined])
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_a_gather_is_exact_inside_the_node_and_rounded_once_beyond(
    form: type[Collectives], ranks_per_node: int
) -> None:
    for rank, arrays in enumerate(run_ranks(4, gathered, form, Topology(4, ranks_per_node, 4))):
        buffer, had = map(torch.from_numpy, arrays)
        for source in range(4):
            here = source // ranks_per_node == rank // ranks_per_node
            expected = had[source] if here else had[source].bfloat16().float()
            assert torch.equal(buffer[source], expected)


def reduced(form: type[Collectives]) -> tuple[np.ndarray, np.ndarray]:
    groups = Groups.create(Topology(4, 2, 1), "cpu")
    assert groups.hop_2 is not None
    own = [torch.randn(NUMEL + 3, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    buffer = own[dist.get_rank()].clone()
    form(groups.hop_2, NETWORK, torch.bfloat16).all_reduce(buffer)
    return buffer.numpy(), torch.stack(own).numpy()


@pytest.mark.parametrize("form", [Exchange, Native, Pipelined])
def test_an_all_reduce_adds_in_fp32_and_is_the_same_everywhere(form: type[Collectives]) -> None:
    """One rounding of a node's sum on its way, one of the total: each at most 2**-8 of what it rounds."""
    results = [tuple(map(torch.from_numpy, arrays)) for arrays in run_ranks(4, reduced, form)]
    for buffer, own in results:
        assert torch.equal(buffer, results[0][0])
        node_sums = own.view(2, 2, -1).sum(dim=1)
        exact = own.sum(dim=0)
        bound = 2**-8 * (node_sums.abs().sum(dim=0) + (exact.abs() * (1 + 2**-8) + node_sums.abs().sum(dim=0) * 2**-8))
        assert ((buffer - exact).abs() <= bound + 1e-6).all()
        assert not torch.equal(buffer, exact)


def trained(partition_size: int) -> tuple[list[float], list[float], float, int, int, int, bool]:
    """Losses with and without, bytes between nodes with (counted, by formula) and without, slack, replicas equal."""
    losses, inter_node = [], []
    for narrow in (torch.bfloat16, None):
        groups = Groups.create(Topology(4, 2, partition_size), "cpu")
        root = shard(build("gpt"), groups, precision=Precision(between_nodes=narrow), network=NETWORK)
        root.one_backward = True
        with collectives() as calls:
            losses.append([loss for step, _ in train(root, "gpt", 2, None) for loss in step])
        inter_node.append(root.wire_bytes(2).inter_node)
        if narrow is not None:
            crossing = [call for call in calls if call.kind == "send" and call.to // 2 != dist.get_rank() // 2]  # type: ignore[operator]
            counted = sum(call.nbytes for call in crossing) / STEPS
            # Which parameters were used travels as well, once a window in each direction of an all-reduce.
            usage = 2 * 2 * (1 + len(list(root.parameters())))
            equal = all(_same_on_replicas(local(p), groups) for p in root.parameters())
    return losses[0], losses[1], counted, inter_node[0], inter_node[1], usage, equal


def _same_on_replicas(shard: torch.Tensor, groups: Groups) -> bool:
    if groups.replication_group is None:
        return True
    largest, least = shard.clone(), shard.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=groups.replication_group)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=groups.replication_group)
    return torch.equal(largest, least)


@pytest.mark.parametrize("partition_size", [1, 2, 4])
def test_training_stays_near_and_sends_less(partition_size: int) -> None:
    for narrow, plain, counted, formula, without, usage, equal in run_ranks(4, trained, partition_size):
        assert narrow == pytest.approx(plain, rel=1e-2) and narrow != plain
        assert equal
        assert formula - 64 <= counted <= formula + usage + 64  # pieces of uneven length
        assert formula < (0.9 if partition_size == 4 else 0.7) * without  # hop 1 crosses as it is
