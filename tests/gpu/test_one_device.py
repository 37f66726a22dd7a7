"""What tests/distributed shows on CPU, on one accelerator: its ranks share the device, and each is a node of its own.

NCCL wants a device for each process, so that several ranks send by gloo, through the host's memory; one alone has NCCL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import (
    test_accelerate,
    test_accelerate_checkpoints,
    test_accelerate_planning,
    test_compile,
    test_fabric,
    test_fabric_checkpoints,
    test_hugging_face_trainer,
    test_lightning_features,
    test_models,
    test_offload,
    test_optimization,
    test_optimizer_shards_in_trainer,
    test_planning,
    test_resume,
    test_trainer,
    test_weight_averaging,
    test_windows,
)
from tests.distributed.ranks import DEVICE, run_ranks

CASES: dict[str, tuple[Any, ...]] = {
    "a Trainer by itself": (1, test_trainer._one_process),
    "inference mode": (2, test_trainer._within_inference_mode, Path),
    "precisions": (2, test_trainer._precisions),
    "an overflow": (4, test_trainer._overflow),
    "rungs": (4, test_trainer._rungs),
    "windows": (4, test_windows._short_windows),
    "backwards that are skipped": (4, test_windows._skipped_backwards),
    "validation within windows": (4, test_windows._validation_between),
    "manual optimization": (4, test_optimization._manual),
    "several optimizers": (4, test_optimization._rivals),
    "frozen parameters": (4, test_optimization._frozen),
    "parameters without gradients": (4, test_optimization._unused),
    "optimizers": (4, test_lightning_features._optimizers, Path),
    "Muon": (2, test_lightning_features._muon),
    "loops": (4, test_lightning_features._loops),
    "an optimizer over all ranks, clipped": (4, test_optimizer_shards_in_trainer._clipped),
    "an optimizer over all ranks, saved": (4, test_optimizer_shards_in_trainer._checkpoints, Path),
    "weight averaging": (4, test_weight_averaging._averages),
    "weight averaging, resumed": (4, test_weight_averaging._resumes),
    "resumed in mid-epoch": (4, test_resume._mid_epoch, Path),
    "resumed at an epoch's end": (4, test_resume._epoch_end, Path),
    "offload": (4, test_offload._trains),
    "offload, resumed": (4, test_offload._resumes),
    "offload in other loops": (4, test_offload._other_loops),
    "compiled blocks": (2, test_compile._compiled, True, 1e-2, test_compile.OPTIONS[:2]),
    "plans": (4, test_planning._plans),
    "models": (4, test_models._differences, [*test_models.CASES]),
    "Fabric": (test_fabric.RANKS, test_fabric.numbers_of_ddp),
    "Fabric, windows": (test_fabric.RANKS, test_fabric.windows_of_ddp),
    "Fabric by itself": (1, test_fabric.alone),
    "Fabric's checkpoints": (test_fabric_checkpoints.RANKS, test_fabric_checkpoints.everything, str),
    "Accelerate": (4, test_accelerate._windows),
    "Accelerate, loops": (4, test_accelerate._loops),
    "Accelerate, variants": (4, test_accelerate._variants),
    "Accelerate's checkpoints": (4, test_accelerate_checkpoints._resumes, str),
    "Accelerate's plans": (4, test_accelerate_planning._plans),
    "Hugging Face's Trainer": (4, test_hugging_face_trainer._trains, str),
    "Hugging Face's Trainer, resumed": (4, test_hugging_face_trainer._resumes, str),
}
"""How many ranks do what, with which arguments; `Path` and `str` stand for a folder."""

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is at hand")


@pytest.mark.parametrize("case", CASES)
def test_holds_on_an_accelerator_as_well(case: str, tmp_path: Path) -> None:
    ranks, body, *args = CASES[case]
    given = [arg(tmp_path) if isinstance(arg, type) else arg for arg in args]
    found = run_ranks(ranks, body, *given, timeout=300, **{DEVICE: "cuda"})
    assert found in ([None] * ranks, [{}] * ranks)
