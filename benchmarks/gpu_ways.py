"""The ways to train one model on one device, behind the same two methods.

All compute in bf16 from bf16 parameters (Lightning's "bf16-true"), with one fused AdamW: under autocast they would
round in different places. Done so, they differ in nothing but what stands around the model, and their losses are equal.
Gradients are cleared between forward and backward, as a Trainer does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW
from typing_extensions import override

from benchmarks.gpu_cases import Case, loss_of
from benchmarks.stepped import SteppedTrainer
from lightning_mics import MiCSStrategy

_LEARNING_RATE = 1e-4


class Way(Protocol):
    """A model and its optimizer.

    Attributes:
        losses: scalars on the device, one an optimizer step.
    """

    losses: list[Tensor]

    def turn(self, batches: Sequence[Tensor]) -> None:
        """An optimizer step on each batch; returns when the last is under way on the device."""
        ...

    def close(self) -> None:
        """Give back what outlives the object."""
        ...


class Plain:
    """A loop in plain PyTorch."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.losses: list[Tensor] = []
        self._model = case.build(device)
        self._optimizer = _optimizer_of(self._model)

    def turn(self, batches: Sequence[Tensor]) -> None:
        for ids in batches:
            loss = loss_of(self._model, ids)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self.losses.append(loss.detach())

    def close(self) -> None:
        pass


class _Module(LightningModule):
    def __init__(self, network: nn.Module, losses: list[Tensor]) -> None:
        super().__init__()
        self.network = network
        self._losses = losses

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = loss_of(self.network, batch)
        self._losses.append(loss.detach())
        return loss

    @override
    def configure_optimizers(self) -> AdamW:
        return _optimizer_of(self)


class Trained:
    """A Lightning Trainer with a strategy."""

    def __init__(self, strategy: Any, case: Case, device: torch.device) -> None:
        self.losses: list[Tensor] = []
        self._trainer = SteppedTrainer(
            _Module(case.build(device), self.losses),
            accelerator="cpu" if device.type == "cpu" else "gpu",
            devices=1 if device.type == "cpu" else [device.index or 0],
            strategy=strategy,
            precision="bf16-true",
        )

    def turn(self, batches: Sequence[Tensor]) -> None:
        self._trainer.turn(batches)

    def close(self) -> None:
        self._trainer.close()


def _optimizer_of(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=_LEARNING_RATE, fused=True)


def _lightning(case: Case, device: torch.device) -> Way:
    return Trained("auto", case, device)  # SingleDeviceStrategy, for one device


def _mics(case: Case, device: torch.device) -> Way:
    return Trained(MiCSStrategy(), case, device)


PLAIN = "plain PyTorch"
WAYS: dict[str, Callable[[Case, torch.device], Way]] = {
    PLAIN: Plain,
    "Lightning, one device": _lightning,
    "lightning-mics, n = 1": _mics,
}
