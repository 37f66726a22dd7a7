"""Numbers with units, for people to read and to write."""

from __future__ import annotations


def in_units(number: float, unit: str = "") -> str:
    """A number with three digits and a decimal prefix to its unit: 1234567 bytes are "1.23 MB"."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while abs(number) >= 999.5 and len(prefixes) > 1:
        number /= 1000
        del prefixes[0]
    return f"{number:.3g} {prefixes[0]}{unit}".strip()
