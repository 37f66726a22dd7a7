"""Groups: a topology turned into process groups.

One device mesh axis shards, the other replicates. The sharding engine only ever sees the one-dimensional mesh of a
partition group, so that nothing it does can leave the group. Each kind of traffic (gathers, hop 1, hop 2) has
communicators of its own on each tier of the network, so that none waits behind what it does not need.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_mics.cross_memory import CrossMemory
from lightning_mics.topology import Topology


@dataclass(frozen=True)
class Tiers:
    """The communicators of one kind of traffic among some ranks, as one rank sees them.

    Attributes:
        ranks: one tuple a node, all of one length, in the order of the group.
        rank: whose view this is; one of `ranks`.
        everyone: all ranks.
        intra_node: this rank's node; None where it is alone there.
        inter_node: the ranks at this rank's place in every node; None where there is one node.
        cross_memory: by which those of `intra_node` read one another's memory; None where they cannot.
    """

    ranks: tuple[tuple[int, ...], ...]
    rank: int
    everyone: dist.ProcessGroup
    intra_node: dist.ProcessGroup | None
    inter_node: dist.ProcessGroup | None
    cross_memory: CrossMemory | None = None

    @property
    def nodes(self) -> int:
        """N, how many nodes the ranks are on."""
        return len(self.ranks)

    @property
    def per_node(self) -> int:
        """How many ranks are on each node."""
        return len(self.ranks[0])

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.nodes * self.per_node

    @cached_property
    def node(self) -> int:
        """Which of the nodes is this rank's."""
        return next(index for index, ranks in enumerate(self.ranks) if self.rank in ranks)

    @cached_property
    def local(self) -> int:
        """Which of its node's ranks this rank is."""
        return self.ranks[self.node].index(self.rank)

    @property
    def index(self) -> int:
        """Which of all the ranks this rank is."""
        return self.node * self.per_node + self.local

    def flat(self) -> Tiers:
        """The same ranks without the distinction, as though they were on one node."""
        ranks = (tuple(rank for node in self.ranks for rank in node),)
        return replace(self, ranks=ranks, intra_node=self.everyone, inter_node=None, cross_memory=None)


@dataclass(frozen=True)
class Groups:
    """The process groups of one rank.

    Attributes:
        topology: what they were made from.
        partition_mesh: one-dimensional mesh ("shard") of the p ranks that hold this rank's replica.
        gather: for all-gathers in the partition group; None where p is 1.
        hop_1: for reduce-scatters in the partition group; None where p is 1.
        hop_2: for all-reduces among the r ranks that hold this rank's shard; None where r is 1.
        on_host: of the partition group, by gloo, for what its hosts tell one another in a forward; None where p is 1,
            and where nobody sends anything.
    """

    topology: Topology
    partition_mesh: DeviceMesh
    gather: Tiers | None
    hop_1: Tiers | None
    hop_2: Tiers | None
    on_host: dist.ProcessGroup | None = None

    @property
    def device(self) -> torch.device:
        """The device of this rank's tensors."""
        kind = self.partition_mesh.device_type
        return torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())

    @property
    def partition_group(self) -> dist.ProcessGroup:
        """The process group of `partition_mesh`."""
        return self.partition_mesh.get_group()

    @property
    def replication_group(self) -> dist.ProcessGroup | None:
        """The process group of the ranks that hold this rank's shard; None where r is 1."""
        return None if self.hop_2 is None else self.hop_2.everyone

    @cached_property
    def world_mesh(self) -> DeviceMesh:
        """Two-dimensional mesh ("shard", "replica") of all ranks, on the process groups that there are; r > 1."""
        assert self.replication_group is not None
        return DeviceMesh.from_group(
            [self.partition_group, self.replication_group],
            self.partition_mesh.device_type,
            mesh=torch.tensor(self.topology.replication_groups),
            mesh_dim_names=("shard", "replica"),
        )

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
        partition = topology.partition_groups[topology.replica_of(rank)]
        replication = topology.replication_groups[topology.shard_of(rank)]
        whole = len(partition) == topology.world_size
        group: dist.ProcessGroup = dist.group.WORLD if whole else _new_group(partition, timeout)  # type: ignore[assignment]
        mesh = DeviceMesh.from_group(group, device_type, mesh_dim_names=("shard",))
        by_messages = travels_by_messages(torch.device(device_type))
        gather, hop_1, hop_2 = (
            _tiers(topology.by_node(ranks), rank, timeout, by_messages) for ranks in (partition, partition, replication)
        )
        return cls(topology, mesh, gather, hop_1, hop_2, _on_host(hop_1, partition, by_messages, timeout))


def backend_for(device: torch.device, group: dist.ProcessGroup | None = None) -> str:
    """The backend that carries tensors on `device` in `group`, the default group by default.

    A group may have one for each kind of device, as "cpu:gloo,cuda:nccl".
    """
    return backends(group=group).get(device.type) or str(dist.get_backend(group))


def backends(told: str | None = None, group: dist.ProcessGroup | None = None) -> dict[str, str]:
    """The backends of a group, the default group by default, by the kind of device whose tensors they carry.

    Args:
        told: what a group is to be made with, as "cpu:gloo,cuda:nccl"; by default there is one.
        group: that is asked for, if there is one.
    """
    config = dist.get_backend_config(group) if told is None else str(dist.BackendConfig(dist.Backend(told)))
    return dict(pair.split(":") for pair in config.split(","))


def travels_by_messages(device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """Whether tensors on `device` go from rank to rank, rather than by the backend's collectives.

    gloo's sends and receives take memory of the host only; its collectives copy an accelerator's there and back.
    """
    return device.type == "cpu" and backend_for(device, group) == "gloo"


def _tiers(ranks: tuple[tuple[int, ...], ...], rank: int, timeout: timedelta | None, by_messages: bool) -> Tiers | None:
    everyone = tuple(rank for node in ranks for rank in node)
    if len(everyone) == 1:
        return None
    group = _new_group(everyone, timeout)
    tiers = Tiers(ranks, rank, group, None, None)
    if tiers.per_node == 1:
        return replace(tiers, inter_node=group)
    if tiers.nodes == 1:
        tiers = replace(tiers, intra_node=group)
    else:
        same_place = tuple(node[tiers.local] for node in ranks)
        intra, inter = _new_group(ranks[tiers.node], timeout), _new_group(same_place, timeout)
        tiers = replace(tiers, intra_node=intra, inter_node=inter)
    assert tiers.intra_node is not None
    return replace(tiers, cross_memory=CrossMemory.connect(tiers.intra_node, timeout)) if by_messages else tiers


def _on_host(
    hop_1: Tiers | None, partition: tuple[int, ...], by_messages: bool, timeout: timedelta | None
) -> dist.ProcessGroup | None:
    """That of hop 1 where gloo carries it, as there is no hop 1 in a forward."""
    if hop_1 is None or dist.get_backend() == "fake":
        return None
    return hop_1.everyone if by_messages else _new_group(partition, timeout, "gloo")


def _new_group(ranks: tuple[int, ...], timeout: timedelta | None, backend: str | None = None) -> dist.ProcessGroup:
    """The process group of `ranks`, which only they make, so that it takes no longer on a larger cluster."""
    group: dist.ProcessGroup = dist.new_group(
        list(ranks), timeout=timeout, backend=backend, use_local_synchronization=True
    )
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
