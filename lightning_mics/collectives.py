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
from itertools import count
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics._compat import coalesced
from lightning_mics.channels import CollectiveError
from lightning_mics.groups import Tiers
from lightning_mics.network import Network

_Result = TypeVar("_Result")

CHUNK_BYTES = 1 << 20
"""What one stage hands to the next at a time: while a chunk crosses, the one before is passed on inside the node."""


class Collectives(ABC):
    """All-gather, reduce-scatter and all-reduce among the ranks of `tiers`, hierarchical where that is faster.

    Args:
        tiers: the ranks and their communicators.
        network: tells for each size which way is faster; every rank needs the same.
    """

    def __init__(self, tiers: Tiers, network: Network) -> None:
        self._hierarchical = tiers
        self._flat = tiers.flat()
        self._network = network

    def tiers_for(self, slot_bytes: int) -> Tiers:
        """Both tiers, or all ranks as one where that takes less time for slots of `slot_bytes` bytes."""
        tiers = self._hierarchical
        if tiers.nodes == 1 or tiers.per_node == 1:
            return tiers
        hierarchical, flat = self.seconds(slot_bytes)
        return tiers if hierarchical <= flat else self._flat

    @abstractmethod
    def seconds(self, slot_bytes: int) -> tuple[float, float]:
        """How long a gather takes by the network's two lines: hierarchical, flat."""

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


def collectives_for(tiers: Tiers, network: Network) -> Collectives:
    """The form that suits the backend of `tiers`."""
    exchanges = dist.get_backend(tiers.everyone) == "gloo"
    return Exchange(tiers, network) if exchanges else Native(tiers, network)


# -- the readable twins ------------------------------------------------------------------------------------------------


def flat_all_gather(buffer: Tensor, tiers: Tiers) -> None:
    """`Collectives.all_gather` in one collective."""
    own = buffer.view(tiers.size, -1)[_index(tiers)]
    dist.all_gather(list(buffer.view(tiers.size, -1).unbind()), own.clone(), group=tiers.everyone)


def flat_reduce_scatter(buffer: Tensor, tiers: Tiers) -> Tensor:
    """`Collectives.reduce_scatter`: every rank's whole buffer, added in the order of ranks; one slot is kept."""
    everything = [torch.empty_like(buffer) for _ in range(tiers.size)]
    dist.all_gather(everything, buffer, group=tiers.everyone)
    wide = torch.promote_types(buffer.dtype, torch.float32)
    total = torch.stack([each.to(wide) for each in everything]).sum(dim=0)
    return total.view(tiers.size, -1)[_index(tiers)].to(buffer.dtype)


