"""Train a language model on text: the main job, `python recipes/train.py`.

Everything is made by Hydra from `conf/`, with the constructors that a Python user calls. Works from any directory,
under Lightning's launcher, torchrun and SLURM.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from hydra.utils import instantiate  # noqa: E402
from lightning.pytorch import Trainer, seed_everything  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.utilities.exceptions import SIGTERMException  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from recipes import launch  # noqa: E402
from recipes.callbacks import FinalCheckpoint, Learning, show, show_samples  # noqa: E402
from recipes.data import Objective, TextDataModule  # noqa: E402
from recipes.models import LanguageModel  # noqa: E402
from recipes.sampling import continue_text  # noqa: E402

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="train")
def job(cfg: DictConfig) -> None:
    """One run in one process."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        launch.refuse_sweep(cfg.trainer.devices, cfg.trainer.num_nodes)
    folder = Path(HydraConfig.get().runtime.output_dir)
    launch.log_to_files(folder, launch.process_rank(cfg.trainer.devices))
    try:
        train(cfg)
    except BaseException:
        log.info("stopped", exc_info=True)
        raise


def train(cfg: DictConfig) -> Trainer:
    """Fit, validate, let a causal model continue some text, and tell how to go on; also where a signal has stopped it.

    Args:
        cfg: as `conf/train.yaml` composes it.
    """
    seed_everything(cfg.seed, workers=True, verbose=False)
    data: TextDataModule = instantiate(cfg.data)
    model: LanguageModel = instantiate(cfg.model, _convert_="all")
    trainer = make_trainer(cfg)
    try:
        trainer.fit(model, data, ckpt_path=cfg.ckpt_path)
    except SIGTERMException:
        show(f"stopped     by a signal after step {trainer.global_step}/{trainer.max_steps}")
        tell_how_to_go_on(last_of(trainer), trainer.max_steps)
        raise
    if not any(isinstance(c, Learning) and c.validated_step == trainer.global_step for c in trainer.callbacks):
        trainer.validate(model, data, verbose=False)
    if model.objective is Objective.CAUSAL and cfg.sample.tokens:
        sample: Any = OmegaConf.to_object(cfg.sample)
        show_samples(continue_text(trainer, model, data, **sample, seed=cfg.seed))
    written = [c.path for c in trainer.callbacks if isinstance(c, FinalCheckpoint) and c.path is not None]
    tell_how_to_go_on(written[0] if written else cfg.ckpt_path, trainer.global_step + max(trainer.max_steps, 1))
    return trainer


def make_trainer(cfg: DictConfig) -> Trainer:
    """The Trainer of a configuration, with its strategy, loggers and callbacks."""
    return instantiate(cfg.trainer, _partial_=True, _convert_="all")(
        strategy=instantiate(cfg.strategy, _convert_="all"),
        logger=list(instantiate(cfg.logger, _convert_="all").values()),
        callbacks=list(instantiate(cfg.callbacks, _convert_="all").values()),
    )


def last_of(trainer: Trainer) -> str | None:
    """The checkpoint with which a stopped run ended, if it is of the kind that `ckpt_path="last"` finds."""
    return next((c.last_model_path for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), "") or None


def tell_how_to_go_on(checkpoint: str | Path | None, max_steps: int) -> None:
    """Show a checkpoint and the command that trains on from it, up to `max_steps` optimizer steps in all."""
    if checkpoint is None:
        return
    overrides = HydraConfig.get().overrides.task
    show(f"checkpoint  {checkpoint}")
    show(f"go on with  {launch.resume_command(Path(checkpoint), overrides, max_steps=max_steps)}")


if __name__ == "__main__":
    launch.return_freed_memory()
    launch.agree_on_run_id()
    job()
