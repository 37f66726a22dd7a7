"""The configuration: every option composes, what it instantiates takes its arguments, and the help reads well."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_class, instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf

from lightning_mics import MiCSStrategy
from recipes.data import TextDataModule
from recipes.models import LanguageModel
from tests.recipes.composing import CONF, ROOT, composed, options
from tests.recipes.jobs import shown_by

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "experiment")
OPTIONS = [(group, option) for group in GROUPS for option in options(group)]


def targets(node: Any) -> Iterator[DictConfig]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node
        for key in node:
            if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
                yield from targets(node[key])


def test_the_groups_are_those_of_the_defaults() -> None:
    assert set(GROUPS) | {"experiment"} == {
        *("data", "optim", "model", "cluster", "strategy", "trainer", "logger", "callbacks", "experiment")
    }


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_into_existing_targets(group: str, option: str) -> None:
    cfg = composed(f"{group}={option}")
    found = [node["_target_"] for node in targets(cfg)]
    assert len(found) >= 4
    for target in found:
        module, _, name = target.rpartition(".")
        assert hasattr(__import__(module, fromlist=[name]), name), target


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_makes_model_and_strategy(experiment: str) -> None:
    cfg = composed(f"experiment={experiment}")
    assert isinstance(instantiate(cfg.model, _convert_="all"), LanguageModel)
    assert isinstance(instantiate(cfg.strategy, _convert_="all"), MiCSStrategy)


@pytest.mark.parametrize("strategy", options("strategy"))
def test_every_strategy_is_made_by_its_constructor(strategy: str) -> None:
    cfg = composed(f"strategy={strategy}").strategy
    made = instantiate(cfg, _convert_="all")
    assert type(made) is get_class(cfg["_target_"])
    assert isinstance(made, DDPStrategy if strategy == "ddp" else MiCSStrategy)


def test_the_default_is_four_processes_in_two_partition_groups() -> None:
    cfg = composed()
    trainer = instantiate(cfg.trainer, _partial_=True)(strategy=instantiate(cfg.strategy), logger=False)
    assert isinstance(trainer, Trainer)
    topology = trainer.strategy.topology
    assert (topology.world_size, topology.partition_size, topology.replicas) == (4, 2, 2)
    assert trainer.accumulate_grad_batches == 4


def test_processes_are_those_that_the_launcher_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    cfg = composed("cluster=gpu")
    assert (cfg.trainer.devices, cfg.trainer.num_nodes) == (8, 3)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.delenv("GROUP_WORLD_SIZE")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    monkeypatch.setenv("SLURM_NNODES", "2")
    cfg = composed("cluster=slurm")
    assert (cfg.trainer.devices, cfg.trainer.num_nodes) == (4, 2)


@pytest.mark.parametrize("data", options("data"))
@pytest.mark.parametrize(
    ("model", "objective", "seq_len"), [("bert_large", "masked", 512), ("gpt_175b", "causal", 2048)]
)
def test_the_model_says_what_its_data_are(data: str, model: str, objective: str, seq_len: int) -> None:
    cfg = composed(f"model={model}", f"data={data}")
    assert (cfg.data.objective, cfg.data.seq_len) == (objective, seq_len)
    assert instantiate(cfg.model, _convert_="all").config.max_position_embeddings == seq_len


def test_sequence_and_vocabulary_have_one_place() -> None:
    cfg = composed("model=gpt_tiny", "data.seq_len=300", "data.vocab_size=9000")
    model, data = instantiate(cfg.model, _convert_="all"), instantiate(cfg.data)
    assert isinstance(data, TextDataModule)
    assert (model.config.n_positions, model.config.vocab_size) == (300, 9000)
    assert (data.seq_len, data.vocab_size) == (300, 9000)


def test_optimizer_and_schedule_take_their_arguments() -> None:
    cfg = composed("optim.optimizer.lr=0.5", "optim.schedule.warmup=0.5")
    optimizer = instantiate(cfg.optim.optimizer)(instantiate_small())
    assert optimizer.param_groups[0]["lr"] == 0.5
    scheduler = instantiate(cfg.optim.schedule)(optimizer, 10)
    # Half of ten steps warm up, from a sixth.
    assert scheduler.get_last_lr()[0] == pytest.approx(0.5 / 6)


def instantiate_small() -> Any:
    from torch import nn

    return nn.Linear(2, 2)


def test_help_lists_groups_and_examples(tmp_path: Path) -> None:
    shown = shown_by(1, "train.py", ["--help"], tmp_path)
    assert "python recipes/train.py experiment=smoke" in shown
    for group in GROUPS:
        assert f"{group}: {', '.join(options(group))}" in shown
    assert not any(tmp_path.iterdir())


def test_cfg_job_prints_the_configuration_and_runs_nothing(tmp_path: Path) -> None:
    printed = OmegaConf.create(shown_by(1, "train.py", ["--cfg", "job", "model=bert_10b"], tmp_path))
    assert (printed.model.config.hidden_size, printed.model.config.num_hidden_layers) == (2560, 127)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_sweep_under_lightnings_launcher_starts_no_process(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), "--multirun", "seed=1,2"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert answer.returncode == 1
    assert "--multirun cannot be used with trainer.devices=4 under Lightning's launcher" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not list(tmp_path.rglob("rank_*.log"))