def _index(tiers: Tiers) -> int:
    return tiers.node * tiers.per_node + tiers.local


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
        passing = min(slot_bytes, CHUNK_BYTES) * (k - 1)
        return inter.seconds(crossing) + intra.seconds(passing), inter.seconds(crossing * k)

    def all_gather(self, buffer: Tensor) -> None:
        slots = buffer.view(self._hierarchical.size, -1).unbind()
        _gather(slots, self.tiers_for(slots[0].numel() * buffer.itemsize))

    def reduce_scatter(
        self, buffer: Tensor, out: Tensor | None = None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> Tensor:
        if op != dist.ReduceOp.SUM:
            raise ValueError(f"op={op} cannot be added here; choose ReduceOp.SUM and divide")
        slots = buffer.view(self._hierarchical.size, -1).unbind()
        tiers = self.tiers_for(slots[0].numel() * buffer.itemsize)
        _reduce(slots, tiers)
        total = slots[_index(tiers)]
        return total if out is None else out.copy_(total)

    def all_reduce(self, buffer: Tensor) -> None:
        slots = buffer.tensor_split(self._hierarchical.size)
        tiers = self.tiers_for(slots[0].numel() * buffer.itemsize)
        _reduce(slots, tiers)
        _gather(slots, tiers)


def _gather(slots: Sequence[Tensor], tiers: Tiers) -> None:
    """Fill `slots` from the ranks whose they are: chunk by chunk between nodes, and each on inside the node."""
    own = slots[_index(tiers)]
    here = [slots[node * tiers.per_node + tiers.local] for node in range(tiers.nodes)]
    between, inside = _Peers(tiers, "inter_node"), _Peers(tiers, "intra_node")
    arriving = {}
    for chunk in _chunks(own):
        for step in between.steps:
            between.send(own[chunk], step)
    for chunk in _chunks(max(here, key=Tensor.numel)):
        for step in between.steps:
            source = (tiers.node - step) % tiers.nodes
            arriving[chunk.start, source] = between.receive(here[source][chunk], step)
    for chunk in _chunks(max(here, key=Tensor.numel)):
        for step in (0, *between.steps):
            node = (tiers.node - step) % tiers.nodes
            if step:
                between.finish(arriving[chunk.start, node])
            for peer in inside.steps:
                inside.send(here[node][chunk], peer)
                inside.receive(slots[node * tiers.per_node + (tiers.local - peer) % tiers.per_node][chunk], peer)
    between.finish_all()
    inside.finish_all()


def _reduce(slots: Sequence[Tensor], tiers: Tiers) -> None:
    """Add every rank's slots up where they belong: inside the node first, and what is for other nodes goes on.

    This rank's slot holds the sum; the others hold partial sums.
    """
    here = [slots[node * tiers.per_node + tiers.local] for node in range(tiers.nodes)]
    between, inside = _Peers(tiers, "inter_node"), _Peers(tiers, "intra_node")
    rounds = [
        (chunk, step) for chunk in _chunks(max(slots, key=Tensor.numel)) for step in (*between.steps, 0)
    ]  # other nodes' first: they have further to go

    def ask(chunk: slice, step: int) -> list[tuple[Tensor, dist.Work | None]]:
        node = (tiers.node + step) % tiers.nodes
        for peer in inside.steps:
            inside.send(slots[node * tiers.per_node + (tiers.local + peer) % tiers.per_node][chunk], peer)
        parts = [torch.empty_like(here[node][chunk]) for _ in inside.steps]
        return [(part, inside.receive(part, peer)) for part, peer in zip(parts, inside.steps, strict=True)]

    crossing: list[tuple[Tensor, list[tuple[Tensor, dist.Work | None]]]] = []
    asked = ask(*rounds[0]) if rounds else []
    for number, (chunk, step) in enumerate(rounds):
        arriving, asked = asked, ask(*rounds[number + 1]) if number + 1 < len(rounds) else []
        mine = here[(tiers.node + step) % tiers.nodes][chunk]
        inside.add(mine, arriving)
        if step:
            between.send(mine, step)
            continue
        parts = [torch.empty_like(mine) for _ in between.steps]
        works = [between.receive(part, peer) for part, peer in zip(parts, between.steps, strict=True)]
        crossing.append((mine, list(zip(parts, works, strict=True))))
        if len(crossing) > 1:
            between.add(*crossing.pop(0))
    for mine, incoming in crossing:
        between.add(mine, incoming)
    between.finish_all()
    inside.finish_all()


def _chunks(slot: Tensor) -> Iterator[slice]:
    """Slices of at most `CHUNK_BYTES`; the same on every rank. A shorter slot has fewer values in the last."""
    numel = max(1, CHUNK_BYTES // slot.itemsize)
    return (slice(start, start + numel) for start in range(0, slot.numel(), numel))


class _Peers:
    """Messages on one tier, to and from the ranks that are some steps ahead and behind.

    Messages between two ranks are numbered, so that each finds its match however they overtake one another.
    """

    def __init__(self, tiers: Tiers, tier: str) -> None:
        self._group: dist.ProcessGroup | None = getattr(tiers, tier)
        self._place, size = (tiers.node, tiers.nodes) if tier == "inter_node" else (tiers.local, tiers.per_node)
        self._size = size if self._group is not None else 1
        self._name = "between nodes" if tier == "inter_node" else "inside the node"
        self._under_way: dict[int, dist.Work] = {}  # gloo's cannot be waited for twice
        self._sent = [count() for _ in range(self._size)]
        self._received = [count() for _ in range(self._size)]
        self.steps = range(1, self._size)

    def send(self, tensor: Tensor, step: int) -> None:
        """To the rank `step` ahead."""
        tag = next(self._sent[step])
        if tensor.numel():
            to = (self._place + step) % self._size
            self._begin(lambda: dist.isend(tensor, group=self._group, group_dst=to, tag=tag))

    def receive(self, tensor: Tensor, step: int) -> dist.Work | None:
        """From the rank `step` behind."""
        tag = next(self._received[step])
        if not tensor.numel():
            return None
        source = (self._place - step) % self._size
        return self._begin(lambda: dist.irecv(tensor, group=self._group, group_src=source, tag=tag))

    def add(self, total: Tensor, incoming: Sequence[tuple[Tensor, dist.Work | None]]) -> None:
        """Add to `total` what is on its way, rounding once."""
        if not incoming:
            return
        wide = total.to(torch.promote_types(total.dtype, torch.float32))  # itself, where it is wide enough
        for part, work in incoming:
            self.finish(work)
            wide.add_(part)
        if wide is not total:
            total.copy_(wide)

    def finish(self, work: dist.Work | None) -> None:
        """Wait for one message."""
        if work is not None and self._under_way.pop(id(work), None) is not None:
            self._tried(work.wait)

    def finish_all(self) -> None:
        """Wait for all of them."""
        for work in list(self._under_way.values()):
            self.finish(work)

    def _begin(self, action: Callable[[], dist.Work | None]) -> dist.Work | None:
        work = self._tried(action)
        if work is not None:
            self._under_way[id(work)] = work
        return work

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
        own = slots[_index(tiers)]
        if tiers.inter_node is None or tiers.intra_node is None:
            dist.all_gather_into_tensor(buffer, own, group=tiers.everyone)
            return
        here = torch.empty_like(slots[: tiers.nodes])
        dist.all_gather_into_tensor(here.view(-1), own, group=tiers.inter_node)
        with coalesced(tiers.intra_node, buffer.device):
            for node, target in enumerate(slots.view(tiers.nodes, -1)):
                dist.all_gather_into_tensor(target, here[node], group=tiers.intra_node)

    def reduce_scatter(
        self, buffer: Tensor, out: Tensor | None = None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> Tensor:
        slots = buffer.view(self._hierarchical.size, -1)
        tiers = self.tiers_for(slots[0].nbytes)
        total = torch.empty_like(slots[0]) if out is None else out
        if tiers.inter_node is None or tiers.intra_node is None:
            dist.reduce_scatter_tensor(total, buffer, op=op, group=tiers.everyone)
            return total
        here = torch.empty_like(slots[: tiers.nodes])
        with coalesced(tiers.intra_node, buffer.device):
            for node, source in enumerate(slots.view(tiers.nodes, -1)):
                dist.reduce_scatter_tensor(here[node], source, op=op, group=tiers.intra_node)
        dist.reduce_scatter_tensor(total, here.view(-1), op=op, group=tiers.inter_node)
        return total

    def all_reduce(self, buffer: Tensor) -> None:
        tiers = self.tiers_for(buffer.nbytes // self._hierarchical.size)
        if tiers.inter_node is None or tiers.intra_node is None:
            dist.all_reduce(buffer, group=tiers.everyone)
            return
        k = tiers.per_node
        padded = torch.nn.functional.pad(buffer, (0, -buffer.numel() % k))
        part = torch.empty_like(padded[: padded.numel() // k])
        dist.reduce_scatter_tensor(part, padded, group=tiers.intra_node)
        dist.all_reduce(part, group=tiers.inter_node)
        dist.all_gather_into_tensor(padded, part, group=tiers.intra_node)
        buffer.copy_(padded[: buffer.numel()])
