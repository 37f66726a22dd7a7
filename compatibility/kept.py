"""Results that are kept: a file of JSON, of a format that its script knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def load(path: Path, format: int) -> dict[str, Any]:
    """Read what `save` wrote.

    Raises:
        ValueError: if it is of another format.
    """
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("format") != format:
        raise ValueError(f"{path}: format {content.get('format')!r} is not {format}; run it anew")
    return content


def save(path: Path, format: int, **content: Any) -> None:
    """Write `content`, and make the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": format, **content}, indent=1) + "\n")
