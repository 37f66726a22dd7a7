"""What is trained on one GPU, how many operations that takes, and how many the GPU could do.

Model FLOPs: a token costs 6 N + c L S D floating-point operations. N parameters, each counted once, are multiplied and
added once forward and twice backward; L layers of width D attend over S tokens, with c = 12, or 6 where attention is
causal and half of it is masked (Chowdhery et al., arXiv 2204.02311, appendix B). What activation checkpointing computes
again is not counted. Model FLOPs utilization is that, times tokens a second, over the peak of the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DISTINCT_BATCHES = 4
"""Batches come round again, so that losses fall, and a way that trains differently shows."""

# Dense bf16 operations a second, from NVIDIA's data sheets (half of what they state with sparsity). The first name that
# is part of the device's counts.
_PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("H200", 989.4e12),
    ("A100", 312e12),
)


@dataclass(frozen=True)
class Case:
    """A model and its batches.

    Attributes:
        name: for people.
        family: of the architecture; "gpt2" attends causally.
        layers, width, heads, vocabulary: of the model; its feed-forward layers are four times as wide.
        tokens: of a sequence.
        batch: sequences in an optimizer step.
        checkpointing: whether each layer's forward is computed again in backward.
    """

    name: str
    family: Literal["bert", "gpt2"]
    layers: int
    width: int
    heads: int
    vocabulary: int
    tokens: int
    batch: int
    checkpointing: bool = False

    def build(self, device: torch.device) -> nn.Module:
        """The model in bf16 on `device`, with the same values whenever it is built there; no dropout."""
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

        auto = AutoModelForCausalLM if self.family == "gpt2" else AutoModelForMaskedLM
        torch.manual_seed(0)
        with device:
            model = cast(nn.Module, auto.from_config(self._config(), attn_implementation="sdpa"))
        model.loss_type = "ForCausalLM" if self.family == "gpt2" else "ForMaskedLM"  # type: ignore[assignment]
        if self.checkpointing:
            for layer in self.layers_of(model):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        return model.to(torch.bfloat16).train()

    def layers_of(self, model: nn.Module) -> list[nn.Module]:
        """The repeated layers of a model that was built here."""
        return [*model.get_submodule("transformer.h" if self.family == "gpt2" else "bert.encoder.layer").children()]

    def _config(self) -> Any:
        from transformers import BertConfig, GPT2Config

        if self.family == "gpt2":
            return GPT2Config(
                vocab_size=self.vocabulary,
                n_positions=self.tokens,
                n_embd=self.width,
                n_layer=self.layers,
                n_head=self.heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        return BertConfig(
            vocab_size=self.vocabulary,
            max_position_embeddings=self.tokens,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=None,
        )

    def batches(self, device: torch.device) -> list[Tensor]:
        """`DISTINCT_BATCHES` int64 tensors of shape (batch, tokens) on `device`; a label is the token itself."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.tokens)
        return [torch.randint(self.vocabulary, shape, generator=generator).to(device) for _ in range(DISTINCT_BATCHES)]

    def flops(self, parameters: int) -> float:
        """Model FLOPs of an optimizer step, for a model of so many parameters."""
        attention = (6 if self.family == "gpt2" else 12) * self.layers * self.tokens * self.width
        return (6.0 * parameters + attention) * self.batch * self.tokens


def loss_of(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """Mean cross entropy, a scalar in nats."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations a second of a GPU, by its name; None if it is not known here."""
    return next((peak for name, peak in _PEAKS if name in device_name), None)


_BERT_LARGE = partial(Case, family="bert", layers=24, width=1024, heads=16, vocabulary=30522, tokens=512)
_GPT2_XL = partial(
    Case, family="gpt2", layers=48, width=1600, heads=25, vocabulary=50257, tokens=1024, checkpointing=True
)
_TINY = {"layers": 2, "width": 32, "heads": 2, "vocabulary": 61, "tokens": 16, "batch": 2}

CASES = {
    case.name: case
    for case in (
        _BERT_LARGE("bert-large", batch=64),
        _BERT_LARGE("bert-large, 1 sequence", batch=1),
        _GPT2_XL("gpt2-xl", batch=16),
        _GPT2_XL("gpt2-xl, 1 sequence", batch=1),
    )
}
"""With many sequences the GPU is the limit, with one the host."""

TINY = {
    case.name: case
    for case in (Case("tiny bert", "bert", **_TINY), Case("tiny gpt2", "gpt2", **_TINY, checkpointing=True))  # type: ignore[arg-type]
}
"""To try the command out without a GPU."""
