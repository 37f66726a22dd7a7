"""DeepSpeed as a peer: ZeRO-2, ZeRO-3 and ZeRO-3 with a secondary copy of the parameters in each node (hpZ).

DeepSpeed is an extra of the benchmarks; it runs on CPU over gloo, on the process group that is there already.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benchmarks.model import build, loss_of, optimizer_of


def missing() -> str | None:
    """Why DeepSpeed cannot take part, or None."""
    if importlib.util.find_spec("deepspeed") is None:
        return 'DeepSpeed is not installed; pip install -c constraints.txt -e ".[benchmarks]"'
    return None


class DeepSpeed:
    """An engine of `deepspeed.initialize`, with its defaults but for what is asked.

    Args:
        window: micro-steps of an optimizer step; the engine counts them itself.
        zero: what goes into `zero_optimization`.
    """

    def __init__(self, window: int, **zero: Any) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.WARNING)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": window,
            "zero_optimization": zero,
            "gradient_clipping": 0.0,  # 1.0 unless it is told
            "zero_allow_untested_optimizer": True,
        }
        model = build()
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer_of(model.parameters()), config=config, dist_init_required=False
        )

    def step(self, batches: Sequence[Tensor]) -> float:
        total = 0.0
        for ids in batches:
            loss = loss_of(self.engine, ids)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.item()
        return total / len(batches)

    def close(self) -> None:
        self.engine.destroy()
