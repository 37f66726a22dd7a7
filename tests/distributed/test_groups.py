"""Process groups on real ranks: those that the topology says, and no hang where ranks disagree."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lightning_mics.groups import Groups
from lightning_mics.topology import Topology
from tests.distributed.ranks import run_ranks


def _ranks_and_sums(topology: Topology) -> tuple[list[int], list[int] | None, float]:
    groups = Groups.create(topology, "cpu")
    value = torch.tensor([2.0 ** dist.get_rank()])
    dist.all_reduce(value, group=groups.partition_group)
    replication = groups.replication_group
    return (
        dist.get_process_group_ranks(groups.partition_group),
        dist.get_process_group_ranks(replication) if replication else None,
        value.item(),
    )


@pytest.mark.parametrize("topology", [Topology(4, 2, 2), Topology(4, 4, 4), Topology(4, 4, 1), Topology(6, 6, 3)])
def test_groups_are_those_of_the_topology(topology: Topology) -> None:
    for rank, (partition, replication, total) in enumerate(run_ranks(topology.world_size, _ranks_and_sums, topology)):
        assert tuple(partition) == topology.partition_groups[topology.replica_of(rank)]
        expected = topology.replication_groups[topology.shard_of(rank)]
        assert replication == (list(expected) if topology.replicas > 1 else None)
        assert total == sum(2.0**r for r in partition)


def _refusal(given: list[tuple[int, int, int]]) -> str:
    message = "none"
    try:
        Groups.create(Topology(*given[dist.get_rank()]), "cpu")
    except ValueError as error:
        message = str(error)
    dist.barrier()  # nobody was left waiting
    return message


@pytest.mark.parametrize(
    ("odd", "usual"),
    [((4, 4, 4), (4, 4, 2)), ((4, 2, 2), (4, 4, 2)), ((8, 4, 2), (4, 4, 2))],
    ids=["partition_size", "ranks_per_node", "world_size"],
)
def test_ranks_that_disagree_are_told_on_every_rank(odd: tuple[int, int, int], usual: tuple[int, int, int]) -> None:
    messages = run_ranks(4, _refusal, [usual, usual, odd, usual], timeout=40)
    for message in messages:
        assert message.startswith("the ranks do not agree on the topology")
        for (n, k, p), ranks in ((odd, [2]), (usual, [0, 1, 3])):
            assert f"world_size={n}, ranks_per_node={k}, partition_size={p} on ranks {ranks}" in message


def test_a_topology_of_another_world() -> None:
    for message in run_ranks(2, _refusal, [(4, 4, 2), (4, 4, 2)], timeout=40):
        assert message.startswith("world_size=4 of the topology is not the 2 ranks")
