"""Models as users have them, at toy size: a few thousand parameters each, no dropout, built anew from seed 0.

None knows anything of sharding. Each has a batch for every micro-step and rank, and a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, SEQ, WIDTH = 31, 8, 16

Batch = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model, and what it is trained on.

    Attributes:
        build: the module.
        batch: of a micro-step on a rank, from a generator of its own.
        loss: of the module on a batch.
        by_hand: whether DDP itself is wrong here, so that the reference averages gradients by hand.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator, int, int], Batch]
    loss: Callable[[Any, Batch], Tensor] = lambda model, batch: model(**batch).loss
    by_hand: bool = False

    def seeded(self) -> nn.Module:
        """The same values on every rank and in every call."""
        torch.manual_seed(0)
        return self.build()

    def of(self, rank: int, micro: int) -> Batch:
        """The batch of a micro-step on a rank."""
        return self.batch(torch.Generator().manual_seed(100 * micro + rank), rank, micro)


# -- transformers ------------------------------------------------------------------------------------------------------

_SMALL = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _tokens(generator: torch.Generator, rank: int, micro: int) -> Batch:
    tokens = torch.randint(4, VOCAB, (2, SEQ), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def _masked(generator: torch.Generator, rank: int, micro: int) -> Batch:
    tokens = torch.randint(4, VOCAB, (2, SEQ), generator=generator)
    masked = torch.rand(tokens.shape, generator=generator) < 0.3
    masked[:, 0] = True
    return {"input_ids": tokens.masked_fill(masked, 3), "labels": tokens.masked_fill(~masked, -100)}


def _gpt2() -> nn.Module:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_layer": 2, "n_embd": WIDTH, "n_head": 2, "vocab_size": VOCAB, "n_positions": SEQ}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, **_NO_TOKENS))


def _bert() -> nn.Module:
    sizes = _SMALL | {"vocab_size": VOCAB, "max_position_embeddings": SEQ}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **_NO_DROPOUT))


def _llama() -> nn.Module:
    sizes = _SMALL | {"num_key_value_heads": 1, "vocab_size": VOCAB, "max_position_embeddings": SEQ}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **_NO_TOKENS, tie_word_embeddings=False))


def _mixtral() -> nn.Module:
    """Eight experts and few tokens: most see none, and not the same ones on each rank."""
    experts = {"num_local_experts": 8, "num_experts_per_tok": 1, "output_router_logits": True}
    sizes = _SMALL | {"num_key_value_heads": 1, "vocab_size": VOCAB, "max_position_embeddings": SEQ}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **experts, **_NO_TOKENS))


def _t5() -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2, "vocab_size": VOCAB}
    config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def _vit() -> nn.Module:
    sizes = _SMALL | {"image_size": 8, "patch_size": 4, "num_labels": 3}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **_NO_DROPOUT))


def _whisper() -> nn.Module:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": WIDTH, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": VOCAB, "num_mel_bins": 6}
    lengths = {"max_source_positions": SEQ, "max_target_positions": SEQ}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
    config = transformers.WhisperConfig(**layers, **sizes, **lengths, **tokens, dropout=0.0)
    return transformers.WhisperForConditionalGeneration(config)


def _speech(generator: torch.Generator, rank: int, micro: int) -> Batch:
    labels = torch.randint(4, VOCAB, (2, 5), generator=generator)
    return {"input_features": torch.randn(2, 6, 2 * SEQ, generator=generator), "labels": labels}


def _images(generator: torch.Generator, rank: int, micro: int) -> Batch:
    pixels = torch.randn(3, 3, 8, 8, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(3, (3,), generator=generator)}


# -- others ------------------------------------------------------------------------------------------------------------


class ResNet(nn.Module):
    """Residual layers of two sizes with batch norm, whose running statistics are buffers."""

    class Layer(nn.Module):
        def __init__(self, channels: int, out: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels, out, 3, padding=1, stride=out // channels, bias=False)
            self.norm = nn.BatchNorm2d(out)
            self.shortcut = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.conv(x)) + self.shortcut(x))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.stages = nn.ModuleList(
            nn.Sequential(self.Layer(4 * 2 ** max(0, i - 1), 4 * 2**i), self.Layer(4 * 2**i, 4 * 2**i))
            for i in range(2)
        )
        self.leave = nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values)
        for stage in self.stages:
            x = stage(x)
        return self.leave(x.mean((2, 3)))


def _classified(model: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["pixel_values"]), batch["labels"])


def _regressed(model: Any, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


def _sequences(generator: torch.Generator, rank: int, micro: int) -> Batch:
    x = torch.randn(2, SEQ, WIDTH, generator=generator)
    return {"x": x, "y": torch.tanh(x.cumsum(1))}


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class LSTM(nn.Module):
    """No block at all: the layers of a recurrent network are parameters of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 10, num_layers=2, batch_first=True)
        self.leave = nn.Linear(10, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.lstm(x)[0])


