"""An optimizer with state of its own kind, in 8 bits: trains shards as it trains whole tensors, saves and resumes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.ranks import run_ranks
from tests.distributed.toys import Batches, Toy, assert_same_losses, local, mics, seeded, trainer

pytest.importorskip("torchao", reason="needs torchao")


class Wide(Toy):
    """Shards of 64 x 128 values, which are kept in 8 bits, and smaller ones, which are not."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 128), nn.Linear(128, 3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(128, 128), nn.Tanh()) for _ in range(3))

    def configure_optimizers(self) -> Any:
        from torchao.optim import AdamW8bit

        return AdamW8bit(self.parameters(), lr=1e-2)


def _fit(ckpt_path: Any = None, max_epochs: int = 2, **options: Any) -> tuple[Any, Wide]:
    module = seeded(Wide)
    run = trainer(mics(**options), accumulate_grad_batches=2, enable_checkpointing=True, max_epochs=max_epochs)
    run.fit(module, Batches(4), ckpt_path=ckpt_path)
    return run, module


def _kinds(run: Any) -> list[str]:
    state = run.optimizers[0].state
    return [type(local(value)).__name__ for fields in state.values() for value in fields.values()]


def _trains_saves_and_resumes() -> None:
    torch.compiler.set_stance("force_eager")  # its step is compiled, for minutes
    run, whole = _fit()
    assert _kinds(run).count("OptimState8bit") == 2 * 3
    for offload in ("optimizer", "parameters"):
        assert_same_losses(_fit(offload=offload)[1].losses, whole.losses, offload)
    for saves, goes_on in ((None, {"partition_size": 1}), ("optimizer", {}), (None, {"offload": "parameters"})):
        first, _ = _fit(max_epochs=1, offload=saves)
        first.save_checkpoint("quantized.ckpt")
        after, module = _fit("quantized.ckpt", **goes_on)
        assert _kinds(after).count("OptimState8bit") == 2 * 3
        assert_same_losses(module.losses, whole.losses[4:], f"saved with {saves}, {goes_on}", rtol=0.02)


def test_8_bit_state_trains_saves_and_resumes() -> None:
    run_ranks(2, _trains_saves_and_resumes)
