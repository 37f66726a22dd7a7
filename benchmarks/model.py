"""The model and the batches that every peer trains on: a GPT of 25 MB whose computing is small beside its bytes.

Nine blocks of 240 features hold 99.5 % of its parameters: the vocabulary is tiny, and every size divides by 2, 3, 4 and
6, so that no peer pads its shards. A micro-step is 16 tokens a rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.bound import ModelSize
from lightning_mics.planner.plan import Workload

_TOKENS, _VOCABULARY = 16, 96
_LEARNING_RATE = 1e-3


def build(width: int = 240) -> GPT2LMHeadModel:
    """The model, fp32 on the CPU, with the same values wherever it is built; no dropout."""
    config = GPT2Config(
        n_layer=9,
        n_embd=width,
        n_head=4,
        vocab_size=_VOCABULARY,
        n_positions=_TOKENS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model


def workload() -> Workload:
    """The same for the planner and the probe; batches are int64 of shape (samples, 16)."""
    return Workload(build(), lambda size: torch.zeros(size, _TOKENS, dtype=torch.long), loss_of)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of `build`'s model, in order."""
    assert isinstance(model, GPT2LMHeadModel)
    return list(model.transformer.h)


def size_of(model: nn.Module) -> ModelSize:
    """Bytes of `build`'s model."""
    blocks = tuple(sum(p.nbytes for p in block.parameters()) for block in blocks_of(model))
    return ModelSize(blocks, sum(p.nbytes for p in model.parameters()) - sum(blocks))


def optimizer_of(params: object) -> torch.optim.AdamW:
    """AdamW, the same for every peer; fused, so that a sharded parameter costs no more calls than a plain one."""
    return torch.optim.AdamW(params, lr=_LEARNING_RATE, fused=True)  # type: ignore[arg-type]


def batches(step: int, rank: int, window: int) -> list[Tensor]:
    """The token ids of an optimizer step on a rank: `window` int64 tensors of shape (1, 16)."""
    generator = torch.Generator().manual_seed(1_000_003 * step + rank)
    return [torch.randint(_VOCABULARY, (1, _TOKENS), generator=generator) for _ in range(window)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross entropy of the next token, a scalar in nats."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss
