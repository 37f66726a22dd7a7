"""A snapshot: what one rank puts into a checkpoint, as it was at one moment.

Tensors are this rank's pieces. Without a copy they are the training's own memory, to be written before training goes
on; with one they are in host memory, and may be written while it does.
"""

from __future__ import annotations

import io
import platform
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from lightning_mics._compat import named_files
from lightning_mics.checkpoint.flat import MODEL, TIED, loader_states, split
from lightning_mics.checkpoint.hugging_face import configurations
from lightning_mics.checkpoint.pieces import Piece, Writers, pieces_of
from lightning_mics.checkpoint.rng import get_rng_state
from lightning_mics.topology import Topology
from lightning_mics.version import __version__
from mics_tools.manifest import File

Written = list[tuple[WriteResult, torch.Size]]


class HostMemory:
    """Room for copies of a rank's pieces, the same from one snapshot to the next; page-locked beside an accelerator."""

    def __init__(self) -> None:
        self._rooms: dict[MetadataIndex, Tensor] = {}

    def copies(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The same pieces with rows of their own, complete when this returns."""
        copied = [replace(piece, rows=self._copy(piece)) for piece in pieces]
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return copied

    def _copy(self, piece: Piece) -> Tensor:
        room, rows = self._rooms.get(piece.index), piece.rows
        if room is None or room.shape != rows.shape or room.dtype != rows.dtype:
            room = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=not rows.is_cpu)
            self._rooms[piece.index] = room
        return room.copy_(rows, non_blocking=True)


@dataclass(frozen=True)
class Snapshot:
    """What this rank writes, and what the checkpoint says of itself.

    Attributes:
        tensors: dtype and shape of every tensor of the checkpoint, by name.
        pieces: this rank's, of the model and of the optimizers.
        rest: what Lightning keeps beside tensors, serialised; of rank 0.
        own: what this rank keeps for itself, serialised: random state, and the place of its loaders.
        topology: of the run.
        writers: which ranks write.
        step: optimizer steps taken.
        epoch: the epoch that is under way.
        saved: when, in UTC.
        versions: of the packages.
        tied: further names of tensors, and their first.
        models: configurations of the Hugging Face models in the module, by their names in it.
    """

    tensors: Mapping[str, tuple[torch.dtype, torch.Size]]
    pieces: Mapping[str, list[Piece]]
    rest: bytes
    own: bytes
    topology: Topology
    writers: Writers
    step: int
    epoch: int
    saved: str
    versions: Mapping[str, str]
    tied: Mapping[str, str]
    models: Mapping[str, Mapping[str, Any]]

    @classmethod
    def take(
        cls,
        checkpoint: dict[str, Any],
        module: nn.Module,
        topology: Topology,
        *,
        rng: Mapping[str, Any] | None = None,
        loaders: Sequence[Any] | None = None,
        writers: Writers = Writers.ALL,
        memory: HostMemory | None = None,
    ) -> Snapshot:
        """The snapshot of this rank. No communication.

        Args:
            checkpoint: as Lightning dumps it: "state_dict", "optimizer_states" (by name), and anything else that
                torch.save takes.
            module: the module of the state dict; tells which names are tied and hence one tensor.
            topology: of the run.
            rng: this rank's random state; by default that of its generators now.
            loaders: where this rank's loaders are; by default what `checkpoint` has of that among Lightning's loops.
            writers: which ranks write.
            memory: where to copy this rank's pieces to; by default they are not copied.
        """
        tensors, rest = split(checkpoint, module)
        loaders = loader_states(checkpoint) if loaders is None else [*loaders]
        kinds: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for key, tensor in tensors.items():
            kinds["model" if key.startswith(MODEL) else "optimizer"][key] = tensor
        pieces = {kind: pieces_of(some, topology, dist.get_rank(), writers) for kind, some in kinds.items()}
        if memory is not None:
            pieces = {kind: memory.copies(some) for kind, some in pieces.items()}
        return cls(
            tensors={key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()},
            pieces=pieces,
            rest=_serialised(rest) if dist.get_rank() == 0 else b"",
            own=_serialised({"rng": rng or get_rng_state(), "loaders": loaders}),
            topology=topology,
            writers=writers,
            step=int(checkpoint.get("global_step", 0)),
            epoch=int(checkpoint.get("epoch", 0)),
            saved=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={
                "lightning-mics": __version__,
                "torch": str(torch.__version__),
                "lightning": str(checkpoint.get("pytorch-lightning_version", "")),
                "python": platform.python_version(),
            },
            tied=rest[TIED],
            models=configurations(module),
        )

    def write_pieces(self, folder: Path) -> tuple[dict[str, File], Written]:
        """Write this rank's pieces into `folder`, flushed; its files, and where in them each piece is.

        Raises:
            OSError: if they cannot be written.
        """
        files: dict[str, File] = {}
        written: Written = []
        for kind, pieces in self.pieces.items():
            if pieces:
                prefix = f"{kind}-{dist.get_rank():05d}-"
                written += _write(folder, prefix, pieces, files)
        return files, written


def _write(folder: Path, prefix: str, pieces: Iterable[Piece], files: dict[str, File]) -> Written:
    planner = _Pieces(pieces)
    writer = FileSystemWriter(folder)
    writer.fs = _Summing(files)
    results = writer.write_data(named_files(planner.items(), prefix), planner).wait()
    return [(result, planner.by_index[result.index].rows.shape) for result in results]


class _Pieces(DefaultSavePlanner):
    """Hands pieces to the library's writer."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        super().__init__()
        self.by_index = {piece.index: piece for piece in pieces}

    def items(self) -> SavePlan:
        return SavePlan([piece.item() for piece in self.by_index.values()])

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.by_index[write_item.index].rows


class _Summing(FileSystem):
    """Files whose sizes and checksums are known when they are closed."""

    def __init__(self, files: dict[str, File]) -> None:
        self._files = files

    @contextmanager
    def create_stream(self, path: str | PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        try:
            with super().create_stream(path, mode) as stream:
                summed = _SummedStream(stream)
                yield summed
        except Exception as error:  # what fails in a write does not tell where, and torch.save tells of what follows
            if (cause := _os_error(error)) is not None:
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            raise
        else:
            self._files[Path(path).name] = File(summed.size, summed.checksum.hexdigest())


class _SummedStream(io.RawIOBase):
    def __init__(self, stream: io.IOBase) -> None:
        self._stream = stream
        self.size = 0
        self.checksum = xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self._stream.write(data)  # type: ignore[attr-defined]
        self.checksum.update(data)
        size = memoryview(data).nbytes
        self.size += size
        return size

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        return self._stream.fileno()

    def flush(self) -> None:
        if not self._stream.closed:
            self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _os_error(error: BaseException | None) -> OSError | None:
    """The error of the system behind `error`."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _serialised(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
