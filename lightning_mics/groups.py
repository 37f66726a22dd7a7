"""Groups: a topology turned into process groups.

One device mesh axis shards, the other replicates. The sharding engine only ever sees the one-dimensional mesh of a
partition group, so that nothing it does can leave the group; hop 2 runs over the replication group, on a communicator
of its own, and is absent where there is one replica.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_mics.topology import Topology


@dataclass(frozen=True)
class Groups:
    """The process groups of one rank.

    Attributes:
        topology: what they were made from.
        partition_mesh: one-dimensional mesh ("shard") of the p ranks that hold this rank's replica.
        replication_group: the r ranks that hold this rank's shard; None where r is 1.
    """

    topology: Topology
    partition_mesh: DeviceMesh
    replication_group: dist.ProcessGroup | None

    @property
    def device(self) -> torch.device:
        """The device of this rank's tensors."""
        kind = self.partition_mesh.device_type
        return torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())

    @property
    def partition_group(self) -> dist.ProcessGroup:
        """The process group of `partition_mesh`."""
        return self.partition_mesh.get_group()

    @classmethod
    def create(cls, topology: Topology, device_type: str, timeout: timedelta | None = None) -> Groups:
        """Make the groups. Collective: every rank of the default process group calls it with the same topology.

        Args:
            topology: checked against all ranks first.
            device_type: "cpu", "cuda", ...; of the tensors that will travel.
            timeout: of each group's collectives; by default torch's.

        Raises:
            ValueError: on every rank, if the ranks do not agree on the topology or on the world size.
        """
        _check_agreement(topology, device_type)
        if dist.get_world_size() != topology.world_size:
            raise ValueError(
                f"world_size={topology.world_size} of the topology is not the {dist.get_world_size()} ranks of the "
                "default process group; make the topology from torch.distributed.get_world_size()"
            )
        rank = dist.get_rank()
        replica, shard = topology.replica_of(rank), topology.shard_of(rank)
        partition = _group_of(topology.partition_groups[replica], timeout)
        mesh = DeviceMesh.from_group(partition, device_type, mesh_dim_names=("shard",))
        if topology.replicas == 1:
            return cls(topology, mesh, None)
        return cls(topology, mesh, _group_of(topology.replication_groups[shard], timeout))


def _group_of(ranks: tuple[int, ...], timeout: timedelta | None) -> dist.ProcessGroup:
    """The process group of `ranks`, which only they make, so that it takes no longer on a larger cluster."""
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD  # type: ignore[return-value]
    group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
    return group


def _check_agreement(topology: Topology, device_type: str) -> None:
    """Every rank learns every rank's numbers, so that all of them raise where one differs and none waits for it."""
    mine = torch.tensor([topology.world_size, topology.ranks_per_node, topology.partition_size], device=device_type)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    if dist.get_backend() == "fake":
        return
    answers: dict[tuple[int, ...], list[int]] = {}
    for rank, numbers in enumerate(everyone):
        answers.setdefault(tuple(numbers.tolist()), []).append(rank)
    if len(answers) > 1:
        told = "; ".join(
            f"world_size={n}, ranks_per_node={k}, partition_size={p} on ranks {ranks}"
            for (n, k, p), ranks in answers.items()
        )
        raise ValueError(
            f"the ranks do not agree on the topology: {told}. Give every rank the same partition_size, and run the "
            "same number of ranks on every node"
        )
