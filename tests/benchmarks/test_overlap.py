"""How much of the communication is covered: the arithmetic, and the command on a cluster."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.cluster import unavailable
from benchmarks.model import blocks_of, build
from benchmarks.overlap import app, busy


def test_what_overlaps_is_busy_once() -> None:
    assert busy([]) == 0
    assert busy([("a", 5.0, 6.0), ("b", 1.0, 3.0), ("a", 2.0, 4.0), ("b", 2.5, 3.5)]) == 4.0


@pytest.mark.slow
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = CliRunner().invoke(
        app, ["--link", "unshaped", "--steps", "1", "--folder", str(tmp_path)], catch_exceptions=False
    )
    assert told.exit_code == 0 and "lightning-mics" in told.output
    (folder,) = tmp_path.iterdir()
    assert (folder / "overlap.png").stat().st_size > 10_000
    engines = json.loads((folder / "overlap.json").read_text())["links"]["unshaped"]
    blocks, window, whole = len(blocks_of(build())), 4, 3
    gathers = {
        "FSDP2": window * (2 * blocks + 1),
        # Three blocks stay whole at each turn between forwards and backwards.
        "lightning-mics": window * (2 * blocks + 1) - (2 * window - 1) * whole,
    }
    for engine, gathered in gathers.items():
        for step in engines[engine]["steps"]:
            kinds = Counter(kind for kind, _, _ in step["intervals"])
            assert kinds == {"gather": gathered, "reduce-scatter": window * (blocks + 1)}, engine
            assert all(0 <= began <= ended <= step["seconds"] for _, began, ended in step["intervals"])
            assert 0 < step["busy"] <= step["seconds"]
    # Its collectives return when they are done: it stands still in all of them, and they do not overlap.
    assert all(step["blocked"] == pytest.approx(step["busy"]) for step in engines["FSDP2"]["steps"])
