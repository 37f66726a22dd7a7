"""Native: collectives made of the backend's own, stage by stage. Where gloo carries an accelerator's tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics._compat import all_gather_single, coalesced, reduce_scatter_single
from lightning_mics.collectives import Collectives
from lightning_mics.groups import Tiers, backend_for


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
        with coalesced(tiers.intra_node, backend_for(buffer.device, tiers.intra_node)):
            for node, target in enumerate(slots.view(tiers.nodes, -1)):
                all_gather_single(target, here[node], tiers.intra_node)

    def reduce_scatter(self, buffer: Tensor) -> Tensor:
        slots = buffer.view(self._hierarchical.size, -1)
        tiers = self.tiers_for(slots[0].nbytes)
        total = torch.empty_like(slots[0])
        if tiers.inter_node is None or tiers.intra_node is None:
            reduce_scatter_single(total, buffer, tiers.everyone)
            return total
        here = torch.empty_like(slots[: tiers.nodes])
        with coalesced(tiers.intra_node, backend_for(buffer.device, tiers.intra_node)):
            for node, source in enumerate(slots.view(tiers.nodes, -1)):
                reduce_scatter_single(here[node], source, tiers.intra_node)
        reduce_scatter_single(total, here.view(-1), tiers.inter_node)
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
