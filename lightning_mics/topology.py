"""Topology: who shards with whom, and who replicates whom.

A cluster of `world_size` ranks on nodes of `ranks_per_node` is split into *partition groups* of `partition_size`
ranks that together hold one replica of the model state, and *replication groups* of the ranks that hold the same
shard (MiCS, arXiv 2205.00119, section 3.2). Pure Python: every rule is checked where the object is made, in
milliseconds for thousands of ranks, before any process group exists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

PartitionSize = int | Literal["node"] | None

RankGroups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Topology:
    """How `world_size` ranks, numbered node by node, hold replicas of `partition_size` shards.

    Args:
        world_size: number of ranks, n.
        ranks_per_node: ranks on each node, k; the same on every node.
        partition_size: ranks that hold one replica, p: a divisor of n that divides k or is a multiple of k, so that
            no group straddles a node boundary unevenly. 1 is pure replication, n is ZeRO-3.

    Raises:
        ValueError: if the numbers do not fit together; the message lists what does.
    """

    world_size: int
    ranks_per_node: int
    partition_size: int

    def __post_init__(self) -> None:
        for name in ("world_size", "ranks_per_node", "partition_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        n, k, p = self.world_size, self.ranks_per_node, self.partition_size
        if n % k:
            raise ValueError(
                f"ranks_per_node={k} does not divide world_size={n}: every node must run the same number of ranks; "
                f"choose one of {_listed(divisors(n))}, or start the same number of ranks on each node"
            )
        allowed = allowed_partition_sizes(n, k)
        if p not in allowed:
            reason = (
                f"does not divide world_size={n}"
                if n % p
                else f"neither divides ranks_per_node={k} nor is a multiple of it"
            )
            raise ValueError(f"partition_size={p} {reason}; choose one of {_listed(allowed)}")

    @classmethod
    def resolve(cls, partition_size: PartitionSize, *, world_size: int, ranks_per_node: int) -> Topology:
        """The topology that a user's `partition_size` names.

        Args:
            partition_size: a number of ranks, `"node"` for one replica a node, or `None` for one replica over all
                ranks.
            world_size: number of ranks, n.
            ranks_per_node: ranks on each node, k.
        """
        cls(world_size=world_size, ranks_per_node=ranks_per_node, partition_size=1)  # the other two numbers first
        if partition_size is None:
            size = world_size
        elif partition_size == "node":
            size = ranks_per_node
        elif isinstance(partition_size, int) and not isinstance(partition_size, bool) and partition_size > 0:
            size = partition_size
        else:
            allowed = _listed(allowed_partition_sizes(world_size, ranks_per_node))
            raise ValueError(
                f"partition_size={partition_size!r} is not understood; of world_size={world_size} ranks with "
                f"ranks_per_node={ranks_per_node}, give one of {allowed}, "
                '"node" for one replica a node, or None for one replica over all ranks'
            )
        return cls(world_size=world_size, ranks_per_node=ranks_per_node, partition_size=size)

    @property
    def replicas(self) -> int:
        """r = n / p, how many ranks hold the same shard."""
        return self.world_size // self.partition_size

    @property
    def nodes(self) -> int:
        """n / k, how many nodes there are."""
        return self.world_size // self.ranks_per_node

    @property
    def spans_nodes(self) -> bool:
        """Whether a partition group reaches over more than one node (p > k)."""
        return self.partition_size > self.ranks_per_node

    @property
    def partition_groups(self) -> RankGroups:
        """r groups of p consecutive ranks; each holds one replica."""
        n, p = self.world_size, self.partition_size
        return tuple(tuple(range(start, start + p)) for start in range(0, n, p))

    @property
    def replication_groups(self) -> RankGroups:
        """p groups of r ranks; each holds r copies of one shard."""
        n, p = self.world_size, self.partition_size
        return tuple(tuple(range(shard, n, p)) for shard in range(p))

    def by_node(self, group: Sequence[int]) -> RankGroups:
        """The ranks of a partition or replication group, one tuple a node; all of one length.

        Those at one place of each tuple share a local rank, and form the groups that talk between nodes.
        """
        on_node: dict[int, list[int]] = {}
        for rank in group:
            on_node.setdefault(self._checked(rank) // self.ranks_per_node, []).append(rank)
        return tuple(tuple(ranks) for ranks in on_node.values())

    def shard_of(self, rank: int) -> int:
        """Which of the p shards `rank` holds."""
        return self._checked(rank) % self.partition_size

    def replica_of(self, rank: int) -> int:
        """Which of the r replicas `rank` belongs to."""
        return self._checked(rank) // self.partition_size

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank={rank} is not in world_size={self.world_size}; ranks are 0..{self.world_size - 1}")
        return rank

    def __str__(self) -> str:
        groups = f"{self.replicas} partition group{_s(self.replicas)} of {self.partition_size}"
        nodes = f"{self.nodes} node{_s(self.nodes)} of {self.ranks_per_node}"
        return f"{self.world_size} rank{_s(self.world_size)} on {nodes}: {groups}"


def divisors(number: int) -> tuple[int, ...]:
    """All positive divisors of `number`, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(small + [number // d for d in reversed(small) if d * d != number])


def allowed_partition_sizes(world_size: int, ranks_per_node: int) -> tuple[int, ...]:
    """The divisors of `world_size` that divide `ranks_per_node` or are a multiple of it, ascending."""
    k = ranks_per_node
    return tuple(p for p in divisors(world_size) if k % p == 0 or p % k == 0)


def equal_node_sizes(sizes: Sequence[int]) -> int:
    """The ranks per node of a cluster whose nodes run `sizes` ranks.

    Raises:
        ValueError: if the nodes differ.
    """
    if len(set(sizes)) != 1:
        raise ValueError(
            f"nodes of unequal size: ranks per node {list(sizes)}; partition groups need the same number of ranks on "
            f"every node. Start {min(sizes)} on each, or leave the odd node out"
        )
    return sizes[0]


def ranks_per_node_from_environment(environ: Mapping[str, str]) -> int | None:
    """Ranks on each node as the launcher tells it, or None where no launcher does.

    Read from torchrun (`LOCAL_WORLD_SIZE`, checked against `GROUP_WORLD_SIZE` nodes) and SLURM
    (`SLURM_TASKS_PER_NODE`, or `SLURM_STEP_TASKS_PER_NODE` inside a step; its form is "4(x2),3"). Every rank sees the
    same variables but `LOCAL_WORLD_SIZE`, so that an unequal cluster fails on all of them.

    Raises:
        ValueError: if the nodes do not run the same number of ranks.
    """
    if "TORCHELASTIC_RUN_ID" in environ and "LOCAL_WORLD_SIZE" in environ:
        return _from_torchrun(environ)
    if "SLURM_PROCID" not in environ:
        return None
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    return equal_node_sizes(_slurm_counts(tasks)) if tasks else None


def _from_torchrun(environ: Mapping[str, str]) -> int:
    local = int(environ["LOCAL_WORLD_SIZE"])
    world = int(environ.get("WORLD_SIZE", local))
    nodes = int(environ.get("GROUP_WORLD_SIZE", max(1, world // local)))
    if local * nodes != world:
        raise ValueError(
            f"nodes of unequal size: this one runs {local} of world_size={world} ranks on {nodes} nodes; partition "
            "groups need the same number on every node. Give every torchrun the same --nproc-per-node"
        )
    return local


def _slurm_counts(text: str) -> list[int]:
    """SLURM's compressed list, "4(x2),3" -> [4, 4, 3]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"SLURM_TASKS_PER_NODE={text!r} is not of the form '4(x2),3'; give ranks_per_node instead")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _s(count: int) -> str:
    return "s" * (count > 1)
