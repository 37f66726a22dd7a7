"""`MiCSAccelerator` in the place of `accelerate.Accelerator`, for scripts that know nothing of it.

What a script imports by that name after `exchange` is ours; the script itself stays as it is on disk.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import accelerate
import torch
from accelerate import test_utils
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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


def check_exchanged(script: ModuleType) -> None:
    """Raises:
    RuntimeError: if a script has come by Accelerate's own class, whose tests would say nothing of ours.
    """
    if getattr(script, "Accelerator", ExchangedAccelerator) is not ExchangedAccelerator:
        raise RuntimeError(f"{script.__name__} has another Accelerator than {ExchangedAccelerator.__name__}")


# -- a model that has something to shard -------------------------------------------------------------------------------


class RowsModel(nn.Module):
    """In the place of the scripts' own, whose two numbers have no rows and so stay whole on every rank."""

    def __init__(self, a: float = 0, b: float = 0, double_output: bool = False) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((4,), float(a)))
        self.b = nn.Parameter(torch.full((4,), float(b)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.a.mean() + self.b.mean()


class WholeTorch(ModuleType):
    """torch, but for `allclose`, which looks at whole tensors where it is given shards.

    Collective on the partition group; the scripts compare on every rank.
    """

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def allclose(self, left: Tensor, right: Tensor, **within: Any) -> bool:
        return torch.allclose(_whole(left), _whole(right), **within)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def give_rows() -> None:
    """Let the scripts' model be one with rows wherever it is imported from now on."""
    test_utils.RegressionModel = RowsModel


def compare_whole(script: ModuleType) -> None:
    """Let a script compare whole tensors."""
    script.torch = WholeTorch()  # type: ignore[attr-defined]
