"""Checkpoints: sharded, exact, and readable at another number of ranks."""

from lightning_mics.checkpoint.directory import Checkpoint
from lightning_mics.checkpoint.optimizer import optimizer_state_by_name
from lightning_mics.checkpoint.rng import TrainingRng, get_rng_state, set_rng_state

__all__ = ["Checkpoint", "TrainingRng", "get_rng_state", "optimizer_state_by_name", "set_rng_state"]
