"""The main job from the command line, on real processes: what it writes, what it shows, and that it goes on.

Lightning's launcher starts the one that is told to stop, torchrun the sweep; the others run on ranks that are there.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import reserved_port
from tests.recipes.composing import ROOT
from tests.recipes.jobs import RUN_ID, shown_by

# A model, a vocabulary and a corpus that start in seconds.
SMALL = ["experiment=smoke", "data.vocab_size=300", "data.val_fraction=0.3", "sample.tokens=4", "trainer.max_steps=3"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(24):
        lines = (f"def number_{n}(x):\n    return x + {n * i}\n" for n in range(60))
        (folder / f"{i}.py").write_text("\n".join(lines))
    return folder


def run(command: list[str], cwd: Path) -> str:
    with reserved_port() as port:
        env = {"LIGHTNING_MICS_CACHE": str(cwd / "cache"), "GLOO_SOCKET_IFNAME": "lo", "MASTER_PORT": str(port)}
        done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def train(tmp_path: Path, corpus: Path, *overrides: str, ranks: int = 2) -> str:
    options = [*SMALL, f"data.path={corpus}", f"trainer.devices={ranks}", *overrides]
    return shown_by(ranks, "train.py", options, tmp_path)


def logged(folder: Path, column: str) -> dict[int, float]:
    """What the CSV logger wrote, by step."""
    with (folder / "csv" / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row.get(column)}


def only_run(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "outputs").iterdir()
    return folder


def assert_whole(folder: Path, shown: str, ranks: int) -> None:
    assert sorted(path.name for path in folder.glob("rank_*.log")) == [f"rank_{rank}.log" for rank in range(ranks)]
    assert (folder / ".hydra" / "config.yaml").exists()
    assert list((folder / "tensorboard").glob("events.*"))
    assert (folder / "checkpoints" / "step-3.ckpt").exists()
    (loss,) = logged(folder, "val/loss").values()
    assert f"validation  step 3: loss {loss:.3f} nats" in shown
    # Rank 0 alone speaks.
    assert shown.count("lightning-mics ") == shown.count("step 3/3") == shown.count("go on with") == 1
    assert re.search(r"unigram entropy \d\.\d\d nats, ln V 5\.70", shown)


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [(["strategy=ddp"], 2), ([], 4), (["strategy=zero3"], 2)],
    ids=["ddp", "mics", "zero3"],
)
def test_what_is_written_and_shown(tmp_path: Path, corpus: Path, overrides: list[str], ranks: int) -> None:
    shown = train(tmp_path, corpus, *overrides, ranks=ranks)
    assert_whole(only_run(tmp_path), shown, ranks)
    samples = shown.split("samples     ")[1].split("checkpoint  ")[0]
    assert all(f"{prompt}|" in samples for prompt in ("import ", "def __init__(self", "    for ", "class "))


@pytest.mark.slow
def test_sweep_under_torchrun_trains_each_configuration_in_its_folder(tmp_path: Path, corpus: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "recipes" / "train.py"), "--multirun"]
    shown = run([*launcher, *script, *SMALL, f"data.path={corpus}", "seed=1,2"], tmp_path)
    folder, jobs = only_run(tmp_path), shown.split("go on with  torchrun --standalone --nproc-per-node 2 ")
    assert len(jobs) == 3
    for job in (0, 1):
        assert_whole(folder / str(job), jobs[job] + "go on with", 2)


def test_masked_language_modelling(tmp_path: Path, corpus: Path) -> None:
    shown = train(tmp_path, corpus, "model=bert_tiny")
    assert "BertLayer" in shown
    assert "samples" not in shown


def test_the_command_that_is_shown_goes_on(tmp_path: Path, corpus: Path) -> None:
    shown = train(tmp_path, corpus, "trainer.log_every_n_steps=1", "+tag='a b'")
    first = only_run(tmp_path).rename(tmp_path / "first")
    (command,) = re.findall(r"^go on with  (.*)$", shown, re.MULTILINE)
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", str(ROOT / "recipes" / "train.py"))
    assert arguments.pop() == f"ckpt_path={tmp_path}/outputs/{RUN_ID}/checkpoints/step-3.ckpt"
    shown = shown_by(2, "train.py", [*arguments, f"ckpt_path={first}/checkpoints/step-3.ckpt"], tmp_path)
    second = only_run(tmp_path)
    assert set(logged(first, "train/loss")) == {0, 1, 2}
    assert set(logged(second, "train/loss")) == {3, 4, 5}
    assert (second / "checkpoints" / "step-6.ckpt").exists()
    assert f"ckpt_path={second}/checkpoints/step-6.ckpt" in shown


@pytest.mark.slow
def test_told_to_stop_all_processes_end_and_tell_how_to_go_on(tmp_path: Path, corpus: Path) -> None:
    """The first process is told, as by its user; Lightning's launcher has started the other."""
    script = [sys.executable, str(ROOT / "recipes" / "train.py"), *SMALL, f"data.path={corpus}", "trainer.devices=2"]
    with reserved_port() as port:
        env = os.environ | {"LIGHTNING_MICS_CACHE": str(tmp_path / "cache"), "MASTER_PORT": str(port)}
        command = [*script, "trainer.max_steps=1000000", "callbacks.progress.every=1"]
        process = subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE)
        assert process.stdout is not None
        begun = any(line.startswith("step ") for line in process.stdout)
        process.terminate()
        shown, _ = process.communicate(timeout=900)  # the end of what both processes show, hence of both
    assert begun and process.returncode == 143, shown
    last = only_run(tmp_path) / "checkpoints" / "last.ckpt"
    assert last.is_dir()
    assert re.search(r"^stopped     by a signal after step \d+/1000000$", shown, re.MULTILINE)
    assert re.search(rf"^go on with  python .* trainer.max_steps=1000000 ckpt_path={last}$", shown, re.MULTILINE)


def test_failure_is_in_the_ranks_log(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(AssertionError, match="is longer than the"):
        train(tmp_path, corpus, "cluster.partition_size=1", "data.seq_len=1000000", ranks=1)
    assert "is longer than the" in (only_run(tmp_path) / "rank_0.log").read_text()
