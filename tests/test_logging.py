"""Lightning's messages come from the logger of the package in use, whatever this one imports."""

from __future__ import annotations

import subprocess
import sys

import pytest
from lightning_utilities.core import rank_zero

from lightning_mics import MiCSStrategy
from lightning_mics.strategy import PytorchLightningMiCSStrategy


def _named() -> str:
    return rank_zero.log.name


def test_a_strategy_of_either_package_has_its_logger() -> None:
    PytorchLightningMiCSStrategy()
    assert _named() == "pytorch_lightning.utilities.rank_zero"
    MiCSStrategy()
    assert _named() == "lightning.pytorch.utilities.rank_zero"


@pytest.mark.slow
@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_importing_changes_no_logger(package: str) -> None:
    name = "from lightning_utilities.core import rank_zero; print(rank_zero.log.name)"
    script = f"import {package}; {name}; import lightning_mics; {name}"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after = ran.stdout.split()
    assert before == after
