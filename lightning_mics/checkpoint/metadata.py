"""The library's own index of a checkpoint, `.metadata`: written so that any of its readers opens it, read with care.

It is a pickle, and to load a pickle is to do what it says. Here only what the index is made of can be named in it:
plain data, and the library's own records. Anything else is refused before it is looked up.
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

NAME = ".metadata"
_LIBRARY = "torch.distributed.checkpoint."
_RECORDS = {
    _LIBRARY + "metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    _LIBRARY + "filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePath", "PurePosixPath"),
}


def metadata_of(
    tensors: Mapping[str, tuple[torch.dtype, torch.Size]], written: Iterable[tuple[WriteResult, torch.Size]]
) -> Metadata:
    """The index of `tensors`, of which every rank wrote some rows.

    Args:
        tensors: by name, their dtypes and shapes.
        written: what the library's writer returned for each piece, and the piece's size.

    Raises:
        ValueError: if some tensor was not written whole, or one that is not there was.
    """
    entries = {
        key: TensorStorageMetadata(TensorProperties(dtype=dtype), size, []) for key, (dtype, size) in tensors.items()
    }
    missing = {key: size.numel() for key, (_, size) in tensors.items()}
    for result, size in written:
        key, offset = result.index.fqn, result.index.offset
        if key not in entries or offset is None:
            raise ValueError(f"a rank wrote {key}, which rank 0 does not have; give every rank the same state")
        entries[key].chunks.append(ChunkStorageMetadata(offset, size))
        missing[key] -= size.numel()
    if wrong := [key for key, count in missing.items() if count]:
        raise ValueError(f"{wrong[0]} was not written whole: {missing[wrong[0]]} values are missing")
    return Metadata({**entries}, planner_data={key: (key,) for key in entries})


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's search for unreachable cycles: while millions of records are made it would look at all of them
    over and over, and find none. For as long as that takes alone, as it is the whole process's."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read(path: Path, index: Metadata, targets: dict[str, Tensor]) -> None:
    """Read from the checkpoint at `path` what each of `targets` holds of its tensor on this rank. No communication.

    Args:
        path: of the checkpoint.
        index: its own.
        targets: by name; whole tensors or DTensors, of the saved shapes and dtypes.
    """
    planner, reader = DefaultLoadPlanner(), Reader(path)
    planner.set_up_planner(targets, index, is_coordinator=True)
    reader.set_up_storage_reader(index, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    (plan,) = reader.prepare_global_plan(planner.create_global_plan([plan]))
    reader.read_data(planner.finish_plan(plan), planner).wait()


class Reader(FileSystemReader):
    """The library's reader, with an index that is read with care."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            pickle.UnpicklingError: if it is not one, or asks for something else.
        """
        with open(Path(self.path) / NAME, "rb") as stream, uncollected():
            metadata = _Records(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{NAME} is a {type(metadata).__name__}, not an index of tensors")
        for place in (metadata.storage_data or {}).values():
            if Path(place.relative_path).name != place.relative_path:
                raise pickle.UnpicklingError(f"{NAME} names {place.relative_path}, outside the checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        return metadata


class _Records(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if _is_a_record(module, name) else None
        if found is None:
            raise pickle.UnpicklingError(
                f"{NAME} asks for {module}.{name}, which no index of tensors holds: it was made to run code, or by "
                "something else than torch.distributed.checkpoint; do not open this checkpoint"
            )
        return found


def _is_a_record(module: str, name: str) -> bool:
    is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
    return is_dtype or name in _RECORDS.get(module, ())
