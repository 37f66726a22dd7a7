"""Each byte of a replica is written by one rank, and each rank writes as many as any other.

What every rank holds is made here by hand, a replica cut by `torch.chunk`, and compared with what a rank would write.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_mics.checkpoint import pieces
from lightning_mics.checkpoint.pieces import Piece, Writers, pieces_of
from lightning_mics.topology import Topology
from tests.distributed.ranks import run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


def _filled(wholes: dict[str, Tensor], parts: list[Piece]) -> dict[str, Tensor]:
    """How often each value of each tensor is written, where the pieces' values are those of the tensor."""
    counts = {key: torch.zeros(whole.shape, dtype=torch.int64) for key, whole in wholes.items()}
    for piece in parts:
        where = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.rows.shape, strict=True))
        torch.testing.assert_close(piece.rows, wholes[piece.key][where], rtol=0, atol=0)
        assert piece.size == wholes[piece.key].shape
        counts[piece.key][where] += 1
    return counts


def _row(tensor: Tensor) -> int:
    return tensor[0].nbytes if tensor.ndim else tensor.nbytes


@settings(deadline=None)
@given(
    st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=6),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (8, 4), (6, 3)]),
    st.sampled_from(list(Writers)),
)
def test_what_all_ranks_hold_is_cut_into_equal_parts(
    kinds: list[tuple[tuple[int, ...], torch.dtype]], n_and_p: tuple[int, int], writers: Writers
) -> None:
    n, p = n_and_p
    numbers = [torch.arange(torch.Size(shape).numel()).reshape(shape) + i for i, (shape, _) in enumerate(kinds)]
    tensors = {f"t{i}": t.to(dtype) for i, (t, (_, dtype)) in enumerate(zip(numbers, kinds, strict=True))}
    topology = Topology(n, n, p)
    parts = [pieces_of(tensors, topology, rank, writers) for rank in range(n)]
    counts = _filled(tensors, [piece for part in parts for piece in part])
    assert all((count == 1).all() for count in counts.values())
    writing = range(n) if writers == Writers.ALL else topology.partition_groups[0]
    sizes = [sum(piece.rows.nbytes for piece in part) for part in parts]
    assert not any(size for rank, size in enumerate(sizes) if rank not in writing)
    largest = max((_row(tensor) for tensor in tensors.values() if tensor.numel()), default=0)
    assert max(sizes) <= sum(sizes) / len(writing) + largest


def _sharded(p: int, optimizer_world: bool, writers: Writers) -> list[tuple[str, tuple[int, ...], list[Any]]]:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard

    from lightning_mics.groups import Groups

    topology, rank = Topology(dist.get_world_size(), 2, p), dist.get_rank()
    groups = Groups.create(topology, "cpu")
    wholes, tensors = _wholes(), {}
    for key, whole in wholes.items():
        mesh = groups.world_mesh if optimizer_world else groups.partition_mesh
        local = whole
        for axis in range(mesh.ndim):
            chunks = local.chunk(mesh.size(axis))
            coordinate = mesh.get_local_rank(axis)
            local = chunks[coordinate] if coordinate < len(chunks) else local[:0]
        tensors[key] = DTensor.from_local(
            local, mesh, [Shard(0)] * mesh.ndim, run_check=False, shape=whole.shape, stride=whole.stride()
        )
    tensors["plain"] = torch.arange(5.0)
    return [
        (piece.key, tuple(piece.offset), piece.rows.tolist()) for piece in pieces_of(tensors, topology, rank, writers)
    ]


def _wholes() -> dict[str, Tensor]:
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(i))
        for i, (name, shape) in enumerate({"wide": (37, 3), "long": (101,), "few": (2, 8), "one": (1,)}.items())
    }


@pytest.mark.parametrize(
    ("p", "world", "writers"),
    [
        (1, False, Writers.ALL),
        (2, False, Writers.ALL),
        (2, True, Writers.ALL),
        (4, False, Writers.ALL),
        (2, False, Writers.GROUP),
        (1, False, Writers.GROUP),
    ],
)
def test_bytes_per_rank_of_what_is_sharded(p: int, world: bool, writers: Writers) -> None:
    parts = run_ranks(4, _sharded, p, world, writers)
    wholes = _wholes() | {"plain": torch.arange(5.0)}
    told = [
        [Piece(key, wholes[key].shape, torch.Size(offset), torch.tensor(rows)) for key, offset, rows in part]
        for part in parts
    ]
    assert all((count == 1).all() for count in _filled(wholes, [piece for part in told for piece in part]).values())
    sizes = [sum(piece.rows.nbytes for piece in part) for part in told]
    replica = sum(whole.nbytes for whole in wholes.values())
    assert sum(sizes) == replica
    if writers == Writers.GROUP:
        assert all(sizes[:p]) and not any(sizes[p:])
    else:  # shards of few rows leave some ranks with less, by a row of each tensor at most
        assert max(sizes) <= replica / 4 + sum(map(_row, wholes.values()))


def test_a_piece_is_small_enough_to_be_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_LARGEST", 100)
    tensors = {"wide": torch.arange(7 * 30.0).reshape(7, 30), "long": torch.arange(101.0), "one": torch.tensor(3)}
    parts = pieces_of(tensors, Topology(1, 1, 1), 0)
    assert all((count == 1).all() for count in _filled(tensors, parts).values())
    assert [tuple(piece.rows.shape) for piece in parts] == [(1, 30)] * 7 + [(25,)] * 4 + [(1,), ()]


def test_writers_of_another_name_are_refused() -> None:
    with pytest.raises(ValueError, match="writers='some' is not understood; choose one of all, group"):
        Writers.parse("some", "writers")
