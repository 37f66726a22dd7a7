"""The library's own index of a checkpoint, `.metadata`: written so that any of its readers opens it, read with care.

It is a pickle, and to load a pickle is to do what it says. Here only what the index is made of can be named in it:
plain data, and the library's own records. Anything else is refused before it is looked up.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.storage import WriteResult

from lightning_mics.checkpoint.garbage import uncollected

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

_ELSEWHERE = {"pathlib._local": "pathlib"}  # as Python 3.13 alone calls it


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
    chunks: dict[tuple[torch.Size, torch.Size], ChunkStorageMetadata] = {}
    for result, size in written:
        key, offset = result.index.fqn, result.index.offset
        if key not in entries or offset is None:
            raise ValueError(f"a rank wrote {key}, which rank 0 does not have; give every rank the same state")
        if (offset, size) not in chunks:
            chunks[offset, size] = ChunkStorageMetadata(offset, size)
        entries[key].chunks.append(chunks[offset, size])
        missing[key] -= size.numel()
    if wrong := [key for key, count in missing.items() if count]:
        raise ValueError(f"{wrong[0]} was not written whole: {missing[wrong[0]]} values are missing")
    return Metadata({**entries}, planner_data={key: (key,) for key in entries})


def read(path: Path, index: Metadata, targets: dict[str, Any]) -> None:
    """Read from the checkpoint at `path` what each of `targets` holds of its tensor on this rank. No communication.

    Args:
        path: of the checkpoint.
        index: its own, or a translation of it.
        targets: by name; whole tensors or DTensors, of the saved shapes and dtypes. What is no tensor in the
            checkpoint is plain data, and is replaced by what was saved.

    Raises:
        pickle.UnpicklingError: if it is not plain data.
    """
    planner, reader = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False), Reader(path)
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


class _Planner(DefaultLoadPlanner):
    """The library's, which would run the code of what is no tensor."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)


class _Records(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = _ELSEWHERE.get(module, module)
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
