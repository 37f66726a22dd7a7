"""The loop with Fabric from the command line: Lightning's launcher starts it, and it goes on from its checkpoint."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.recipes.composing import ROOT
from tests.recipes.jobs import shown_by
from tests.recipes.test_train import corpus, run

__all__ = ["corpus"]  # a fixture

SMALL = ["experiment=smoke", "data.vocab_size=300", "data.val_fraction=0.3", "trainer.limit_val_batches=1", "every=1"]


@pytest.mark.slow
def test_trains_and_goes_on(tmp_path: Path, corpus: Path) -> None:
    options = [*SMALL, f"data.path={corpus}", "cluster.devices=2"]
    script = str(ROOT / "recipes" / "fabric_train.py")
    shown = run([sys.executable, script, *options, "trainer.max_steps=2"], tmp_path)
    assert "2 ranks on 1 node of 2: 1 partition group of 2" in shown
    losses = [float(loss) for loss in re.findall(r"^step \d/2  loss (\d\.\d+)", shown, re.MULTILINE)]
    assert len(losses) == 2 and losses[1] < losses[0] < 9.5  # ln 8192 is 9.0
    (checkpoint,) = re.findall(r"^checkpoint  (.*)$", shown, re.MULTILINE)
    more = ["trainer.max_steps=3", f"ckpt_path={checkpoint}", "strategy.partition_size=1", f"run_dir={tmp_path}/on"]
    shown = shown_by(2, "fabric_train.py", [*options, *more], tmp_path)
    assert "2 ranks on 1 node of 2: 2 partition groups of 1" in shown
    assert re.findall(r"^step (\d)/3", shown, re.MULTILINE) == ["3"]
    assert (tmp_path / "on" / "step-3.ckpt" / "manifest.json").exists()
    assert sorted(path.name for path in (tmp_path / "on").glob("rank_*.log")) == ["rank_0.log", "rank_1.log"]
