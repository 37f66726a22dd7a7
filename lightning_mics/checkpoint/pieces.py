"""Pieces: which rank writes which part of a checkpoint, known to every rank without a word.

Ranks that hold the same bytes share the writing of them. Laid end to end, what they hold is a line; of m such ranks
each writes an m-th of it, cut between rows. One replica is written in all, and every rank writes as much as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from lightning_mics.choice import Choice
from lightning_mics.topology import Topology

_LARGEST = 16 << 20  # bytes of a piece, unless a row is larger: who reads one holds it whole


class Writers(Choice):
    """Which ranks write a checkpoint."""

    ALL = "all"
    """All ranks share the writing, on a file system that all of them see."""
    GROUP = "group"
    """The first partition group alone, so that its node has a complete checkpoint on a disk of its own."""


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor, to be written by this rank.

    Attributes:
        key: the tensor's name in the checkpoint.
        size: of the whole tensor.
        offset: where in the whole tensor `rows` begin, in each dimension.
        rows: the values, in this rank's memory.
    """

    key: str
    size: torch.Size
    offset: torch.Size
    rows: Tensor

    @property
    def index(self) -> MetadataIndex:
        """By which the library finds it."""
        return MetadataIndex(self.key, self.offset)

    def item(self) -> WriteItem:
        """As the library's writer takes it."""
        chunk = ChunkStorageMetadata(offsets=self.offset, sizes=self.rows.shape)
        data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=self.rows.dtype), size=self.size)
        return WriteItem(index=self.index, type=WriteItemType.SHARD, tensor_data=data)


def pieces_of(
    tensors: Mapping[str, Tensor], topology: Topology, rank: int, writers: Writers = Writers.ALL
) -> list[Piece]:
    """What `rank` writes of `tensors`. No communication.

    Args:
        tensors: by name, the same on every rank; each whole on every rank, or a DTensor on the mesh of this rank's
            partition group or of all ranks, sharded along every axis of it.
        topology: who holds what.
        rank: this rank.
        writers: which ranks write.
    """
    held = _held(tensors)
    lines: dict[tuple[int, ...], list[Piece]] = {}
    for key, piece in held.items():
        lines.setdefault(_writing(tensors[key], topology, rank, writers), []).append(piece)
    return [part for ranks, line in lines.items() if rank in ranks for part in _part_of(line, ranks, rank)]


@torch.no_grad()  # or each DTensor would be asked for its part by way of autograd
def _held(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """What this rank holds of each tensor; nothing of those of which it holds nothing."""
    held = {}
    offsets: dict[Any, torch.Size] = {}
    for key, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.numel():
            held[key] = Piece(key, tensor.shape, _offset(tensor, offsets), local.detach())
    return held


def _offset(tensor: Tensor, known: dict[Any, torch.Size]) -> torch.Size:
    """Where in the whole tensor this rank's part begins. The library is asked once for all that are sharded alike."""
    if not isinstance(tensor, DTensor):
        return torch.Size([0] * tensor.ndim)
    alike = tensor.device_mesh, tensor.placements, tensor.shape
    if alike not in known:
        items: Sequence[Any] = create_default_local_save_plan({"": tensor}, is_coordinator=True).items
        known[alike] = items[0].tensor_data.chunk.offsets
    return known[alike]


def _writing(tensor: Tensor, topology: Topology, rank: int, writers: Writers) -> tuple[int, ...]:
    """The ranks that hold what `rank` holds of `tensor`, and write."""
    holding: tuple[int, ...] = tuple(range(topology.world_size))
    if isinstance(tensor, DTensor):
        of_all = tensor.device_mesh.ndim > 1
        holding = (rank,) if of_all else topology.replication_groups[topology.shard_of(rank)]
    return holding if writers == Writers.ALL else tuple(r for r in holding if r in topology.partition_groups[0])


def _part_of(line: Sequence[Piece], ranks: tuple[int, ...], rank: int) -> list[Piece]:
    """This rank's equal part of what `ranks` hold: the rows that begin within its bounds."""
    length = sum(piece.rows.nbytes for piece in line)
    low, high = (length * i // len(ranks) for i in (ranks.index(rank), ranks.index(rank) + 1))
    parts, start = [], 0
    for piece in line:
        rows, ndim = piece.rows, piece.rows.ndim
        height = rows.shape[0] if ndim else 1
        width = rows.nbytes // height
        first, last = (min(max(-(-(bound - start) // width), 0), height) for bound in (low, high))
        step = max(_LARGEST // width, 1)
        for row in range(first, last, step):
            offset = torch.Size((piece.offset[0] + row, *piece.offset[1:])) if ndim else piece.offset
            parts.append(Piece(piece.key, piece.size, offset, rows[row : min(row + step, last)] if ndim else rows))
        start += rows.nbytes
    return parts
