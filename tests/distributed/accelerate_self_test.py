"""Accelerate's own script, which `accelerate test` runs, with MiCSAccelerator in the place of Accelerator.

    accelerate launch --config_file FILE tests/distributed/accelerate_self_test.py PARTITION_SIZE

It takes it that training in bf16 changes none of its model's bits, as autocast converts nothing in it; so parameters
travel in fp32.
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


class Whole(MiCSAccelerator):
    """The script compares what it unwraps with a model that is not sharded."""

    def unwrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.topology.partition_size == 1:
            return super().unwrap_model(model, *args, **kwargs)
        states = [self.get_state_dict(model)]
        torch.distributed.broadcast_object_list(states)
        whole = test_utils.RegressionModel()
        whole.load_state_dict(states[0])
        return whole


if __name__ == "__main__":
    accelerate.Accelerator = partial(Whole, int(sys.argv[1]), param_dtype=torch.float32)
    runpy.run_module("accelerate.test_utils.scripts.test_script", run_name="__main__")
