"""Rows: their summary, their files, and losses that must agree before a time is told."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.report import picture, table
from benchmarks.results import Results, Row, about
from benchmarks.worker import LossesDiffer, check_losses

_ROW = Row(
    link="200 Mb/s",
    nodes=2,
    ranks_per_node=2,
    partition_size=2,
    window=4,
    peer="mics:block/sharded",
    rung="block/sharded",
    bound=100.0,
    seconds=[1.0, 2.0, 4.0, 3.0, 5.0],
    sent=[[100, 104], [110, 110], [90, 90], [102, 102], [101, 101]],
    losses=[3.0, 2.0],
    peak_memory=1000,
)


def test_summary() -> None:
    assert _ROW.median == 3.0
    assert _ROW.spread == 2.0  # quartiles 2 and 4
    assert _ROW.sent_per_node == 102  # the median of 102, 110, 90, 102, 101
    assert _ROW.over_bound == 1.02
    assert replace(_ROW, bound=0.0).over_bound is None
    assert replace(_ROW, seconds=[1.5]).spread == 0.0


def test_round_trip(tmp_path: Path) -> None:
    results = Results(about(links=["200 Mb/s"]), [_ROW, replace(_ROW, peer="ddp", peak_memory=None)])
    results.save(tmp_path / "deep" / "folder")
    assert Results.load(tmp_path / "deep" / "folder") == results
    assert {"date", "commit", "machine", "versions", "options"} <= results.about.keys()
    first, second = csv.DictReader((tmp_path / "deep" / "folder" / "results.csv").open())
    assert (first["peer"], first["median_s"], first["sent_over_bound"]) == ("mics:block/sharded", "3.0000", "1.0200")
    assert second["peak_memory"] == ""


def test_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"format": 0, "about": {}, "rows": []}')
    with pytest.raises(ValueError, match="format 0 is not 1; measure anew"):
        Results.load(tmp_path)


_ROWS = [replace(_ROW, peer="alone", seconds=[0.3], bound=0.0), _ROW, replace(_ROW, window=1)]


def test_table() -> None:
    tables = [*table(_ROWS)]
    assert len(tables) == 2  # one a window
    console = Console(width=120)
    with console.capture() as shown:
        console.print(tables[0])
    assert "1.020" in shown.get() and "10%" in shown.get()  # over the bound; computing alone is 0.3 of 3 s


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture(_ROWS, tmp_path / "wire.png")
    assert (tmp_path / "wire.png").stat().st_size > 10_000


def test_losses_that_differ_are_an_error_that_names_the_peer() -> None:
    ddp = replace(_ROW, peer="ddp")
    alone = replace(_ROW, peer="alone", losses=[3.0, 9.0])  # its ranks go their own ways
    check_losses([ddp, alone, replace(_ROW, losses=[3.0, 2.00001])], tolerance=1e-5)
    with pytest.raises(LossesDiffer, match=r"mics:block/sharded at p=2, window 4: its loss 2.0001.* step 1 .* ddp's"):
        check_losses([_ROW, ddp, replace(_ROW, losses=[3.0, 2.0001])], tolerance=1e-5)
    with pytest.raises(LossesDiffer):
        check_losses([ddp, replace(_ROW, losses=[3.0, float("nan")])])
