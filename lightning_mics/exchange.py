"""Exchange: collectives by sends and receives. On gloo and CPU, whose own reduce-scatter costs an all-reduce.

Messages go straight into the slots and are added here, chunk by chunk, so that one tier works while the other does.
What a rank can send at once leaves when a collective is begun, in the caller's thread; the rest where it is finished.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import count, zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics.channels import CollectiveError
from lightning_mics.collectives import Collectives
from lightning_mics.groups import Tiers
from lightning_mics.network import Network

_Result = TypeVar("_Result")

CHUNK_BYTES = 1 << 20
"""What one stage hands to the next at most at a time; less where a slot would not make `_CHUNKS` of it."""
_CHUNKS, _LEAST_CHUNK_BYTES = 4, 1 << 16
_TAGS, _LANES = 1 << 24, 2  # of messages: more than can be under way, and all tags fit 31 bits


class Exchange(Collectives):
    """By sends and receives: straight into the slots, added in fp32 or wider, each stage chunk by chunk.

    A chunk that has crossed is passed on in the node while the next crosses, and while this gather's last is passed on,
    the next gather's cross. Beside the buffer it needs a few chunks.
    """

    def __init__(self, tiers: Tiers, network: Network, between_nodes: torch.dtype | None = None) -> None:
        super().__init__(tiers, network, between_nodes)
        self._numbering = _Numbering()

    def seconds(self, slot_bytes: int) -> tuple[float, float]:
        """All messages of a stage leave at once, so that a stage has one latency; stages run behind one another."""
        nodes, k = self._hierarchical.nodes, self._hierarchical.per_node
        intra, inter = self._network.intra, self._network.inter
        crossing = (nodes - 1) * slot_bytes
        passing = min(slot_bytes, _chunk_bytes(slot_bytes)) * (k - 1)
        return inter.seconds(crossing) + intra.seconds(passing), inter.seconds(crossing * k)

    def all_gather(self, buffer: Tensor) -> None:
        self.begin_all_gather(buffer)()

    def begin_all_gather(self, buffer: Tensor) -> Callable[[], None]:
        slots = buffer.view(self._hierarchical.size, -1).unbind()
        tiers, narrow = self.tiers_for(slots[0].nbytes), self.crossing_dtype(buffer.dtype)
        return _Gather(slots, tiers, self._numbering, narrow).finish

    def reduce_scatter(self, buffer: Tensor, out: Tensor | None = None) -> Tensor:
        total = self.begin_reduce_scatter(buffer)()
        return total if out is None else out.copy_(total)

    def begin_reduce_scatter(self, buffer: Tensor) -> Callable[[], Tensor]:
        slots = buffer.view(self._hierarchical.size, -1).unbind()
        return _Reduction(slots, self.tiers_for(slots[0].nbytes), self._numbering, None).finish

    def all_reduce(self, buffer: Tensor) -> None:
        slots = buffer.tensor_split(self._hierarchical.size)
        tiers = self.tiers_for(slots[0].nbytes)
        narrow = self.crossing_dtype(buffer.dtype)
        _Reduction(slots, tiers, self._numbering, narrow).finish()
        if narrow is not None and tiers.nodes > 1:  # as every other node will have it
            slots[tiers.index].copy_(slots[tiers.index].to(narrow))
        _Gather(slots, tiers, self._numbering, narrow).finish()


class _Stages:
    """What a gather and a reduction share: slots, and the ranks with whom they are exchanged on each tier.

    Messages inside the node that leave when this is made, and those that leave later, are numbered apart.
    """

    def __init__(
        self, slots: Sequence[Tensor], tiers: Tiers, numbering: _Numbering, narrow: torch.dtype | None
    ) -> None:
        self._slots = slots
        self._tiers = tiers
        self._own = slots[tiers.index]
        self._between = _Peers(tiers, "inter_node", numbering, narrow=narrow)
        self._first = _Peers(tiers, "intra_node", numbering)
        self._later = _Peers(tiers, "intra_node", numbering, lane=1)

    def _slot(self, nodes: int, ranks: int = 0) -> Tensor:
        """That of the rank so many nodes ahead and, in its node, so many places ahead; behind where negative."""
        tiers = self._tiers
        node, local = (tiers.node + nodes) % tiers.nodes, (tiers.local + ranks) % tiers.per_node
        return self._slots[node * tiers.per_node + local]

    def _finish_all(self) -> None:
        for peers in (self._between, self._first, self._later):
            peers.finish_all()


class _Gather(_Stages):
    """Fills `slots` from the ranks whose they are: chunk by chunk between nodes, and each on inside the node.

    All that is this rank's own is on its way when this is made; `finish` waits, and passes on what came.
    """

    def __init__(
        self, slots: Sequence[Tensor], tiers: Tiers, numbering: _Numbering, narrow: torch.dtype | None
    ) -> None:
        super().__init__(slots, tiers, numbering, narrow)
        chunks = _chunks(slots)
        for chunk in chunks:
            for step in self._between.steps:
                self._between.send(self._own[chunk], step)
        self._arriving = [
            (self._between.receive(self._slot(-step)[chunk], step), step, chunk)
            for chunk in chunks
            for step in self._between.steps
        ]
        for peer in self._first.steps:
            self._first.send(self._own, peer)
            self._first.receive(self._slot(0, -peer), peer)

    def finish(self) -> None:
        """Return when every slot is full."""
        for message, step, chunk in self._arriving:
            self._between.finish(message)
            for peer in self._later.steps:
                self._later.send(self._slot(-step)[chunk], peer)
                self._later.receive(self._slot(-step, -peer)[chunk], peer)
        self._finish_all()


class _Reduction(_Stages):
    """Adds every rank's slots up where they belong: inside the node first, and what is for other nodes goes on.

    This rank's slot holds the sum; the others hold partial sums. What is asked for first is on its way when this is
    made; `finish` waits, adds, and passes on.
    """

    def __init__(
        self, slots: Sequence[Tensor], tiers: Tiers, numbering: _Numbering, narrow: torch.dtype | None
    ) -> None:
        super().__init__(slots, tiers, numbering, narrow)
        steps = (*self._between.steps, 0)  # other nodes' first: they have further to go
        self._rounds = [(chunk, step) for chunk in _chunks(slots) for step in steps]
        self._asked = self._ask(self._first, *self._rounds[0]) if self._rounds else []

    def finish(self) -> Tensor:
        """This rank's slot, when the sum is there."""
        crossing: list[tuple[Tensor, list[_Message]]] = []
        incoming: list[_Message] = []
        asked, self._asked = self._asked, []
        for (chunk, step), following in zip_longest(self._rounds, self._rounds[1:]):
            arriving, asked = asked, self._ask(self._later, *following) if following else []
            mine = self._slot(step)[chunk]
            self._later.add(mine, arriving)
            if step:
                self._between.send(mine, step)
                incoming.append(self._between.receive(torch.empty_like(self._own[chunk]), step))
                continue
            crossing.append((mine, incoming))
            incoming = []
            if len(crossing) > 1:
                self._between.add(*crossing.pop(0))
        for mine, parts in crossing:
            self._between.add(mine, parts)
        self._finish_all()
        return self._own

    def _ask(self, inside: _Peers, chunk: slice, step: int) -> list[_Message]:
        """Send what is for the other ranks of this node to reduce, and receive what is for this one."""
        for peer in inside.steps:
            inside.send(self._slot(step, peer)[chunk], peer)
        return [inside.receive(torch.empty_like(self._slot(step)[chunk]), peer) for peer in inside.steps]


