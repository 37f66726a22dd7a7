"""The same numbers as DDP, and as one process that sees all the data.

Every case trains four AdamW steps with clipping on three copies of one model: sharded, under DDP, and (on rank 0) alone
with every rank's batches. fp32 sums are associated differently in the three, so equality is to rounding: losses and
norms to 2e-6 relative; parameters to 1e-5, one hundredth of the step of 1e-3 that Adam takes wherever a gradient is not
zero (it divides out the size of a gradient, and with it the size of its rounding).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, logging

from lightning_mics.groups import Groups
from lightning_mics.ladder import RUNGS, Rung
from lightning_mics.network import Network, Tier
from lightning_mics.precision import Precision
from lightning_mics.sharding import MiCSModule, shard
from lightning_mics.topology import Topology
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import wholes

STEPS, LR, CLIP, VOCAB, SEQ = 4, 1e-3, 0.5, 61, 12

Batch = dict[str, Tensor]


def build(name: str) -> nn.Module:
    """A small model with tied embeddings, from seed 0, without dropout."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    if name == "gpt":
        return GPT2LMHeadModel(
            GPT2Config(
                n_layer=3,
                n_embd=32,
                n_head=2,
                vocab_size=VOCAB,
                n_positions=SEQ,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    return BertForMaskedLM(
        BertConfig(
            num_hidden_layers=3,
            hidden_size=32,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=VOCAB,
            max_position_embeddings=SEQ,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def batch(name: str, rank: int, step: int, micro: int) -> Batch:
    generator = torch.Generator().manual_seed(rank * 10_000 + step * 100 + micro)
    tokens = torch.randint(VOCAB, (2, SEQ), generator=generator)
    if name == "gpt":
        return {"input_ids": tokens, "labels": tokens}
    masked = torch.rand(tokens.shape, generator=generator) < 0.3
    masked[:, 0] = True
    return {"input_ids": tokens.masked_fill(masked, 3), "labels": tokens.masked_fill(~masked, -100)}


def autocast(dtype: torch.dtype | None) -> torch.autocast | nullcontext[None]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def train(model: nn.Module, name: str, window: int, dtype: torch.dtype | None) -> Iterator[tuple[list[float], float]]:
    """This rank's losses, and the norm before clipping, of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    rank = dist.get_rank()
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = []
        for micro in range(window):
            with micro_step(model, step, boundary=micro == window - 1):
                with autocast(dtype):
                    loss = model(**batch(name, rank, step, micro)).loss
                backward(model, loss / window)
            losses.append(loss.item())
        if isinstance(model, MiCSModule):
            model.window.close()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if isinstance(model, MiCSModule):
            model.release()
        yield losses, float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def micro_step(model: nn.Module, step: int, *, boundary: bool) -> AbstractContextManager[None]:
    if isinstance(model, MiCSModule):
        model.window.begin(step)
        return nullcontext() if boundary else model.window.hop_1_only()
    assert isinstance(model, DistributedDataParallel)
    return nullcontext() if boundary else model.no_sync()


def backward(model: nn.Module, loss: Tensor) -> None:
    with model.window.backward() if isinstance(model, MiCSModule) else nullcontext():
        loss.backward()


@cache
def train_ddp(
    name: str, window: int, dtype: torch.dtype | None
) -> tuple[list[tuple[list[float], float]], list[Tensor]]:
    """This rank's losses and norms under DDP, and the final parameters."""
    replicated = DistributedDataParallel(build(name))
    steps = list(train(replicated, name, window, dtype))
    return steps, [p.detach() for p in replicated.parameters()]


@cache
def train_alone(name: str, window: int) -> tuple[list[list[float]], list[float], list[Tensor]]:
    """Losses (of each step, averaged over ranks), norms and final parameters of one process with all batches."""
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        means = []
        for micro in range(window):
            every = [model(**batch(name, r, step, micro)).loss for r in range(dist.get_world_size())]
            mean = torch.stack(every).mean()
            (mean / window).backward()
            means.append(mean.item())
        losses.append(means)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
    return losses, norms, [p.detach() for p in model.parameters()]


def compare(
    name: str,
    partition_size: int,
    window: int,
    *,
    ranks_per_node: int | None = None,
    rung: str = "block/sharded",
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """The largest differences on this rank, relative for losses and norms, absolute for parameters."""
    n = dist.get_world_size()
    groups = Groups.create(Topology(n, ranks_per_node or n, partition_size), "cpu")
    # A network without latency: both tiers are used however small the model.
    network = Network(Tier(0.0, 1e9), Tier(0.0, 1e8))
    sharded = shard(build(name), groups, precision=Precision(param_dtype=dtype), rung=rung, network=network)
    sharded.one_backward = True
    ours = list(train(sharded, name, window, dtype))
    theirs, their_parameters = train_ddp(name, window, dtype)
    parameters = [*wholes(dict(sharded.module.named_parameters())).values()]
    worst = {
        "loss": max(
            abs(a / b - 1) for (x, _), (y, _) in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
        ),
        "norm": max(abs(a / b - 1) for (_, a), (_, b) in zip(ours, theirs, strict=True)),
        "parameter": max(float((a - b).abs().max()) for a, b in zip(parameters, their_parameters, strict=True)),
    }
    if dtype is None:
        worst |= compare_alone(name, window, ours, parameters)
    return worst


def compare_alone(
    name: str, window: int, ours: list[tuple[list[float], float]], whole: list[Tensor]
) -> dict[str, float]:
    mean = torch.tensor([losses for losses, _ in ours], dtype=torch.float64)
    dist.all_reduce(mean)
    if dist.get_rank() > 0:  # where DDP is the reference, of the same parameters
        return {}
    mean /= dist.get_world_size()
    losses, norms, parameters = train_alone(name, window)
    return {
        "loss alone": float((mean / torch.tensor(losses, dtype=torch.float64) - 1).abs().max()),
        "norm alone": max(abs(a / b - 1) for (_, a), b in zip(ours, norms, strict=True)),
        "parameter alone": max(float((a - b).abs().max()) for a, b in zip(whole, parameters, strict=True)),
    }


def compare_bf16(name: str) -> dict[str, float]:
    return compare(name, 2, 4, dtype=torch.bfloat16)


TOLERANCE = {"loss": 2e-6, "norm": 2e-6, "parameter": 1e-5}
# (p, window) with each model and number of ranks
CASES = {
    ("gpt", 4): [(1, 4), (2, 1), (4, 4)],
    ("bert", 4): [(1, 1), (2, 4), (4, 1)],
    ("bert", 6): [(3, 4), (2, 4)],
}


def compare_all(name: str, cases: list[tuple[int, int]]) -> list[dict[str, float]]:
    return [compare(name, p, window) for p, window in cases]


def compare_nodes_and_rungs(cases: list[tuple[int, int, int, tuple[Rung, ...]]]) -> dict[str, dict[str, float]]:
    return {
        f"p={p}, k={k}, window={window}, {rung}": compare("gpt", p, window, ranks_per_node=k, rung=str(rung))
        for p, k, window, rungs in cases
        for rung in rungs
    }


@pytest.mark.parametrize(("name", "world_size"), CASES)
def test_equals_ddp_and_one_process(name: str, world_size: int) -> None:
    cases = CASES[name, world_size]
    for rank, results in enumerate(run_ranks(world_size, compare_all, name, cases)):
        for (p, window), worst in zip(cases, results, strict=True):
            for what, difference in worst.items():
                assert difference < TOLERANCE[what.split()[0]], f"rank {rank}, p={p}, window={window}: {worst}"


ENDS = (RUNGS[0], RUNGS[-1])


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        pytest.param(4, [(4, 2, 3, RUNGS), (2, 2, 1, ENDS[1:])], marks=pytest.mark.slow),
        (4, [(1, 2, 2, ENDS[1:]), (2, 1, 2, RUNGS)]),
        (6, [(6, 2, 2, ENDS)]),
    ],
    ids=["both tiers", "replicas on both tiers", "three nodes"],
)
def test_every_rung_equals_ddp_and_one_process(
    world_size: int, cases: list[tuple[int, int, int, tuple[Rung, ...]]]
) -> None:
    for rank, results in enumerate(run_ranks(world_size, compare_nodes_and_rungs, cases)):
        for case, worst in results.items():
            for what, difference in worst.items():
                assert difference < TOLERANCE[what.split()[0]], f"rank {rank}, {case}: {worst}"


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_bf16_mixed_stays_near_ddp(name: str) -> None:
    """Both round to 8 bits of mantissa, at different places: 2**-8 = 0.4 % a rounding; losses stay within 1 %."""
    for worst in run_ranks(4, compare_bf16, name):
        assert 0 < worst["loss"] < 1e-2
        assert worst["parameter"] < 2 * STEPS * LR  # the sign of a gradient near zero is anyone's; a step is at most LR
