"""The configuration as the command line composes it, without running anything."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"


def composed(*overrides: str) -> DictConfig:
    """`conf/train.yaml` with overrides, Hydra's own node left out."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides))


def options(group: str) -> list[str]:
    """The options of a group of `conf/`."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))
