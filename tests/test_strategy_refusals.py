"""What Lightning itself refuses for the strategy when a Trainer is made or given a module, without any process."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.trainer.connectors import accelerator_connector
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_mics import MiCSFabricStrategy, MiCSStrategy

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}


def test_a_notebook_is_told_to_run_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator_connector, "_IS_INTERACTIVE", True)
    with pytest.raises(MisconfigurationException, match="not compatible with an interactive environment"):
        pl.Trainer(strategy="mics", devices=2, **QUIET)


def test_a_compiled_module_is_told_of() -> None:
    run = pl.Trainer(strategy=MiCSStrategy(partition_size=1), devices=1, **QUIET)
    with pytest.raises(RuntimeError, match=r"Using a compiled model is incompatible with the current strategy"):
        run.fit(torch.compile(BoringModel()))  # type: ignore[arg-type]


def test_what_is_to_write_checkpoints_is_refused() -> None:
    trainer = pl.Trainer(strategy=MiCSStrategy(partition_size=1), devices=1, plugins=AsyncCheckpointIO(), **QUIET)
    with pytest.raises(ValueError, match=r"plugins=AsyncCheckpointIO: .* MiCSStrategy\(async_save=True\)"):
        trainer.fit(BoringModel())
    fabric = Fabric(
        accelerator="cpu", strategy=MiCSFabricStrategy(partition_size=1), devices=1, plugins=AsyncCheckpointIO()
    )
    with pytest.raises(ValueError, match="plugins=AsyncCheckpointIO"):
        fabric.launch()
