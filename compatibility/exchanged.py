"""`MiCSAccelerator` in the place of `accelerate.Accelerator`, for scripts that know nothing of it.

What a script imports by that name after `exchange` is ours; the script itself stays as it is on disk.
"""

from __future__ import annotations

from typing import Any

import accelerate
import torch

from lightning_mics.accelerate import MiCSAccelerator
from lightning_mics.topology import PartitionSize


class ExchangedAccelerator(MiCSAccelerator):
    """Takes what Accelerate's own takes, and nothing else.

    Accelerate's scripts have it that training in bf16 changes none of their model's bits, as autocast converts nothing
    in it; so parameters travel in fp32.
    """

    exchanged_partition_size: PartitionSize = "node"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(self.exchanged_partition_size, param_dtype=torch.float32, **kwargs)


def exchange(partition_size: PartitionSize) -> None:
    """Let `Accelerator` be ours wherever it is imported from now on, with this partition size."""
    ExchangedAccelerator.exchanged_partition_size = partition_size
    accelerate.Accelerator = ExchangedAccelerator
    accelerate.accelerator.Accelerator = ExchangedAccelerator
