"""Numbers with units, for people to read and to write."""

from __future__ import annotations

import re


def in_units(number: float, unit: str = "") -> str:
    """A number with three digits and a decimal prefix to its unit: 1234567 bytes are "1.23 MB"."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while abs(number) >= 999.5 and len(prefixes) > 1:
        number /= 1000
        del prefixes[0]
    return f"{number:.3g} {prefixes[0]}{unit}".strip()


def in_bytes(size: int | str) -> int:
    """A size that a user wrote: "5GB", "200 MB", "1GiB", or a number of bytes.

    Raises:
        ValueError: if it is not understood, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    if found is None or not (number := float(found[1])):
        raise ValueError(f"{size!r} is no size; write it as 5GB, 500MB, 1GiB or a number of bytes")
    return int(number * (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " "))
