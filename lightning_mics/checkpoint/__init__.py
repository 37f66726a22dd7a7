"""Checkpoints: sharded, exact, and readable at another number of ranks."""

from lightning_mics.checkpoint.directory import Checkpoint
from lightning_mics.checkpoint.optimizer import optimizer_state_by_name
from lightning_mics.checkpoint.rng import TrainingRng, get_rng_state, set_rng_state
from lightning_mics.checkpoint.single_file import SingleFile, consolidate, load_whole_state_dict

__all__ = [
    "Checkpoint",
    "SingleFile",
    "TrainingRng",
    "consolidate",
    "get_rng_state",
    "load_whole_state_dict",
    "optimizer_state_by_name",
    "set_rng_state",
]
