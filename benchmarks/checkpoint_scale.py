"""Planning of a checkpoint of 10 billion parameters by 512 ranks: time and memory, without the ranks and the bytes.

    python -m benchmarks.checkpoint_scale

A BERT of 127 layers and its AdamW state, as tensors that take no memory, in groups that move nothing. Every rank's
pieces are planned by the real code, one rank after another, and what each would tell rank 0 is kept as it would arrive.
Then rank 0's part runs: reading what arrived, the index, the library's file, the manifest.
"""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import BertConfig, BertForMaskedLM

from benchmarks.results import about
from lightning_mics import Topology, memory
from lightning_mics.checkpoint import metadata
from lightning_mics.checkpoint.garbage import uncollected
from lightning_mics.checkpoint.pieces import Piece, pieces_of
from lightning_mics.checkpoint.snapshot import Snapshot
from mics_tools.manifest import File, Manifest, TensorEntry

_FOLDER = Path(__file__).parent / "results"
_PER_NODE = 8
_CPU = torch.device("cpu")
_STATE = ("exp_avg", "exp_avg_sq")

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Scale:
    """A run, and what planning its checkpoint takes.

    Attributes:
        partition_size: p.
        world_state: whether the optimizer's state is sharded over all ranks.
        parameters: of the model.
        pieces: of all ranks together.
        plan: seconds in which one rank plans its pieces; median of some.
        arrives: bytes that rank 0 gets from all ranks.
        read: seconds to read them.
        index: seconds to make the index of them.
        write: seconds to write it.
        manifest: seconds to make the manifest.
        memory: bytes that rank 0 needs for it at most.
    """

    partition_size: int
    world_state: bool
    parameters: int
    pieces: int
    plan: float
    arrives: int
    read: float
    index: float
    write: float
    manifest: float
    memory: int

    @property
    def seconds(self) -> float:
        """Of rank 0, all in all."""
        return self.plan + self.read + self.index + self.write + self.manifest


def measure(world_size: int, partition_size: int, layers: int, *, world_state: bool = False) -> Scale:
    """Plan as each of `world_size` ranks, and finish as rank 0. There must be no process group.

    Args:
        world_size: number of ranks.
        partition_size: p.
        layers: of the model; 127 have 10 billion parameters.
        world_state: shard the optimizer's state over all ranks.
    """
    topology, shapes = Topology(world_size, min(_PER_NODE, world_size), partition_size), _shapes(layers)
    told, seconds, count = [], [], 0
    template = _written_once()
    for rank, tensors in _as_each_rank(topology, shapes, world_state):
        began = time.perf_counter()
        pieces = pieces_of(tensors, topology, rank)
        seconds.append(time.perf_counter() - began)
        count += len(pieces)
        with uncollected():
            told.append(pickle.dumps(_told(pieces, rank, template)))
    whole = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
    del tensors, pieces
    return Scale(
        partition_size,
        world_state,
        sum(math.prod(shape) for shape in shapes.values()),
        count,
        median(seconds),
        sum(map(len, told)),
        *_finished(whole, told, topology),
    )


