"""The rungs of the memory ladder: their names, and how often each moves what, by hand."""

from __future__ import annotations

import pytest

from lightning_mics.ladder import RUNGS, Gradients, Parameters, Rung

NAMES = (
    "block/sharded",
    "block/whole",
    "micro_step/sharded",
    "micro_step/whole",
    "window/sharded",
    "window/whole",
)


def test_every_rung_has_its_name_and_is_found_by_it() -> None:
    assert tuple(map(str, RUNGS)) == NAMES
    assert tuple(map(Rung.parse, NAMES)) == RUNGS
    assert all(Rung.parse(rung) is rung for rung in RUNGS)


def test_the_rung_without_a_name_is_two_hop() -> None:
    assert str(Rung()) == "block/sharded"


@pytest.mark.parametrize(
    "name", ["", "block", "whole/block", "Window/whole", "window/whole ", None, 3, ["block/whole"]]
)
def test_a_rung_that_is_none_is_refused(name: object) -> None:
    with pytest.raises(ValueError) as refused:
        Rung.parse(name)  # type: ignore[arg-type]
    choice = f"choose one of {', '.join(NAMES)}, or 'auto'"
    assert str(refused.value) == f"rung={name!r} is not on the memory ladder; {choice}"


@pytest.mark.parametrize(
    ("parameters", "gathers_of_1", "gathers_of_4"),
    [
        (Parameters.BLOCK, (2, 1), (8, 4)),  # a block for forward and for backward, what lies outside once for both
        (Parameters.MICRO_STEP, (1, 1), (4, 4)),
        (Parameters.WINDOW, (1, 1), (1, 1)),
    ],
)
def test_gathers_of_a_window(
    parameters: Parameters, gathers_of_1: tuple[int, int], gathers_of_4: tuple[int, int]
) -> None:
    for gradients in Gradients:
        rung = Rung(parameters, gradients)
        assert (rung.gathers(1), rung.gathers(4)) == (gathers_of_1, gathers_of_4)


def test_reduce_scatters_of_a_window() -> None:
    for parameters in Parameters:
        assert [Rung(parameters, Gradients.SHARDED).reduce_scatters(window) for window in (1, 4)] == [1, 4]
        assert [Rung(parameters, Gradients.WHOLE).reduce_scatters(window) for window in (1, 4)] == [1, 1]
