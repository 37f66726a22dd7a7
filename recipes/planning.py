"""What the planner is told of a training: the network that the configuration describes, and a batch of its samples."""

from __future__ import annotations

import torch

from lightning_mics.offload import Offload
from lightning_mics.optimizer_shards import OptimizerState
from lightning_mics.planner.plan import Workload, token_batches
from lightning_mics.precision import Precision
from recipes.models import LanguageModel, build


def workload(
    model: LanguageModel,
    *,
    seq_len: int,
    precision: str = "32-true",
    activation_checkpointing: bool = False,
    optimizer_state: OptimizerState | str = OptimizerState.PARTITION,
    offload: Offload | str | None = None,
) -> Workload:
    """A training of `model` by AdamW, on the meta device.

    Args:
        model: as the Trainer gets it; its network is built here, and not in it.
        seq_len: tokens of a sample.
        precision: the Trainer's: "32-true", "bf16-mixed" or "16-mixed".
        activation_checkpointing: as the strategy's.
        optimizer_state: as the strategy's.
        offload: as the strategy's.

    Raises:
        ValueError: for a precision, an `optimizer_state` or an `offload` that there is not.
    """
    over = OptimizerState.parse(optimizer_state, "optimizer_state")
    with torch.device("meta"):
        network = build(model.config, model.objective)

    return Workload(
        network,
        token_batches(seq_len),
        precision=Precision.of_trainer(precision),
        optimizer_state=over,
        activation_checkpointing=activation_checkpointing,
        offload=Offload.of(offload, over),
    )
