"""Units: numbers as people read them."""

from __future__ import annotations

import pytest

from mics_tools.units import in_units


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (1234567, "1.23 MB"), (174.6e9, "175 GB"), (2.8e12, "2.8 TB")],
)
def test_in_units(number: float, text: str) -> None:
    assert in_units(number, "B") == text
    assert in_units(number) == text.removesuffix("B").strip()
