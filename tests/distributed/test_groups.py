"""Process groups on real ranks: those that the topology says, and no hang where ranks disagree."""

from __future__ import annotations

from datetime import timedelta
from unittest.mock import patch

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


Communicators = dict[str, tuple[str, list[int]] | None]


def _communicators(topology: Topology) -> tuple[list[str], dict[str, Communicators | None]]:
    """Names of the engine's own and the default group; for each kind of traffic its groups' names and ranks."""
    groups = Groups.create(topology, "cpu")

    def told(group: dist.ProcessGroup | None) -> tuple[str, list[int]] | None:
        return None if group is None else (group.group_name, dist.get_process_group_ranks(group))

    kinds: dict[str, Communicators | None] = {}
    for kind in ("gather", "hop_1", "hop_2"):
        tiers = getattr(groups, kind)
        names = ("everyone", "intra_node", "inter_node")
        kinds[kind] = None if tiers is None else {name: told(getattr(tiers, name)) for name in names}
    return [groups.partition_group.group_name, dist.group.WORLD.group_name], kinds


@pytest.mark.parametrize(
    "topology", [Topology(4, 2, 1), Topology(4, 2, 2), Topology(4, 2, 4), Topology(4, 4, 2), Topology(4, 1, 4)]
)
def test_each_kind_of_traffic_has_communicators_of_its_own_on_each_tier(topology: Topology) -> None:
    """None waits behind another; one tier that holds all ranks of a group is the group itself."""
    for rank, (others, kinds) in enumerate(run_ranks(4, _communicators, topology)):
        partition = topology.partition_groups[topology.replica_of(rank)]
        replication = topology.replication_groups[topology.shard_of(rank)]
        taken = set(others)
        for kind, group in (("gather", partition), ("hop_1", partition), ("hop_2", replication)):
            communicators, by_node = kinds[kind], topology.by_node(group)
            if len(group) == 1:
                assert communicators is None
                continue
            node = next(ranks for ranks in by_node if rank in ranks)
            place = [ranks[node.index(rank)] for ranks in by_node]
            expected = {"everyone": list(group), "intra_node": list(node), "inter_node": place}
            names = set()
            for tier, ranks in expected.items():
                if len(ranks) == 1:
                    assert communicators[tier] is None
                else:
                    name, found = communicators[tier]
                    assert found == ranks
                    names.add(name)
            assert len(names) == len({tuple(ranks) for ranks in expected.values() if len(ranks) > 1})
            assert not names & taken
            taken |= names


def _timeouts() -> list[timedelta]:
    with patch.object(dist, "new_group", wraps=dist.new_group) as new_group:
        Groups.create(Topology(4, 2, 4), "cpu", timedelta(seconds=321))
    return [call.kwargs["timeout"] for call in new_group.call_args_list]


def test_every_communicator_has_the_timeout_that_is_given() -> None:
    """Of each kind of traffic on all ranks, on this rank's node and at its place in each: of two kinds, as r is 1."""
    assert run_ranks(4, _timeouts) == [[timedelta(seconds=321)] * 6] * 4


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
    messages = run_ranks(4, _refusal, [usual, usual, odd, usual])
    for message in messages:
        assert message.startswith("the ranks do not agree on the topology")
        for (n, k, p), ranks in ((odd, [2]), (usual, [0, 1, 3])):
            assert f"world_size={n}, ranks_per_node={k}, partition_size={p} on ranks {ranks}" in message


def test_a_topology_of_another_world() -> None:
    for message in run_ranks(2, _refusal, [(4, 4, 2), (4, 4, 2)]):
        assert message.startswith("world_size=4 of the topology is not the 2 ranks")
