"""Language models: BERT, RoBERTa and GPT-2 from their `transformers` configurations, ready for a Trainer.

One LightningModule serves both objectives. The network is built in `configure_model`, on the meta device where the
strategy materialises it shard by shard, so that no process ever holds a whole model that is to be sharded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig
from typing_extensions import override

from lightning_mics import MiCSStrategy
from recipes.data import Objective
from recipes.sampling import Prompts, continued

_BUILDERS: dict[Objective, Any] = {
    Objective.CAUSAL: AutoModelForCausalLM,
    Objective.MASKED: AutoModelForMaskedLM,
}
# RoBERTa counts positions from its padding id + 1.
_UNUSED_POSITIONS = {"roberta": 2}


def grown(config: PreTrainedConfig, *, seq_len: int, vocab_size: int) -> PreTrainedConfig:
    """A copy of `config` whose position and token embeddings are at least as large as the data need.

    A published shape stays what it is on shorter sequences and smaller vocabularies.

    Args:
        config: of the model.
        seq_len: tokens of a sample.
        vocab_size: entries of the tokenizer.
    """
    config = copy.deepcopy(config)
    positions = seq_len + _UNUSED_POSITIONS.get(config.model_type, 0)
    config.max_position_embeddings = max(config.max_position_embeddings, positions)
    config.vocab_size = max(config.vocab_size, vocab_size)
    return config


def build(config: PreTrainedConfig, objective: Objective) -> nn.Module:
    """The network of `config` with the head of `objective` and torch's scaled dot-product attention.

    It is built on the device that is current, the meta device included.
    """
    network: Any = _BUILDERS[objective].from_config(config, attn_implementation="sdpa")
    if objective is Objective.CAUSAL:
        # transformers looks its loss up by the class's name, does not find GPT-2's, and warns on every rank.
        network.loss_type = "ForCausalLM"
    return cast(nn.Module, network)


class LanguageModel(LightningModule):
    """Trains a `transformers` model on causal or masked language modelling.

    Args:
        config: of the model, e.g. `transformers.GPT2Config()`.
        objective: "causal" or "masked".
        optimizer: makes an optimizer of a module and `fused`, e.g. `functools.partial(adamw, lr=1e-3)`.
        schedule: makes a scheduler of an optimizer and the number of steps, e.g. `warmup_cosine`.
        seq_len: tokens of a sample; the model's positions grow to it.
        vocab_size: entries of the tokenizer; the model's vocabulary grows to it.

    Raises:
        ValueError: if `objective` is unknown.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        objective: Objective | str,
        optimizer: Callable[..., Optimizer],
        schedule: Callable[[Optimizer, int], LambdaLR],
        *,
        seq_len: int,
        vocab_size: int,
    ) -> None:
        super().__init__()
        if objective not in list(Objective):
            raise ValueError(f"objective={objective!r} is unknown; choose one of {', '.join(Objective)}")
        self.objective = Objective(objective)
        self.config = grown(config, seq_len=seq_len, vocab_size=vocab_size)
        self.network: nn.Module | None = None
        self._make_optimizer = optimizer
        self._make_schedule = schedule

    @override
    def configure_model(self) -> None:
        if self.network is not None:
            return
        with self.trainer.init_module(empty_init=isinstance(self.trainer.strategy, MiCSStrategy)):
            self.network = build(self.config, self.objective)

    @override
    def forward(self, **batch: Tensor) -> Any:
        """Loss (scalar, nats a token) and logits of shape (batch, seq_len, vocab_size).

        Args:
            batch: `input_ids` and, for the loss, `labels`; both int64 of shape (batch, seq_len).
        """
        assert self.network is not None, "configure_model() builds the network"
        return self.network(**batch)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self(**batch).loss
        self.log("train/loss", loss.detach())
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self(**batch).loss, sync_dist=True, batch_size=len(batch["input_ids"]))

    @override
    def predict_step(self, batch: Prompts, batch_idx: int) -> Tensor:
        """Continue prompts; see `recipes.sampling.continued`."""
        return continued(lambda ids: self(input_ids=ids).logits, batch)

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        # Lightning refuses to clip the gradients of a fused optimizer under its mixed precision.
        fused = not isinstance(self.trainer.precision_plugin, MixedPrecision)
        optimizer = self._make_optimizer(self, fused=fused)
        scheduler = self._make_schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