class Layer(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Stack(nn.Module):
    """Linear in, `count` layers, linear out."""

    layer: type[nn.Module] = Layer

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(self.layer() for _ in range(count))
        self.leave = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)


class Gained(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * super().forward(x)


class Scaled(Stack):
    """Scalar parameters in the blocks and outside of them; one never gets a gradient."""

    layer = Gained

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.logit_scale.exp()


class Shared(Stack):
    """One weight in all blocks, one in two of them and outside; one block is there twice."""

    def __init__(self) -> None:
        super().__init__(4)
        for layer in self.layers:
            layer.linear.weight = self.layers[0].linear.weight
        self.layers[1].norm = self.layers[0].norm
        self.leave.bias = self.layers[2].linear.bias
        self.layers.append(self.layers[3])


class Differing(Stack):
    """Each rank goes another way in each micro-step, over blocks and within them."""

    def forward(self, x: Tensor, path: list[int]) -> Tensor:
        x = self.enter(x)
        for index in path:
            x = self.layers[index](x)
        return self.leave(x) if len(path) > 1 else x


def _ways(generator: torch.Generator, rank: int, micro: int) -> Batch:
    path = [index for index in range(3) if (rank + micro + index) % 4]
    return _sequences(generator, rank, micro) | {"path": path[: 1 if rank == 3 and micro == 3 else 3]}


class Twice(Stack):
    """Calls its second block again, and its first once more at the end."""

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.layers
        return self.leave(first(third(second(second(first(self.enter(x)))))))


class Mixture(Layer):
    """Of four experts each token takes one; those without a token do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.router = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = super().forward(x).flatten(0, 1)
        weight, chosen = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for index in chosen.unique().tolist():
            mine = chosen == index
            out[mine] = weight[mine, None] * self.experts[index](tokens[mine])
        return x + out.view_as(x)


class Experts(Stack):
    """Layers of experts."""

    layer = Mixture


CASES = {
    "gpt2": Case(_gpt2, _tokens),
    "bert": Case(_bert, _masked),
    "llama, untied": Case(_llama, _tokens),
    "t5": Case(_t5, _tokens),
    "vit": Case(_vit, _images),
    "mixtral": Case(_mixtral, _tokens),
    "whisper": Case(_whisper, _speech),
    "resnet": Case(ResNet, _images, _classified),
    "nn.TransformerEncoder": Case(_encoder, _sequences, lambda model, b: F.mse_loss(model(b["x"]), b["y"])),
    "lstm": Case(LSTM, _sequences, _regressed),
    "scalar parameters": Case(Scaled, _sequences, _regressed),
    "shared across blocks": Case(Shared, _sequences, _regressed),
    "control flow differs": Case(
        Differing, _ways, lambda model, b: F.mse_loss(model(b["x"], b["path"]), b["y"]), by_hand=True
    ),
    "a block twice": Case(Twice, _sequences, _regressed),
    "experts without a token": Case(Experts, _sequences, _regressed, by_hand=True),
}
