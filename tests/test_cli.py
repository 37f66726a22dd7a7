"""`mics` as it is started: by torchrun, by SLURM, and by someone who forgot both."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lightning_mics import MiCSStrategy
from lightning_mics.network import Network
from lightning_mics.version import __version__
from mics_tools.cli import app
from tests.distributed.ranks import begun
from tests.ports import reserved_port

OPTIONS = ["probe", "--device", "cpu", "--output", "network.json"]
IN_FEWER_ROUNDS = """
import runpy

from lightning_mics import probe
from lightning_mics.planner import measured, measured_host

probe._ROUNDS = measured._ROUNDS = measured_host._STEPS = 1
measured._SECONDS_OF_A_SAMPLE, measured._SECONDS_BUSY = 0.002, 0.01
runpy.run_module("lightning_mics", run_name="__main__")
"""


WITHOUT_HOSTS = "from lightning_mics import probe_command\nprobe_command.measure_hosts = lambda *_: {}\n"


def _script(folder: Path, before: str = "") -> str:
    script = folder / "probe.py"
    script.write_text(before + IN_FEWER_ROUNDS)
    return str(script)


def _by_torchrun(folder: Path) -> str:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*start, _script(folder), *OPTIONS], cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def _task(script: str, env: dict[str, str]) -> None:
    """What `srun` starts, in a process that has imported all already."""
    folder = Path(script).parent
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = [script, *OPTIONS]
    with (folder / f"said {env['SLURM_PROCID']}").open("w") as said, redirect_stdout(said):
        runpy.run_path(script, run_name="__main__")


def _by_slurm(folder: Path) -> str:
    job = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_JOB_NAME": "probe",
        "SLURM_JOB_ID": "7",
        "SLURM_NODELIST": "127.0.0.1",
    }
    job |= {"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0", "GLOO_SOCKET_IFNAME": "lo"}
    with reserved_port() as port:
        job["MASTER_PORT"] = str(port)
        tasks = [begun(_task, _script(folder, WITHOUT_HOSTS), job | {"SLURM_PROCID": rank}) for rank in "01"]
        for task in tasks:
            task.join(900)
    said = "".join((folder / f"said {rank}").read_text() for rank in "01")
    assert [task.exitcode for task in tasks] == [0, 0], said
    return said


@pytest.mark.parametrize(
    ("launch", "measured"), [pytest.param(_by_torchrun, "intra", marks=pytest.mark.slow), (_by_slurm, "inter")]
)
def test_the_probe_writes_a_file_that_names_no_machine(
    tmp_path: Path, launch: Callable[[Path], str], measured: str
) -> None:
    said = launch(tmp_path)
    assert said.count("written to network.json") == 1
    network = Network.load(tmp_path / "network.json")
    assert {"intra": network.intra, "inter": network.inter}[measured].samples
    text = (tmp_path / "network.json").read_text()
    assert __version__ in text and torch.__version__ in text
    assert socket.gethostname() not in text and "127.0.0.1" not in text


def test_the_probe_alone_says_how_to_start_it() -> None:
    result = CliRunner().invoke(app, ["probe"])
    assert result.exit_code == 2 and "start it on every rank: torchrun" in " ".join(result.output.split())


def test_the_strategy_reads_the_file_when_it_is_made(tmp_path: Path) -> None:
    Network.default(2).save(tmp_path / "network.json")
    MiCSStrategy(network=tmp_path / "network.json")
    with pytest.raises(FileNotFoundError, match=r"network='.*nowhere\.json': there is no such file; write it with"):
        MiCSStrategy(network=str(tmp_path / "nowhere.json"))


def test_help_names_the_commands() -> None:
    assert "probe" in CliRunner().invoke(app, ["--help"]).output
