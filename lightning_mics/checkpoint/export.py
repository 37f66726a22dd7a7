"""Export: a checkpoint directory becomes a folder that `transformers` opens.

    OUT/config.json                        of the model, as it was when it was saved
    OUT/model.safetensors                  its tensors, or, where they are larger than one file is to be,
    OUT/model-00001-of-00003.safetensors   the first of several files,
    OUT/model.safetensors.index.json       and in which of them each tensor is

Tensors go from the checkpoint's files to the new ones one at a time, so that the model may be larger than memory.
Nothing of Lightning's part is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from lightning_mics.checkpoint import metadata, safetensors
from lightning_mics.checkpoint.flat import MODEL
from lightning_mics.checkpoint.verification import Verify, verify_alone
from mics_tools import atomic
from mics_tools.manifest import Manifest, check_kind
from mics_tools.units import in_bytes

_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_hugging_face(
    directory: str | Path,
    folder: str | Path,
    *,
    model: str | None = None,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    verify: Verify | str = Verify.AUTO,
) -> None:
    """Write the Hugging Face model within a checkpoint directory as a folder that `from_pretrained` opens.

    Tensors have the values and, unless `dtype` is given, the dtypes they were saved with. What is tied within the
    model is written once, as `transformers` does. Needs no process group, and memory for one tensor at a time.

    Args:
        directory: what `Trainer(strategy="mics")` saved.
        folder: to write; there all at once when it is complete.
        model: its name in the module that was saved; not needed where there is one.
        max_shard_size: bytes, or as "5GB" and "500MB"; a tensor that is larger has a file of its own.
        dtype: "float32", "bfloat16" or "float16", to cast floating-point tensors to.
        verify: how much of the directory is compared with its manifest first: "auto" (all but optimizer state),
            "full" or "off".

    Raises:
        FileNotFoundError, ValueError: if `directory` is not a checkpoint directory, is damaged, or has no such model.
        FileExistsError: if something is at `folder`, other than an empty directory.
    """
    directory, folder = Path(directory), Path(folder)
    most, verify = in_bytes(max_shard_size), Verify.parse(verify, "verify")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is not understood; choose one of {', '.join(filter(None, _DTYPES))}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder={str(folder)!r} is there already; name one that is not")
    check_kind(directory)
    manifest = Manifest.of(directory)
    name = _chosen(directory, manifest, model)
    verify_alone(directory, manifest, verify, optimizers=False)

    index = metadata.Reader(directory).read_metadata()
    keys = _keys(manifest, name)
    tensors = {own: _layout(index, key, _DTYPES[dtype]) for own, key in keys.items()}
    read = partial(_read, directory, index, keys, tensors)
    with atomic.written_aside(folder) as aside:
        _write_json(aside / "config.json", {**manifest.models[name], "dtype": _dtype_of(tensors)})
        files = _split(tensors, most)
        for file, some in files.items():
            safetensors.write(aside / file, some, read)
        if len(files) > 1:
            _write_json(aside / "model.safetensors.index.json", _index_of(files))


def _chosen(directory: Path, manifest: Manifest, model: str | None) -> str:
    there = ", ".join(map(repr, manifest.models))
    if not there:
        raise ValueError(
            f"{directory} holds no Hugging Face model: none was in the module that was saved; export it to lightning"
        )
    if model is None and len(manifest.models) > 1:
        raise ValueError(f"{directory} holds several Hugging Face models; choose model= one of {there}")
    if model is not None and model not in manifest.models:
        raise ValueError(f"model={model!r} is no Hugging Face model of {directory}; choose one of {there}")
    return next(iter(manifest.models)) if model is None else model


def _keys(manifest: Manifest, model: str) -> dict[str, str]:
    """The names that the model's tensors have in it, and those that they have in the checkpoint."""
    start = f"{model}." if model else ""
    keys = {key.removeprefix(MODEL + start): key for key in manifest.tensors if key.startswith(MODEL + start)}
    shared: dict[str, str] = {}  # with what lies outside the model, and there has its first name
    for name, first in manifest.tied.items():
        if name.startswith(start) and not first.startswith(start):
            shared.setdefault(MODEL + first, name.removeprefix(start))
    return keys | {name: key for key, name in shared.items()}


def _layout(index: Metadata, key: str, cast: torch.dtype | None) -> Tensor:
    """Dtype and shape that a tensor will have."""
    saved: Any = index.state_dict_metadata[key]
    own: torch.dtype = saved.properties.dtype
    return torch.empty(saved.size, dtype=(cast or own) if own.is_floating_point else own, device="meta")


def _read(path: Path, index: Metadata, keys: Mapping[str, str], tensors: Mapping[str, Tensor], name: str) -> Tensor:
    key = keys[name]
    saved: Any = index.state_dict_metadata[key]
    tensor = torch.empty(saved.size, dtype=saved.properties.dtype)
    metadata.read(path, index, {key: tensor})
    return tensor.to(tensors[name].dtype)


def _split(tensors: Mapping[str, Tensor], most: int) -> dict[str, dict[str, Tensor]]:
    """Files of at most so many bytes, in the order of the tensors."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > most:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _index_of(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    tensors = [tensor for part in files.values() for tensor in part.values()]
    totals = {"total_parameters": sum(t.numel() for t in tensors), "total_size": sum(t.nbytes for t in tensors)}
    return {"metadata": totals, "weight_map": {name: file for file, part in files.items() for name in part}}


def _dtype_of(tensors: Mapping[str, Tensor]) -> str:
    """That of the model, as `transformers` says it: of its first floating-point tensor."""
    first = next((tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point), torch.float32)
    return str(first).removeprefix("torch.")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    atomic.flush(path)
