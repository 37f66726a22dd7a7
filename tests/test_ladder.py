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
    ("parameters", "whole", "of_1", "of_4", "outside"),
    [
        # For each forward and each backward; but the first stay from backward to forward, the last the other way.
        (Parameters.BLOCK, 2, [2, 2, 2, 1, 1], [5, 5, 8, 4, 4], 4),
        (Parameters.BLOCK, 3, [2, 2, 1, 1, 1], [5, 5, 1, 4, 4], 4),
        (Parameters.BLOCK, 6, [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], 4),
        (Parameters.MICRO_STEP, 2, [1, 1, 1, 1, 1], [1, 1, 4, 4, 4], 4),
        (Parameters.WINDOW, 2, [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], 1),
    ],
)
def test_gathers_of_a_window(
    parameters: Parameters, whole: int, of_1: list[int], of_4: list[int], outside: int
) -> None:
    for gradients in Gradients:
        rung = Rung(parameters, gradients)
        assert [[rung.gathers(window, index, 5, whole) for index in range(5)] for window in (1, 4)] == [of_1, of_4]
        assert (rung.gathers_outside(1), rung.gathers_outside(4)) == (1, outside)


@pytest.mark.parametrize(("blocks", "whole"), [(1, 2), (4, 2), (4, 3), (9, 3), (9, 1)])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_no_order_of_freeing_gathers_less(blocks: int, whole: int, window: int) -> None:
    """Held against the best that can be: of all that is whole, free what is needed last (Belady)."""
    sweep = [*range(blocks), *reversed(range(blocks))]
    needed = sweep * window
    held: set[int] = set()
    gathers = 0
    for moment, block in enumerate(needed):
        if block not in held:
            gathers += 1
            if len(held) == whole:
                rest = needed[moment:]
                held.remove(max(held, key=lambda each: rest.index(each) if each in rest else len(rest)))
            held.add(block)
    assert sum(Rung().gathers(window, index, blocks, whole) for index in range(blocks)) == gathers


def test_reduce_scatters_of_a_window() -> None:
    for parameters in Parameters:
        assert [Rung(parameters, Gradients.SHARDED).reduce_scatters(window) for window in (1, 4)] == [1, 4]
        assert [Rung(parameters, Gradients.WHOLE).reduce_scatters(window) for window in (1, 4)] == [1, 1]