def _chunks(slots: Sequence[Tensor]) -> list[slice]:
    """Slices of the longest slot, the same on every rank. A shorter slot has fewer values in the last."""
    slot = max(slots, key=Tensor.numel)
    numel = max(1, _chunk_bytes(slot.nbytes) // slot.itemsize)
    return [slice(start, start + numel) for start in range(0, slot.numel(), numel)]


def _chunk_bytes(slot_bytes: int) -> int:
    return min(CHUNK_BYTES, max(_LEAST_CHUNK_BYTES, slot_bytes // _CHUNKS))


class _Message:
    """One on its way: the memory that it needs until it is there, and where it is to go then."""

    def __init__(self, work: dist.Work | None, carried: Tensor, target: Tensor) -> None:
        self.work = work
        self.carried = carried
        self.target = target


class _Numbering:
    """Numbers the messages between two ranks, so that each finds its match however they overtake one another."""

    def __init__(self) -> None:
        self._counts: defaultdict[tuple[Any, ...], Iterator[int]] = defaultdict(count)

    def next(self, group: dist.ProcessGroup, lane: int, *route: object) -> int:
        """A tag. Lanes are numbered apart, as they may be used by different threads."""
        return next(self._counts[group, lane, *route]) % _TAGS * _LANES + lane


class _Peers:
    """Messages on one tier, to and from the ranks that are some steps ahead and behind.

    They travel in the dtype `narrow`, where given.
    """

    def __init__(
        self, tiers: Tiers, tier: str, numbering: _Numbering, *, lane: int = 0, narrow: torch.dtype | None = None
    ) -> None:
        self._group: dist.ProcessGroup | None = getattr(tiers, tier)
        self._place, size = (tiers.node, tiers.nodes) if tier == "inter_node" else (tiers.local, tiers.per_node)
        self._size = size if self._group is not None else 1
        self._name = "between nodes" if tier == "inter_node" else "inside the node"
        self._narrow = narrow
        self._numbering = numbering
        self._lane = lane
        self._under_way: set[_Message] = set()
        self.steps = range(1, self._size)

    def send(self, tensor: Tensor, step: int) -> None:
        """To the rank `step` ahead."""
        tag, to = self._tag("to", step), (self._place + step) % self._size
        carried = tensor if self._narrow is None else tensor.to(self._narrow)
        self._begin(lambda: dist.isend(carried, group=self._group, group_dst=to, tag=tag), carried, carried)

    def receive(self, tensor: Tensor, step: int) -> _Message:
        """From the rank `step` behind; it is in `tensor` once the message is finished."""
        tag, source = self._tag("from", step), (self._place - step) % self._size
        carried = tensor if self._narrow is None else torch.empty_like(tensor, dtype=self._narrow)
        return self._begin(lambda: dist.irecv(carried, group=self._group, group_src=source, tag=tag), carried, tensor)

    def _tag(self, direction: str, step: int) -> int:
        assert self._group is not None
        return self._numbering.next(self._group, self._lane, direction, step)

    def add(self, total: Tensor, incoming: Sequence[_Message]) -> None:
        """Add to `total` what is on its way, rounding once."""
        if not incoming:
            return
        wide = total.to(torch.promote_types(total.dtype, torch.float32))  # itself, where it is wide enough
        for message in incoming:
            self.finish(message)
            wide.add_(message.target)
        if wide is not total:
            total.copy_(wide)

    def finish(self, message: _Message) -> None:
        """Wait for one message. gloo's cannot be waited for twice."""
        self._under_way.discard(message)  # and with it the memory that it came in
        if message.work is None:
            return
        self._tried(message.work.wait)
        message.work = None
        if message.target is not message.carried:
            message.target.copy_(message.carried)
            message.carried = message.target

    def finish_all(self) -> None:
        """Wait for all of them."""
        for message in [*self._under_way]:
            self.finish(message)

    def _begin(self, action: Callable[[], dist.Work | None], carried: Tensor, target: Tensor) -> _Message:
        message = _Message(self._tried(action) if carried.numel() else None, carried, target)
        self._under_way.add(message)
        return message

    def _tried(self, action: Callable[[], _Result]) -> _Result:
        try:
            return action()
        except RuntimeError as error:
            assert self._group is not None
            ranks = dist.get_process_group_ranks(self._group)
            raise CollectiveError(f"{self._name}, ranks {ranks}: {error}") from error
