"""Files in the safetensors format, written tensor by tensor, so that one tensor at a time is in memory.

    8 bytes     the header's length, little-endian
    header      JSON: for each tensor its dtype, its shape, and from where to where its bytes are; padded with spaces
    bytes       of the tensors, one after the other without a gap, in C order

What takes more bytes a value comes first, so that every tensor is aligned.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 8
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(path: Path, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write a file, flushed.

    Args:
        path: of the file.
        tensors: by name, of their dtypes and shapes; on the meta device, say.
        read: the values of one of them, on the CPU. Called once for each.

    Raises:
        ValueError: if the format has no such dtype.
        OSError: if the file cannot be written.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    with open(path, "wb") as stream:
        stream.write(_header({name: tensors[name] for name in names}))
        for name in names:
            stream.write(read(name).reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers reads no file without it
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} has {tensor.dtype}, which safetensors does not have; cast it")
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
