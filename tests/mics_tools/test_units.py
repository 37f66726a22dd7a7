"""Units: numbers as people read them."""

from __future__ import annotations

import pytest

from mics_tools.units import in_bytes, in_units


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (1234567, "1.23 MB"), (174.6e9, "175 GB"), (2.8e12, "2.8 TB")],
)
def test_in_units(number: float, text: str) -> None:
    assert in_units(number, "B") == text
    assert in_units(number) == text.removesuffix("B").strip()


@pytest.mark.parametrize(
    ("written", "size"),
    [("5GB", 5e9), ("500 MB", 5e8), ("1.5kb", 1500), ("2GiB", 2**31), ("1 K", 1000), ("7", 7), (4096, 4096)],
)
def test_in_bytes(written: str | int, size: float) -> None:
    assert in_bytes(written) == size


@pytest.mark.parametrize("written", ["", "GB", "0", "-5GB", "5 pounds", "1e9", "5GBs"])
def test_what_is_no_size(written: str) -> None:
    with pytest.raises(ValueError, match="is no size; write it as 5GB"):
        in_bytes(written)
