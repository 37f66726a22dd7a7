"""Accelerate's own script, which `accelerate test` runs, with MiCSAccelerator in the place of Accelerator.

    accelerate launch --config_file FILE tests/distributed/accelerate_self_test.py PARTITION_SIZE

Its model has two numbers, which have no rows to shard; here they have one each. It takes it that training in bf16
changes none of their bits, as autocast converts nothing in it; so parameters travel in fp32.
"""

from __future__ import annotations

import runpy
import sys
from functools import partial
from typing import Any

import accelerate
import torch
from accelerate import test_utils
from torch import nn

from lightning_mics.accelerate import MiCSAccelerator


class Line(test_utils.RegressionModel):  # type: ignore[misc]
    """a x + b"""

    def __init__(self, a: float = 0, b: float = 0) -> None:
        super().__init__(a, b)
        self.a, self.b = nn.Parameter(torch.tensor([float(a)])), nn.Parameter(torch.tensor([float(b)]))


class Whole(MiCSAccelerator):
    """The script compares what it unwraps with a model that is not sharded."""

    def unwrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.topology.partition_size == 1:
            return super().unwrap_model(model, *args, **kwargs)
        states = [self.get_state_dict(model)]
        torch.distributed.broadcast_object_list(states)
        whole = Line()
        whole.load_state_dict(states[0])
        return whole


if __name__ == "__main__":
    accelerate.Accelerator = partial(Whole, int(sys.argv[1]), param_dtype=torch.float32)
    test_utils.RegressionModel = Line
    runpy.run_module("accelerate.test_utils.scripts.test_script", run_name="__main__")
