"""Checkpoints: sharded, exact, verified, and readable at another number of ranks."""

from lightning_mics.checkpoint.directory import Checkpoint
from lightning_mics.checkpoint.export import export_hugging_face
from lightning_mics.checkpoint.optimizer import number_parameters, optimizer_state_by_name
from lightning_mics.checkpoint.owner import SaverOwner
from lightning_mics.checkpoint.pieces import Writers
from lightning_mics.checkpoint.rng import TrainingRng, get_rng_state, set_rng_state
from lightning_mics.checkpoint.saver import Saver
from lightning_mics.checkpoint.single_file import (
    SingleFile,
    consolidate,
    is_remote,
    load_whole_optimizer_state,
    load_whole_state_dict,
    part_of,
)
from lightning_mics.checkpoint.snapshot import Snapshot
from lightning_mics.checkpoint.verification import Verify
from lightning_mics.checkpoint.whole import whole_state_dict
from mics_tools.manifest import DamagedCheckpoint, Manifest

__all__ = [
    "Checkpoint",
    "DamagedCheckpoint",
    "Manifest",
    "Saver",
    "SaverOwner",
    "SingleFile",
    "Snapshot",
    "TrainingRng",
    "Verify",
    "Writers",
    "consolidate",
    "export_hugging_face",
    "get_rng_state",
    "is_remote",
    "load_whole_optimizer_state",
    "load_whole_state_dict",
    "number_parameters",
    "optimizer_state_by_name",
    "part_of",
    "set_rng_state",
    "whole_state_dict",
]
