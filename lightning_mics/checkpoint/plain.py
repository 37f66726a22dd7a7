"""Plain data: what torch.save has written is read without running the code of objects in it."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import IO, Any

import torch


def load_plain(source: Path | IO[bytes], name: object, weights_only: bool | None = None, **options: Any) -> Any:
    """`torch.load` to the CPU, of plain data alone unless `weights_only` is False.

    Args:
        source: a file.
        name: of the file, for people.
        weights_only: only False lets it run the code of objects in it.
        options: of `torch.load`.

    Raises:
        ValueError: if there is anything else in it; says how to load it nevertheless.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=weights_only is not False, **options)
    except pickle.UnpicklingError as error:
        if weights_only is False:
            raise ValueError(f"{name} is not what torch.save writes: {error}") from error
        raise ValueError(
            f"{name} holds objects that are not plain data, or is no checkpoint: {reason(error)}. To load objects is "
            "to run their code; if you trust who saved it, pass weights_only=False (to fit, validate, test, predict "
            "or consolidate), or name their classes by torch.serialization.add_safe_globals"
        ) from None


def reason(error: Exception) -> str:
    """What torch says of an object that is not plain data, without its advice."""
    found = re.search(r"[Uu]nsupported (?:global: )?GLOBAL ([\w.]+)|Unsupported .*", str(error))
    return (found[1] or found[0]) if found else str(error).splitlines()[0]
