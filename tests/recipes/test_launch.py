"""Launching: one name for a run, a log for each rank, no sweep under Lightning's launcher, the way to go on."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist
from hydra.core.override_parser.overrides_parser import OverridesParser

from recipes import launch
from tests.distributed.ranks import begun


@pytest.fixture(autouse=True)
def _no_run_id(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set, then deleted, so that what a test leaves in the environment is taken out again.
    monkeypatch.setenv(launch.RUN_ID, "")
    monkeypatch.delenv(launch.RUN_ID)


@pytest.fixture
def logs_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, shown = root.handlers[:], root.level, warnings.showwarning
    yield
    logging.captureWarnings(False)
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        if handler not in handlers:
            handler.close()
    root.handlers, root.level, warnings.showwarning = handlers, level, shown


def slurm(monkeypatch: pytest.MonkeyPatch, rank: int = 0) -> None:
    for name, value in {
        "SLURM_JOB_ID": "4321",
        "SLURM_STEP_ID": "2",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "8",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_PROCID": str(rank),
    }.items():
        monkeypatch.setenv(name, value)


def test_run_id_is_inherited() -> None:
    first = launch.agree_on_run_id()
    assert os.environ[launch.RUN_ID] == first
    os.environ[launch.RUN_ID] = "the parent's"
    assert launch.agree_on_run_id() == "the parent's"


def test_run_id_under_slurm_is_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch)
    assert launch.agree_on_run_id() == "slurm-4321.2"


def torchrun_worker(port: int, now: str, answer: Connection) -> None:
    os.environ.update(
        TORCHELASTIC_RUN_ID="none", TORCHELASTIC_USE_AGENT_STORE="True", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )

    class Clock(launch.datetime):  # type: ignore[name-defined, misc]
        @classmethod
        def now(cls, tz: object = None) -> launch.datetime:  # type: ignore[name-defined]
            return cls.fromisoformat(now)

    launch.datetime = Clock  # type: ignore[attr-defined]
    answer.send(launch.agree_on_run_id())


def test_run_id_under_torchrun_is_one_though_clocks_differ() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers, answer = Pipe(duplex=False)
    times = ["2030-01-01T12:00:59", "2030-01-01T12:01:00"]
    workers = [begun(torchrun_worker, store.port, now, answer) for now in times]
    given = {answers.recv() for _ in workers}
    for worker in workers:
        worker.join()
    assert len(given) == 1
    assert given <= {"2030-01-01_12-00-59", "2030-01-01_12-01-00"}


def test_rank_is_known_before_any_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.process_rank(4) == 0
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert launch.process_rank(4) == 3
    monkeypatch.setenv("NODE_RANK", "1")
    assert launch.process_rank(4) == 7
    slurm(monkeypatch, rank=5)
    assert launch.process_rank(4) == 5
    monkeypatch.setenv("RANK", "6")
    assert launch.process_rank(4) == 6


@pytest.mark.parametrize("devices", [4, "auto", -1])
def test_sweep_that_would_start_processes_is_refused(devices: int | str) -> None:
    with pytest.raises(SystemExit, match=r"every further process with this same command(.|\n)*torchrun --standalone"):
        launch.refuse_sweep(devices, 1)


def test_sweep_over_two_nodes_is_refused() -> None:
    with pytest.raises(SystemExit, match="--multirun cannot be used"):
        launch.refuse_sweep(1, 2)


def test_sweep_is_allowed_in_one_process_and_under_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.refuse_sweep(1, 1)
    slurm(monkeypatch)
    launch.refuse_sweep(4, 2)
    monkeypatch.delenv("SLURM_NTASKS")
    monkeypatch.setenv("LOCAL_RANK", "0")
    launch.refuse_sweep(4, 1)


@pytest.mark.usefixtures("logs_restored")
@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_has_its_log_and_rank_0_has_the_terminal(
    tmp_path: Path, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = launch.log_to_files(tmp_path, rank)
    assert path == tmp_path / f"rank_{rank}.log"
    logging.getLogger("lightning.pytorch.trainer").info("for the file")
    logging.getLogger("recipes").warning("for both")
    warnings.warn("a warning", stacklevel=1)
    assert all(text in path.read_text() for text in ("for the file", "for both", "a warning"))
    printed = capsys.readouterr().err
    assert "for the file" not in printed
    assert ("for both" in printed) == ("a warning" in printed) == (rank == 0)


def test_resume_command_keeps_the_overrides_and_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes/train.py", "ignored"])
    overrides = ["model=gpt2", "data.path='/my texts'", "trainer.max_steps=5", "ckpt_path=old.ckpt"]
    command = launch.resume_command(Path("out/step-5.ckpt"), overrides, max_steps=10, environment={})
    assert shlex.split(command) == [
        *("python", "recipes/train.py", "model=gpt2", "data.path='/my texts'"),
        *("trainer.max_steps=10", "ckpt_path=out/step-5.ckpt"),
    ]
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}
    command = launch.resume_command(Path("c"), [], max_steps=1, environment=torchrun)
    assert command.startswith("torchrun --standalone --nproc-per-node 8 recipes/train.py ")
    torchrun |= {"GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node0"}
    command = launch.resume_command(Path("c"), [], max_steps=1, environment=torchrun)
    assert command.startswith("torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0 ")
    assert launch.resume_command(Path("c"), [], max_steps=1, environment={"SLURM_PROCID": "0"}).startswith(
        "srun python"
    )


@pytest.mark.parametrize("path", ["out/step-5.ckpt", "out/lr=1e-3/my run/step-5.ckpt", "out/it's/step-5.ckpt"])
def test_hydra_reads_the_checkpoints_path_back(path: str) -> None:
    command = launch.resume_command(Path(path), [], max_steps=1, environment={})
    (override,) = OverridesParser.create().parse_overrides([shlex.split(command)[-1]])
    assert override.value() == path
