"""Stages: what one all-gather, reduce-scatter or all-reduce over two tiers asks of `torch.distributed`.

For each form of `Collectives`, the calls that it makes, in its order. Which tiers a message takes is asked of the
form itself. `tests/planner/test_schedule.py` holds the rest against what the forms issue.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import cast

import torch
import torch.distributed as dist

from lightning_mics.collectives import Collectives
from lightning_mics.exchange import Exchange, chunks_of
from lightning_mics.groups import Tiers
from lightning_mics.native import Native
from lightning_mics.network import Network
from lightning_mics.pipelined import Pipelined, stages_of
from lightning_mics.topology import RankGroups

_NO_GROUP = cast(dist.ProcessGroup, None)  # nothing is sent here


class Form(StrEnum):
    """How collectives are made; see `lightning_mics.wire.collectives_for`."""

    EXCHANGE = "exchange"
    """CPU over gloo."""
    NATIVE = "native"
    """An accelerator over gloo."""
    PIPELINED = "pipelined"
    """NCCL, and everything else."""


@dataclass(frozen=True)
class Stage:
    """One call of `torch.distributed`.

    Attributes:
        kind: "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast" or "send".
        ranks: global ranks of its group.
        numel, dtype: of what a collective writes, or of a message.
        to: the global rank that a message goes to.
    """

    kind: str
    ranks: tuple[int, ...]
    numel: int
    dtype: torch.dtype
    to: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what it writes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Collective:
    """One collective of one kind of traffic, and the calls that it is made of.

    Attributes:
        operation: "all_gather", "reduce_scatter", "all_reduce" or "broadcast".
        numel, dtype: of the whole buffer, a slot for each rank.
        nodes: the ranks that it is among, one tuple a node; one tuple in all where it takes no notice of nodes.
        stages: in the order in which they are issued.
    """

    operation: str
    numel: int
    dtype: torch.dtype
    nodes: RankGroups
    stages: tuple[Stage, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.numel * self.dtype.itemsize

    def nodes_joined(self, ranks_per_node: int) -> int:
        """How many nodes it is among, whether it takes notice of them or not."""
        return len({rank // ranks_per_node for node in self.nodes for rank in node})


class Route:
    """Collectives among some ranks, as one of them issues them.

    Args:
        nodes: the ranks, one tuple a node; two at least.
        rank: whose calls these are.
        form: how.
        network: decides between hierarchical and flat.
        between_nodes: see `Collectives`.
    """

    def __init__(
        self, nodes: RankGroups, rank: int, form: Form, network: Network, between_nodes: torch.dtype | None = None
    ) -> None:
        tiers = Tiers(nodes, rank, _NO_GROUP, None, None)
        collectives, self._calls = _FORMS[form]
        self._rounding = collectives(tiers, network, between_nodes)
        self._exact = self._rounding.exact()
        self._size = tiers.size
        self._known: dict[tuple[str, int, torch.dtype, bool], Collective] = {}

    def all_gather(self, slot: int, dtype: torch.dtype, exact: bool = False) -> Collective:
        """Of slots of `slot` elements; nothing is rounded between nodes if `exact`."""
        return self._collective("all_gather", slot * self._size, dtype, exact)

    def reduce_scatter(self, slot: int, dtype: torch.dtype, exact: bool = False) -> Collective:
        """Of slots of `slot` elements. Nothing rounds it; `exact` where that it may be does not decide on its tiers."""
        return self._collective("reduce_scatter", slot * self._size, dtype, exact)

    def all_reduce(self, numel: int, dtype: torch.dtype) -> Collective:
        """Of a buffer of `numel` elements."""
        return self._collective("all_reduce", numel, dtype)

    def _collective(self, operation: str, numel: int, dtype: torch.dtype, exact: bool = False) -> Collective:
        key = operation, numel, dtype, exact
        if key not in self._known:
            form = self._exact if exact else self._rounding
            tiers = form.tiers_for(self._calls.slot_bytes(numel, dtype, self._size))
            crosses = form.crossing_dtype(dtype) if tiers.nodes > 1 and operation != "reduce_scatter" else None
            stages = getattr(self._calls(tiers, dtype, crosses or dtype), operation)(numel)
            self._known[key] = Collective(operation, numel, dtype, tiers.ranks, tuple(stages))
        return self._known[key]


class _NativeCalls:
    """Those of `Native`.

    Args:
        tiers: those taken.
        dtype: of the buffer.
        crosses: the dtype between nodes.
    """

    def __init__(self, tiers: Tiers, dtype: torch.dtype, crosses: torch.dtype) -> None:
        self._nodes, self._per_node = tiers.nodes, tiers.per_node
        self._size, self._node, self._local = tiers.size, tiers.node, tiers.local
        self._dtype, self._crosses, self._rounds = dtype, crosses, crosses != dtype
        self._everyone = tuple(rank for node in tiers.ranks for rank in node)
        self._here = tiers.ranks[tiers.node]
        self._places = tuple(node[tiers.local] for node in tiers.ranks)
        self._flat = tiers.nodes == 1 or tiers.per_node == 1

    @staticmethod
    def slot_bytes(numel: int, dtype: torch.dtype, size: int) -> int:
        """By which it is decided whether a buffer goes over two tiers."""
        return numel * dtype.itemsize // size

    def all_gather(self, numel: int) -> Iterator[Stage]:
        slot = numel // self._size
        if self._nodes == 1 or (self._flat and not self._rounds):
            yield Stage("all_gather", self._everyone, numel, self._dtype)
            return
        yield self._between("all_gather", self._nodes * slot)
        if self._per_node > 1:
            yield from [self._inside("all_gather", self._per_node * slot)] * self._nodes

    def reduce_scatter(self, numel: int) -> Iterator[Stage]:
        slot = numel // self._size
        if self._flat:
            yield Stage("reduce_scatter", self._everyone, slot, self._dtype)
            return
        yield from [self._inside("reduce_scatter", slot)] * self._nodes
        yield self._between("reduce_scatter", slot)

    def all_reduce(self, numel: int) -> Iterator[Stage]:
        if self._flat and not self._rounds:
            yield Stage("all_reduce", self._everyone, numel, self._dtype)
            return
        padded = -(-numel // self._size) * self._size
        part = padded // self._per_node
        if self._per_node > 1:
            yield self._inside("reduce_scatter", part)
        yield from map(self._between, ["all_to_all", "all_gather"] if self._rounds else ["all_reduce"], [part] * 2)
        if self._per_node > 1:
            yield self._inside("all_gather", padded)

    def _inside(self, kind: str, numel: int) -> Stage:
        return Stage(kind, self._here, numel, self._dtype)

    def _between(self, kind: str, numel: int, steps: int | None = None) -> Stage:
        to = None if steps is None else self._places[(self._node + steps) % self._nodes]
        return Stage(kind, self._places, numel, self._crosses, to)


class _PipelinedCalls(_NativeCalls):
    """Those of `Pipelined`: messages between nodes."""

    def all_gather(self, numel: int) -> Iterator[Stage]:
        if self._flat:
            yield from super().all_gather(numel)
            return
        slot = numel // self._size
        yield from [self._between("send", slot, step) for step in range(1, self._nodes)]
        yield from [self._inside("all_gather", self._per_node * slot)] * self._nodes

    def reduce_scatter(self, numel: int) -> Iterator[Stage]:
        if self._flat:
            yield from super().reduce_scatter(numel)
            return
        slot = numel // self._size
        inside = self._inside("reduce_scatter", slot)
        for steps in stages_of(self._nodes):
            yield from [inside] * len(steps)
            yield from [self._between("send", slot, step) for step in steps]
        yield inside


class _ExchangeCalls(_NativeCalls):
    """Those of `Exchange`: nothing but messages, one after the other on each tier."""

    @staticmethod
    def slot_bytes(numel: int, dtype: torch.dtype, size: int) -> int:
        return -(-numel // size) * dtype.itemsize

    def all_gather(self, numel: int) -> Iterator[Stage]:
        steps, peers, chunks = range(1, self._nodes), range(1, self._per_node), self._chunks(numel)
        for chunk in chunks:
            yield from self._message(numel, chunk, [(step, 0, 0, 0) for step in steps])
        yield from self._message(numel, slice(None), [(0, peer, 0, 0) for peer in peers])
        for chunk in chunks:
            yield from self._message(numel, chunk, [(0, peer, -step, 0) for step in steps for peer in peers])

    def reduce_scatter(self, numel: int) -> Iterator[Stage]:
        rounds = [(chunk, step) for chunk in self._chunks(numel) for step in (*range(1, self._nodes), 0)]
        peers = range(1, self._per_node)
        asked = [[*self._message(numel, chunk, [(0, peer, step, peer) for peer in peers])] for chunk, step in rounds]
        yield from asked[0] if asked else []
        for (chunk, step), ahead in zip(rounds, [*asked[1:], []], strict=True):
            yield from ahead
            if step:
                yield from self._message(numel, chunk, [(step, 0, step, 0)])

    def all_reduce(self, numel: int) -> Iterator[Stage]:
        yield from self.reduce_scatter(numel)
        yield from self.all_gather(numel)

    def _chunks(self, numel: int) -> list[slice]:
        return chunks_of(-(-numel // self._size), self._dtype.itemsize, self._nodes)

    def _message(self, numel: int, chunk: slice, routes: list[tuple[int, int, int, int]]) -> Iterator[Stage]:
        """To whom, and whose slot: each as so many nodes, and so many places in a node, ahead."""
        for nodes, places, slot_nodes, slot_places in routes:
            node, local = (self._node + slot_nodes) % self._nodes, (self._local + slot_places) % self._per_node
            slot = len(range(node * self._per_node + local, numel, self._size))
            if travels := len(range(slot)[chunk]):
                if nodes:
                    yield self._between("send", travels, nodes)
                else:
                    to = self._here[(self._local + places) % self._per_node]
                    yield Stage("send", self._here, travels, self._dtype, to)


_FORMS: dict[Form, tuple[type[Collectives], type[_NativeCalls]]] = {
    Form.EXCHANGE: (Exchange, _ExchangeCalls),
    Form.NATIVE: (Native, _NativeCalls),
    Form.PIPELINED: (Pipelined, _PipelinedCalls),
}