def _finished(
    whole: Mapping[str, Any], told: list[bytes], topology: Topology
) -> tuple[float, float, float, float, int]:
    """As `Checkpoint` does it on rank 0: seconds to read, index, write, and describe; bytes."""
    gc.collect()
    memory.reset_peak(_CPU)
    before = memory.in_use(_CPU)
    seconds = []

    def timed(action: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = action()
        seconds.append(time.perf_counter() - began)
        return result

    with tempfile.TemporaryDirectory() as folder, uncollected():
        arrived = timed(lambda: [pickle.loads(each) for each in told])
        index = timed(lambda: metadata.metadata_of(whole, [place for _, places, _ in arrived for place in places]))
        results = [[result for result, _ in places] for _, places, _ in arrived]
        timed(lambda: FileSystemWriter(folder).finish(index, results))
    files = {name: file for mine, _, _ in arrived for name, file in mine.items()}
    tensors = {key: TensorEntry(str(dtype), tuple(size)) for key, (dtype, size) in whole.items()}
    manifest = Manifest(0, 0, "", "all", {}, asdict(topology), files, tensors)
    timed(manifest.to_text)
    read, indexed, wrote, described = seconds
    return read, indexed, wrote, described, memory.peak(_CPU) - before


def _shapes(layers: int) -> dict[str, torch.Size]:
    config = BertConfig(hidden_size=2560, intermediate_size=10240, num_attention_heads=40, num_hidden_layers=layers)
    with torch.device("meta"):
        return {name: param.shape for name, param in BertForMaskedLM(config).named_parameters()}


def _as_each_rank(
    topology: Topology, shapes: Mapping[str, torch.Size], world_state: bool
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Each rank, and its tensors. Replicas hold the same: where all do of all tensors, they are made once for them."""
    p = topology.partition_size
    for shard in range(topology.world_size if world_state else p):
        dist.init_process_group("fake", rank=shard, world_size=topology.world_size, store=FakeStore())
        try:
            tensors = _held_by(shard, topology, shapes, world_state)
            replicas = [shard] if world_state else range(shard, topology.world_size, p)
            for rank in replicas:
                yield rank, tensors
        finally:
            dist.destroy_process_group()


def _held_by(rank: int, topology: Topology, shapes: Mapping[str, torch.Size], world_state: bool) -> dict[str, Tensor]:
    p = topology.partition_size
    group = dist.new_group(list(topology.partition_groups[topology.replica_of(rank)]))
    mesh = DeviceMesh.from_group(group, "cpu")
    of_all = init_device_mesh("cpu", (topology.replicas, p)) if world_state else mesh
    place, n = ((rank % p) * topology.replicas + rank // p, topology.world_size) if world_state else (rank % p, p)
    # One tensor for all of its shape: they are only looked at.
    params = {shape: _sharded(shape, mesh, rank % p, p) for shape in set(shapes.values())}
    states = {shape: _sharded(shape, of_all, place, n) for shape in set(shapes.values())}
    tensors = {f"model.{name}": params[shape] for name, shape in shapes.items()}
    for name, shape in shapes.items():
        tensors |= {f"optimizer.0.{name}.{what}": states[shape] for what in _STATE}
        tensors[f"optimizer.0.{name}.step"] = torch.zeros(())
    return tensors


def _sharded(shape: torch.Size, mesh: DeviceMesh, place: int, n: int) -> Tensor:
    """This rank's rows, as torch cuts them, on the meta device."""
    height = -(-shape[0] // n)
    rows = max(0, min(height, shape[0] - place * height))
    local = torch.empty((rows, *shape[1:]), device="meta")
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(
        local, mesh, [Shard(0)] * mesh.ndim, run_check=False, shape=whole.shape, stride=whole.stride()
    )


# -- what a rank tells -------------------------------------------------------------------------------------------------


def _written_once() -> WriteResult:
    """What the library tells of a piece that it has written."""
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        piece = Piece("x", torch.Size([1]), torch.Size([0]), torch.zeros(1))
        snapshot = Snapshot({}, {"model": [piece]}, b"", b"", Topology(1, 1, 1), "all", 0, 0, "", {}, {}, {})  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as folder:
            _, [(result, _)] = snapshot.write_pieces(Path(folder))
    finally:
        dist.destroy_process_group()
    return result


def _told(pieces: list[Piece], rank: int, template: WriteResult) -> tuple[dict[str, File], Any, bytes]:
    names = {kind: f"{kind}-{rank:05d}-0.distcp" for kind in ("model", "optimizer")}
    written, ends = [], dict.fromkeys(names, 0)
    for piece in pieces:
        kind = piece.key.partition(".")[0]
        size = piece.rows.nbytes
        place = replace(template.storage_data, relative_path=names[kind], offset=ends[kind], length=size)
        ends[kind] += size
        written.append((WriteResult(piece.index, size, place), piece.rows.shape))
    return {name: File(ends[kind], "0" * 32) for kind, name in names.items()}, written, b"0" * 8000


# -- the command -------------------------------------------------------------------------------------------------------


@app.command()
def main(
    world_size: Annotated[int, typer.Option(help="Number of ranks.")] = 512,
    layers: Annotated[int, typer.Option(help="127 have 10 billion parameters.")] = 127,
    folder: Annotated[Path, typer.Option(help="Where results go.")] = _FOLDER,
) -> None:
    """Plan a checkpoint at p = 8, with the optimizer over all ranks, and at p = n; each in a process of its own."""
    scales = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for partition_size, world_state in ((8, False), (8, True), (world_size, False)):
            options = {"world_state": world_state}
            scales.append(pool.apply(measure, (world_size, partition_size, layers), options))
            Console(width=130).print(_table(world_size, scales))
    target = folder / f"{date.today().isoformat()}-checkpoint-scale"
    target.mkdir(parents=True, exist_ok=True)
    content = {"about": about(world_size=world_size, layers=layers), "rows": [asdict(scale) for scale in scales]}
    (target / "scale.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"results in {target}")


def _table(world_size: int, scales: list[Scale]) -> Table:
    table = Table(title=f"{world_size} ranks, {scales[0].parameters / 1e9:.2f} billion parameters; seconds, and MB")
    columns = (
        "p",
        "optimizer",
        "pieces",
        "plan",
        "arrives, MB",
        "read",
        "index",
        "write",
        "manifest",
        "rank 0, s",
        "rank 0, MB",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for s in scales:
        seconds = (f"{value:.2f}" for value in (s.read, s.index, s.write, s.manifest, s.seconds))
        over = "all ranks" if s.world_state else "group"
        first = (str(s.partition_size), over, f"{s.pieces:,}", f"{s.plan:.2f}", f"{s.arrives / 1e6:.1f}")
        table.add_row(*first, *seconds, f"{s.memory / 1e6:.0f}")
    return table


if __name__ == "__main__":
    app()
