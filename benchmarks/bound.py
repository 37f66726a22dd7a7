"""The lower bound: the fewest bytes that must leave a node in one optimizer step.

Given the partition size p, the window w and the rung of the memory ladder; docs/benchmarks.md derives it. With M bytes
of parameters and of gradients, nodes of k ranks, N nodes and r replicas:

    p > k:   (p-k)/p (gathered bytes + reduced bytes)  +  2 (r-1)/r k/p M
    p <= k:                                               2 (N-1)/N M

No order of collectives, and no algorithm for them, gets below it, while every byte is sent at full precision.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mics.ladder import Rung
from lightning_mics.topology import Topology

BLOCKS_WHOLE = 3
"""How many blocks may be whole at a time where parameters are gathered again: as many as lightning-mics holds."""


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model's parameters, which are those of its gradients as well.

    Attributes:
        blocks: of each block, in order of execution.
        outside: of what lies outside the blocks.
    """

    blocks: tuple[int, ...]
    outside: int

    @property
    def total(self) -> int:
        """M."""
        return sum(self.blocks) + self.outside


def bytes_leaving_a_node(size: ModelSize, topology: Topology, window: int, rung: Rung) -> float:
    """The fewest bytes that leave each node on average in one optimizer step.

    Args:
        size: of the model.
        topology: nodes, ranks per node and partition size.
        window: micro-steps of the optimizer step.
        rung: what is whole in memory between them; on the lowest, `BLOCKS_WHOLE` at a time.
    """
    k, p = topology.ranks_per_node, topology.partition_size
    if not topology.spans_nodes:
        return _all_reduce(topology.nodes) * size.total
    times = (rung.gathers(window, index, len(size.blocks), BLOCKS_WHOLE) for index in range(len(size.blocks)))
    gathered = sum(a * b for a, b in zip(times, size.blocks, strict=True)) + rung.gathers_outside(window) * size.outside
    reduced = rung.reduce_scatters(window) * size.total
    return (p - k) / p * (gathered + reduced) + _all_reduce(topology.replicas) * k / p * size.total


def _all_reduce(holders: int) -> float:
    """Bytes that each of `holders` sends for each byte that they reduce and share."""
    return 2 * (holders - 1) / holders
