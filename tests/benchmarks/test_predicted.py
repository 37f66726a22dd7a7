"""Predictions beside measured rows: from a made-up probe, their errors, and what choosing by them costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import predicted as module
from benchmarks.peers import PEERS
from benchmarks.predicted import Planner, Predicted, chosen_of, load, predicted, save, summary, table, walker
from benchmarks.results import Row

RATE = 1e7
LINE = {"latency_s": 1e-6, "bandwidth_bytes_per_s": 1e12, "relative_error": 0, "samples": []}
FIGURES = {
    "name": "cpu",
    "memory_bytes": 1e9,
    "memory_bandwidth": 1e13,
    "peak_flops": {"fp32": 1e15},
    "kernel": 1e-9,
}
PROBE: dict[str, Any] = {
    "format": 1,
    "source": "made up",
    "nodes": 2,
    "ranks_per_node": 2,
    "backend": "gloo",
    "intra": LINE,
    "messages": LINE,
    "inter": LINE | {"bandwidth_bytes_per_s": RATE / 2},
    "figures": FIGURES,
}


def row(peer: str, p: int, seconds: float, window: int = 2) -> dict[str, Any]:
    return vars(Row("200 Mb/s", 2, 2, p, window, peer, str(PEERS[peer].rung), 0.0, [seconds], [[1, 1]], [1.0]))


def test_where_only_the_link_takes_time_its_bytes_do() -> None:
    """25.1 MB of parameters M, and per link of the two: DDP 2 * 3/4 M; p = 2 keeps gathers inside, and hop 2 is M."""
    ddp, ours, alone = predicted([PROBE], [row("ddp", 1, 1), row("mics:window/whole", 2, 1), row("alone", 1, 1)])
    size = sum(param.nbytes for param in module._module().parameters())
    assert ddp.seconds == pytest.approx(1.5 * size / RATE, rel=0.01)
    assert ours.seconds == pytest.approx(size / RATE, rel=0.01)
    assert alone.seconds < 1e-2


def told(seconds: dict[str, tuple[float, float]]) -> list[Predicted]:
    return [Predicted(Row(**row(peer, 2, measured)), said) for peer, (said, measured) in seconds.items()]


def test_errors_and_the_choice() -> None:
    rows = told(
        {
            "hsdp-every": (0.1, 1.0),
            "mics:block/sharded": (3.0, 2.0),
            "mics:micro_step/sharded": (2.2, 2.2),
            "mics:window/whole": (2.4, 1.6),
        }
    )
    assert [each.error for each in rows] == pytest.approx([-0.9, 0.5, 0.0, 0.5])
    choice, over = chosen_of(rows)
    assert choice is not None and choice.peer == "mics:micro_step/sharded", "the fastest by the planner, of ours"
    assert over == pytest.approx(2.2 / 1.6)
    cells = [[*column.cells] for column in summary(rows).columns]
    assert cells == [
        ["200 Mb/s, 2x2, window 2"], ["50.0%"], ["-90.0%"], ["hsdp-every, p = 2"], ["micro_step/sharded, p = 2"],
        ["1.375"],
    ]  # fmt: skip
    assert [*table(rows[0].row.case, rows).columns[-1].cells] == ["-90.0%", "+50.0%", "+0.0%", "+50.0%"]
    assert chosen_of(rows[:1]) == (None, 1.0)


def test_what_was_measured_is_predicted_anew(tmp_path: Path) -> None:
    slower = PROBE | {"figures": FIGURES | {"kernel": 3e-9}}
    seconds = {}
    for name, probes in (("once", [PROBE]), ("twice", [PROBE, slower]), ("slower", [slower])):
        content = {"format": 2, "cases": [{"about": {}, "probes": probes, "rows": [row("alone", 1, 2.0)]}]}
        save(content, tmp_path)
        (only,) = load(tmp_path)
        assert (only.row.peer, only.row.median) == ("alone", 2.0) and 0 < only.seconds < 1e-2
        seconds[name] = only.seconds
    assert seconds["once"] < seconds["slower"]
    assert seconds["twice"] == pytest.approx((seconds["once"] + seconds["slower"]) / 2)
    save(content | {"format": 1}, tmp_path)
    with pytest.raises(ValueError, match="format 1 is not 2; measure anew"):
        load(tmp_path)


def test_every_peer_of_the_grid_has_a_schedule() -> None:
    names = {name for part in module._GRID for name in part.peers}
    assert names <= {*PEERS, "fsdp2"} and all(walker(name) for name in names)
    with pytest.raises(ValueError, match="peer='lightning' has no schedule here; choose of alone, ddp, zero3"):
        walker("lightning")


def test_a_probe_without_a_device_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "network.json"
    file.write_text(json.dumps({name: value for name, value in PROBE.items() if name != "figures"}))
    with pytest.raises(ValueError, match="the probe tells no figures of its devices; give one, or run `mics probe`"):
        Planner(file)
