"""Collectives over two tiers: all-gather, reduce-scatter and all-reduce that send over slow links only what must go.

Where p ranks span N nodes of k, a flat gather sends (p-1)/p of the gathered bytes through each node's door; a
hierarchical one (p-k)/p (MiCS, arXiv 2205.00119, section 3.3): first between nodes, k gathers of N side by side, then
inside each node. Reduce-scatter is the mirror; all-reduce is one after the other.

All work in place on one flat buffer of as many slots as there are ranks, in the order of ranks, so that nothing is
reordered. There are two forms. `Exchange` sends from point to point and adds here: gloo, whose own reduce-scatter costs
an all-reduce. `Native` issues the backend's collectives, stage by stage: NCCL. Beside them stand `flat_all_gather` and
`flat_reduce_scatter`, the same in one line each, for tests to compare with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics._compat import all_gather_single, coalesced, reduce_scatter_single
from lightning_mics.channels import CollectiveError
from lightning_mics.groups import Tiers
from lightning_mics.network import Network

_Result = TypeVar("_Result")

CHUNK_BYTES = 1 << 20
"""What one stage hands to the next at most at a time; less where a slot would not make `_CHUNKS` of it."""
_CHUNKS, _LEAST_CHUNK_BYTES = 4, 1 << 16


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
        return type(self)(self._hierarchical, self._network)

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

    @abstractmethod
    def reduce_scatter(
        self, buffer: Tensor, out: Tensor | None = None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> Tensor:
        """The sum over all ranks of this rank's slot, in `out` where given. Collective on `tiers`.

        Args:
            buffer: one-dimensional floating-point; a multiple of the ranks. It holds nothing of use afterwards.
            out: of the size of a slot.
            op: SUM, or AVG where the backend has it.
        """

    @abstractmethod
    def all_reduce(self, buffer: Tensor) -> None:
        """Replace `buffer`, one-dimensional and of any length, by its sum over all ranks. Collective on `tiers`.

        The result is the same bit for bit on every rank.
        """


def collectives_for(tiers: Tiers, network: Network, between_nodes: torch.dtype | None = None) -> Collectives:
    """The form that suits the backend of `tiers`; see `Collectives`."""
    form = Exchange if dist.get_backend(tiers.everyone) == "gloo" else Native
    return form(tiers, network, between_nodes)


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


# -- from point to point -----------------------------------------------------------------------------------------------


class Exchange(Collectives):
    """By sends and receives: straight into the slots, added in fp32 or wider, each stage chunk by chunk.

    A chunk that has crossed is passed on in the node while the next crosses. Beside the buffer it needs a few chunks.
    """

    def seconds(self, slot_bytes: int) -> tuple[float, float]:
        """All messages of a stage leave at once, so that a stage has one latency; stages run behind one another."""
        nodes, k = self._hierarchical.nodes, self._hierarchical.per_node
        intra, inter = self._network.intra, self._network.inter
        crossing = (nodes - 1) * slot_bytes
        passing = min(slot_bytes, _chunk_bytes(slot_bytes)) * (k - 1)
        return inter.seconds(crossing) + intra.seconds(passing), inter.seconds(crossing * k)

    def all_gather(self, buffer: Tensor) -> None:
        slots = buffer.view(self._hierarchical.size, -1).unbind()
        _gather(slots, self.tiers_for(slots[0].nbytes), self.crossing_dtype(buffer.dtype))

    def reduce_scatter(
        self, buffer: Tensor, out: Tensor | None = None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> Tensor:
        if op != dist.ReduceOp.SUM:
            raise ValueError(f"op={op} cannot be added here; choose ReduceOp.SUM and divide")
        slots = buffer.view(self._hierarchical.size, -1).unbind()
        tiers = self.tiers_for(slots[0].nbytes)
        _reduce(slots, tiers, None)
        total = slots[tiers.index]
        return total if out is None else out.copy_(total)

    def all_reduce(self, buffer: Tensor) -> None:
        slots = buffer.tensor_split(self._hierarchical.size)
        tiers = self.tiers_for(slots[0].nbytes)
        narrow = self.crossing_dtype(buffer.dtype)
        _reduce(slots, tiers, narrow)
        if narrow is not None and tiers.nodes > 1:  # as every other node will have it
            slots[tiers.index].copy_(slots[tiers.index].to(narrow))
        _gather(slots, tiers, narrow)


def _gather(slots: Sequence[Tensor], tiers: Tiers, narrow: torch.dtype | None) -> None:
    """Fill `slots` from the ranks whose they are: chunk by chunk between nodes, and each on inside the node."""
    own = slots[tiers.index]
    here = [slots[node * tiers.per_node + tiers.local] for node in range(tiers.nodes)]
    between, inside = _Peers(tiers, "inter_node", narrow), _Peers(tiers, "intra_node")
    chunks = [*_chunks(max(slots, key=Tensor.numel))]  # as many on every rank, whosever slot is shorter
    arriving = {}
    for chunk in chunks:
        for step in between.steps:
            between.send(own[chunk], step)
    for chunk in chunks:
        for step in between.steps:
            source = (tiers.node - step) % tiers.nodes
            arriving[chunk.start, source] = between.receive(here[source][chunk], step)
    for chunk in chunks:
        for step in (0, *between.steps):
            node = (tiers.node - step) % tiers.nodes
            if step:
                between.finish(arriving[chunk.start, node])
            for peer in inside.steps:
                inside.send(here[node][chunk], peer)
                inside.receive(slots[node * tiers.per_node + (tiers.local - peer) % tiers.per_node][chunk], peer)
    between.finish_all()
    inside.finish_all()


def _reduce(slots: Sequence[Tensor], tiers: Tiers, narrow: torch.dtype | None) -> None:
    """Add every rank's slots up where they belong: inside the node first, and what is for other nodes goes on.

    This rank's slot holds the sum; the others hold partial sums.
    """
    own = slots[tiers.index]
    here = [slots[node * tiers.per_node + tiers.local] for node in range(tiers.nodes)]
    between, inside = _Peers(tiers, "inter_node", narrow), _Peers(tiers, "intra_node")
    rounds = [
        (chunk, step) for chunk in _chunks(max(slots, key=Tensor.numel)) for step in (*between.steps, 0)
    ]  # other nodes' first: they have further to go

    def ask(chunk: slice, step: int) -> list[_Message]:
        node = (tiers.node + step) % tiers.nodes
        for peer in inside.steps:
            inside.send(slots[node * tiers.per_node + (tiers.local + peer) % tiers.per_node][chunk], peer)
        return [inside.receive(torch.empty_like(here[node][chunk]), peer) for peer in inside.steps]

    crossing: list[tuple[Tensor, list[_Message]]] = []
    incoming: list[_Message] = []
    asked = ask(*rounds[0]) if rounds else []
    for number, (chunk, step) in enumerate(rounds):
        arriving, asked = asked, ask(*rounds[number + 1]) if number + 1 < len(rounds) else []
        mine = here[(tiers.node + step) % tiers.nodes][chunk]
        inside.add(mine, arriving)
        if step:
            between.send(mine, step)
            incoming.append(between.receive(torch.empty_like(own[chunk]), step))
            continue
        crossing.append((mine, incoming))
        incoming = []
        if len(crossing) > 1:
            between.add(*crossing.pop(0))
    for mine, parts in crossing:
        between.add(mine, parts)
    between.finish_all()
    inside.finish_all()


def _chunks(slot: Tensor) -> Iterator[slice]:
    """Slices of the longest slot, the same on every rank. A shorter slot has fewer values in the last."""
    numel = max(1, _chunk_bytes(slot.nbytes) // slot.itemsize)
    return (slice(start, start + numel) for start in range(0, slot.numel(), numel))


def _chunk_bytes(slot_bytes: int) -> int:
    return min(CHUNK_BYTES, max(_LEAST_CHUNK_BYTES, slot_bytes // _CHUNKS))


class _Message:
    """One on its way: the memory that it needs until it is there, and where it is to go then."""

    def __init__(self, work: dist.Work | None, carried: Tensor, target: Tensor) -> None:
        self.work = work
        self.carried = carried
        self.target = target


class _Peers:
    """Messages on one tier, to and from the ranks that are some steps ahead and behind.

    Messages between two ranks are numbered, so that each finds its match however they overtake one another. They travel
    in the dtype `narrow`, where given.
    """

    def __init__(self, tiers: Tiers, tier: str, narrow: torch.dtype | None = None) -> None:
        self._group: dist.ProcessGroup | None = getattr(tiers, tier)
        self._place, size = (tiers.node, tiers.nodes) if tier == "inter_node" else (tiers.local, tiers.per_node)
        self._size = size if self._group is not None else 1
        self._name = "between nodes" if tier == "inter_node" else "inside the node"
        self._narrow = narrow
        self._under_way: list[_Message] = []
        self._sent = [count() for _ in range(self._size)]
        self._received = [count() for _ in range(self._size)]
        self.steps = range(1, self._size)

    def send(self, tensor: Tensor, step: int) -> None:
        """To the rank `step` ahead."""
        tag, to = next(self._sent[step]), (self._place + step) % self._size
        carried = tensor if self._narrow is None else tensor.to(self._narrow)
        self._begin(lambda: dist.isend(carried, group=self._group, group_dst=to, tag=tag), carried, carried)

    def receive(self, tensor: Tensor, step: int) -> _Message:
        """From the rank `step` behind; it is in `tensor` once the message is finished."""
        tag, source = next(self._received[step]), (self._place - step) % self._size
        carried = tensor if self._narrow is None else torch.empty_like(tensor, dtype=self._narrow)
        return self._begin(lambda: dist.irecv(carried, group=self._group, group_src=source, tag=tag), carried, tensor)

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
        if message.work is None:
            return
        self._tried(message.work.wait)
        message.work = None
        if message.target is not message.carried:
            message.target.copy_(message.carried)
            message.carried = message.target

    def finish_all(self) -> None:
        """Wait for all of them."""
        for message in self._under_way:
            self.finish(message)
        self._under_way.clear()

    def _begin(self, action: Callable[[], dist.Work | None], carried: Tensor, target: Tensor) -> _Message:
        message = _Message(self._tried(action) if carried.numel() else None, carried, target)
        self._under_way.append(message)
        return message

    def _tried(self, action: Callable[[], _Result]) -> _Result:
        try:
            return action()
        except RuntimeError as error:
            assert self._group is not None
            ranks = dist.get_process_group_ranks(self._group)
            raise CollectiveError(f"{self._name}, ranks {ranks}: {error}") from error


# -- by the backend's own collectives ----------------------------------------------------------------------------------


class Native(Collectives):
    """By the backend's collectives, one after the other on the current stream, those of a stage issued together."""

    def seconds(self, slot_bytes: int) -> tuple[float, float]:
        """Rings: as many latencies as there are steps; a flat ring passes through each node's door once."""
        nodes, k = self._hierarchical.nodes, self._hierarchical.per_node
        intra, inter = self._network.intra, self._network.inter
        hierarchical = (nodes - 1) * inter.seconds(slot_bytes) + (k - 1) * intra.seconds(nodes * slot_bytes)
        return hierarchical, (nodes * k - 1) * inter.seconds(slot_bytes / k)

    def all_gather(self, buffer: Tensor) -> None:
        slots = buffer.view(self._hierarchical.size, -1)
        tiers = self.tiers_for(slots[0].nbytes)
        own = slots[tiers.index]
        narrow = self.crossing_dtype(own.dtype)
        if tiers.inter_node is None or (tiers.intra_node is None and narrow is None):
            all_gather_single(buffer, own, tiers.everyone)
            return
        sent = own.to(narrow or own.dtype)
        crossed = sent.new_empty(tiers.nodes, own.numel())
        all_gather_single(crossed.view(-1), sent, tiers.inter_node)
        here = crossed.to(own.dtype)
        here[tiers.node] = own
        if tiers.intra_node is None:
            buffer.copy_(here.view(-1))
            return
        with coalesced(tiers.intra_node, buffer.device):
            for node, target in enumerate(slots.view(tiers.nodes, -1)):
                all_gather_single(target, here[node], tiers.intra_node)

    def reduce_scatter(
        self, buffer: Tensor, out: Tensor | None = None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> Tensor:
        slots = buffer.view(self._hierarchical.size, -1)
        tiers = self.tiers_for(slots[0].nbytes)
        total = torch.empty_like(slots[0]) if out is None else out
        if tiers.inter_node is None or tiers.intra_node is None:
            reduce_scatter_single(total, buffer, tiers.everyone, op)
            return total
        here = torch.empty_like(slots[: tiers.nodes])
        with coalesced(tiers.intra_node, buffer.device):
            for node, source in enumerate(slots.view(tiers.nodes, -1)):
                reduce_scatter_single(here[node], source, tiers.intra_node, op)
        reduce_scatter_single(total, here.view(-1), tiers.inter_node, op)
        return total

    def all_reduce(self, buffer: Tensor) -> None:
        tiers = self.tiers_for(buffer.nbytes // self._hierarchical.size)
        narrow = self.crossing_dtype(buffer.dtype) if tiers.inter_node is not None else None
        if narrow is None and (tiers.inter_node is None or tiers.intra_node is None):
            dist.all_reduce(buffer, group=tiers.everyone)
            return
        padded = torch.nn.functional.pad(buffer, (0, -buffer.numel() % tiers.size))
        part = padded.chunk(tiers.per_node)[tiers.local].clone()
        if tiers.intra_node is not None:
            reduce_scatter_single(part, padded, tiers.intra_node)
        if narrow is None:
            dist.all_reduce(part, group=tiers.inter_node)
        else:
            _narrow_all_reduce(part, narrow, tiers)
        if tiers.intra_node is not None:
            all_gather_single(padded, part, tiers.intra_node)
        buffer.copy_((padded if tiers.intra_node is not None else part)[: buffer.numel()])


def _narrow_all_reduce(buffer: Tensor, narrow: torch.dtype, tiers: Tiers) -> None:
    """All-reduce between nodes: values travel in `narrow` and are added in the buffer's own dtype."""
    assert tiers.inter_node is not None
    incoming = torch.empty_like(buffer, dtype=narrow)
    dist.all_to_all_single(incoming, buffer.to(narrow), group=tiers.inter_node)
    parts = incoming.view(tiers.nodes, -1).to(buffer.dtype)
    parts[tiers.node] = buffer.view(tiers.nodes, -1)[tiers.node]  # this node's own did not travel
    all_gather_single(incoming, parts.sum(dim=0).to(narrow), tiers.inter_node)
    buffer.copy_(incoming)
