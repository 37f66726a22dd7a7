"""The README's commands do what it says. Training commands run in less than the short form, `experiment=smoke`.

`make train` itself is run by `.ci/run`, beside these.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import reserved_port

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
TRAININGS = [c for c in COMMANDS if "recipes/train.py" in c and "--help" not in c]

MODEL = """
import torch
from lightning.pytorch import LightningModule
from torch import nn

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    def training_step(self, batch, batch_idx):
        return self.layers(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

model, data = Model(), torch.utils.data.DataLoader(torch.randn(64, 8), batch_size=4)
"""


def run(command: list[str], cwd: Path) -> str:
    bin_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with reserved_port() as port:
        env = {**os.environ, "PATH": bin_first, "GLOO_SOCKET_IFNAME": "lo", "MASTER_PORT": str(port)}
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_readme_has_the_commands_that_are_tested() -> None:
    assert {"make train", "make test", "python recipes/train.py --help"} <= set(COMMANDS)
    assert len(COMMANDS) == len(TRAININGS) + 3


def test_your_own_trainer(tmp_path: Path) -> None:
    (snippet,) = blocks("python")
    quick = 'accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_checkpointing=False, '
    script = MODEL + snippet.replace("Trainer(", "Trainer(" + quick)
    script += "\nprint(trainer.strategy.topology, trainer.global_step)\n"
    (tmp_path / "mine.py").write_text(script)
    said = run([sys.executable, "mine.py"], tmp_path)
    assert "2 ranks on 1 node of 2: 1 partition group of 2 2" in said  # 8 batches a rank, a step every 4th


def test_make_knows_both_commands() -> None:
    for target, runs in (("train", "recipes/train.py"), ("test", "-m pytest")):
        assert runs in run(["make", "--dry-run", target], ROOT)


def test_help_lists_groups_and_models() -> None:
    said = run([sys.executable, "recipes/train.py", "--help"], ROOT)
    assert "gpt_175b" in said and "strategy" in said


@pytest.mark.slow
@pytest.mark.parametrize("command", TRAININGS)
def test_trainings_run(command: str, tmp_path: Path) -> None:
    options = ["experiment=smoke", "trainer.max_steps=5", "trainer.val_check_interval=20", f"run_dir={tmp_path}/run"]
    said = run([*command.split(), *options], ROOT)
    assert "go on with" in said
    assert (tmp_path / "run").is_dir()
