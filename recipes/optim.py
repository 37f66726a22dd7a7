"""The optimizer and its schedule: AdamW without decay on biases and norms, linear warmup, cosine.

Both are plain functions whose first arguments are what only the training loop knows; the configuration fills in the
rest.
"""

from __future__ import annotations

import math
from functools import partial

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR


def adamw(
    module: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    fused: bool = True,
) -> AdamW:
    """AdamW over the trainable parameters of `module`; those with fewer than two dims do not decay.

    Args:
        module: what to train, sharded or not.
        lr: learning rate at the end of the warmup.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of matrices and embeddings.
        fused: one kernel for the whole step, where the parameters' device has it.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    has_kernel = all(p.device.type in ("cpu", "cuda") for p in trainable)
    return AdamW(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=(betas[0], betas[1]),
        eps=eps,
        fused=fused and has_kernel,
    )


def warmup_cosine(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.05, floor: float = 0.1) -> LambdaLR:
    """Linear warmup to the optimizer's learning rate, then half a cosine down to `floor` of it.

    Args:
        optimizer: whose learning rate is scheduled.
        total_steps: optimizer steps of the whole run.
        warmup: share of the steps that warm up, in [0, 1).
        floor: share of the learning rate that is left at the last step, in [0, 1].
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup={warmup} is not a share of the steps; choose one in [0, 1)")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor={floor} is not a share of the learning rate; choose one in [0, 1]")
    return LambdaLR(optimizer, partial(_share, total=total_steps, rising=int(warmup * total_steps), floor=floor))


def _share(step: int, *, total: int, rising: int, floor: float) -> float:
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = min(1.0, (step - rising) / max(1, total - rising))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
