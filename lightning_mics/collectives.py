"""Collectives over two tiers: all-gather, reduce-scatter and all-reduce that send over slow links only what must go.

Where p ranks span N nodes of k, a flat gather sends (p-1)/p of the gathered bytes through each node's door; a
hierarchical one (p-k)/p (MiCS, arXiv 2205.00119, section 3.3): first between nodes, k gathers of N side by side, then
inside each node. Reduce-scatter is the mirror; all-reduce is one after the other.

All work in place on one flat buffer of as many slots as there are ranks, in the order of ranks, so that nothing is
reordered. There are three forms: `Exchange`, `Native` and `Pipelined`. Beside them stand `flat_all_gather` and
`flat_reduce_scatter`, the same in one line each, for tests to compare with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics.groups import Tiers
from lightning_mics.network import Network


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends on each tier."""

    intra_node: float
    inter_node: float

    @property
    def total(self) -> float:
        """On both."""
        return self.intra_node + self.inter_node

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.intra_node + other.intra_node, self.inter_node + other.inter_node)

    def __mul__(self, times: int) -> Sent:
        return Sent(self.intra_node * times, self.inter_node * times)


class Collectives(ABC):
    """All-gather, reduce-scatter and all-reduce among the ranks of `tiers`, hierarchical where that is faster.

    Args:
        tiers: the ranks and their communicators.
        network: tells for each size which way is faster; every rank needs the same.
        between_nodes: gathers and all-reduces cross between nodes in this dtype where the buffer's is wider. What was
            gathered from other nodes is rounded to it, and so is what was all-reduced; sums are not.
    """

    def __init__(self, tiers: Tiers, network: Network, between_nodes: torch.dtype | None = None) -> None:
        self._hierarchical = tiers
        self._flat = tiers.flat()
        self._network = network
        self._between_nodes = between_nodes

    def exact(self) -> Collectives:
        """The same, with nothing rounded between nodes."""
        exact = copy(self)  # messages are numbered together
        exact._between_nodes = None
        return exact

    def tiers_for(self, slot_bytes: int) -> Tiers:
        """Both tiers, or all ranks as one where that takes less time for slots of `slot_bytes` bytes."""
        tiers = self._hierarchical
        if tiers.nodes == 1 or tiers.per_node == 1:
            return tiers
        hierarchical, flat = self.seconds(slot_bytes)
        return tiers if hierarchical <= flat or self._between_nodes is not None else self._flat

    @abstractmethod
    def seconds(self, slot_bytes: int) -> tuple[float, float]:
        """How long a gather takes by the network's two lines: hierarchical, flat."""

    def crossing_dtype(self, own: torch.dtype) -> torch.dtype | None:
        """The dtype in which values of dtype `own` cross between nodes, where that is another."""
        narrow = self._between_nodes
        return narrow if narrow is not None and own.is_floating_point and narrow.itemsize < own.itemsize else None

    def sent(self, slot_numel: float, dtype: torch.dtype, *, narrow: bool = False) -> Sent:
        """What each rank sends when slots of so many elements are gathered, or reduced and scattered.

        Args:
            slot_numel: elements of one slot.
            dtype: of the buffer.
            narrow: whether `between_nodes` applies, as to gathers and to both halves of an all-reduce.
        """
        nodes, k = self._hierarchical.nodes, self._hierarchical.per_node
        slot = slot_numel * dtype.itemsize
        if self.tiers_for(int(slot)) is not self._hierarchical:
            return Sent((k - 1) * slot, (nodes - 1) * k * slot)
        crossing = slot_numel * ((self.crossing_dtype(dtype) if narrow else None) or dtype).itemsize
        return Sent(nodes * (k - 1) * slot, (nodes - 1) * crossing)

    @abstractmethod
    def all_gather(self, buffer: Tensor) -> None:
        """Fill every slot with that rank's. Collective on `tiers`.

        Args:
            buffer: one-dimensional, of any dtype, with this rank's values in its own slot; a multiple of the ranks.
        """

    def begin_all_gather(self, buffer: Tensor) -> Callable[[], None]:
        """Send at once what can be sent at once; the gather is done when what this returns has run.

        Gathers are finished in the order in which they were begun, the same on every rank.
        """
        return partial(self.all_gather, buffer)

    @abstractmethod
    def reduce_scatter(self, buffer: Tensor) -> Tensor:
        """The sum over all ranks of this rank's slot. Collective on `tiers`.

        Args:
            buffer: one-dimensional floating-point; a multiple of the ranks. It holds nothing of use afterwards.
        """

    def begin_reduce_scatter(self, buffer: Tensor) -> Callable[[], Tensor]:
        """Send at once what can be sent at once; what this returns gives the sum, as `reduce_scatter` does.

        Those that were begun are finished in that order, the same on every rank.
        """
        return partial(self.reduce_scatter, buffer)

    @abstractmethod
    def all_reduce(self, buffer: Tensor) -> None:
        """Replace `buffer`, one-dimensional and of any length, by its sum over all ranks. Collective on `tiers`.

        The result is the same bit for bit on every rank.
        """

    def begin_all_reduce(self, buffer: Tensor) -> Callable[[], None]:
        """Send at once what can be sent at once; the all-reduce is done when what this returns has run.

        Those that were begun are finished in that order, the same on every rank.
        """
        return partial(self.all_reduce, buffer)


# -- the readable twins ------------------------------------------------------------------------------------------------


def flat_all_gather(buffer: Tensor, tiers: Tiers) -> None:
    """`Collectives.all_gather` in one collective."""
    own = buffer.view(tiers.size, -1)[tiers.index]
    dist.all_gather(list(buffer.view(tiers.size, -1).unbind()), own.clone(), group=tiers.everyone)


def flat_reduce_scatter(buffer: Tensor, tiers: Tiers) -> Tensor:
    """`Collectives.reduce_scatter`: every rank's whole buffer, added in the order of ranks; one slot is kept."""
    everything = [torch.empty_like(buffer) for _ in range(tiers.size)]
    dist.all_gather(everything, buffer, group=tiers.everyone)
    wide = torch.promote_types(buffer.dtype, torch.float32)
    total = torch.stack([each.to(wide) for each in everything]).sum(dim=0)
    return total.view(tiers.size, -1)[tiers.index].to(buffer.dtype)
