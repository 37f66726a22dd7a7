"""The README's commands do what it says. Training commands run in less than the short form, `experiment=smoke`.

`make train`, which starts its processes itself, is run by `.ci/run`, beside these.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import reserved_port
from tests.recipes.jobs import shown_by

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


def brief(folder: Path) -> list[str]:
    """Options of a training on little text, without samples."""
    (folder / "corpus.py").write_text("".join(f"def number_{n}(x):\n    return x + {n}\n\n\n" for n in range(2000)))
    text = [f"data.path={folder}/corpus.py", "data.vocab_size=300", "data.val_fraction=0.3", "sample.tokens=0"]
    return ["experiment=smoke", "trainer.max_steps=2", *text, f"run_dir={folder}/run"]


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


def test_help_lists_groups_and_models(tmp_path: Path) -> None:
    said = shown_by(1, "train.py", ["--help"], tmp_path)
    assert "gpt_175b" in said and "strategy" in said


@pytest.mark.parametrize("command", [command for command in TRAININGS if command.startswith("python ")])
def test_trainings_run(command: str, tmp_path: Path) -> None:
    _, script, *overrides = command.split()
    shown = shown_by(4, Path(script).name, [*overrides, *brief(tmp_path)], tmp_path)
    assert "go on with  python " in shown
    assert (tmp_path / "run").is_dir()


@pytest.mark.slow
def test_torchrun_starts_the_training(tmp_path: Path) -> None:
    (command,) = (command for command in TRAININGS if not command.startswith("python "))
    assert command.startswith("torchrun ")
    shown = run([*command.split(), *brief(tmp_path)], ROOT)
    assert "go on with  torchrun --standalone --nproc-per-node 4 recipes/train.py " in shown
    assert (tmp_path / "run").is_dir()
