"""Models of the meta device get the values that they would have been built with, in one process.

The fake process group moves nothing, so that what is seen here is the initialisation alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_mics.groups import Groups
from lightning_mics.materialize import broadcast_from_rank_zero, materialize
from lightning_mics.sharding import shard
from lightning_mics.topology import Topology
from tests.distributed.toys import whole

CPU = torch.device("cpu")
_BERT = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def groups() -> Iterator[Groups]:
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    torch.manual_seed(5)
    yield Groups.create(Topology(1, 1, 1), "cpu")
    dist.destroy_process_group()


def gpt() -> nn.Module:
    config = GPT2Config(n_layer=8, n_embd=32, n_head=2, vocab_size=101, n_positions=24, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=101, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, **_BERT))


class Kinds(nn.Module):
    """One of each of torch's own that has values, in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16, padding_idx=3)
        self.stem = nn.Sequential(nn.Conv1d(16, 16, 3), nn.BatchNorm1d(16))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(2))
        self.attention = nn.MultiheadAttention(16, 2, kdim=8, vdim=8, add_bias_kv=True)
        self.recurrent = nn.LSTM(16, 16)
        self.out = nn.Sequential(nn.GroupNorm(2, 16), nn.RMSNorm(16), nn.Linear(16, 16), nn.PReLU())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt,
    "bert": lambda: BertForMaskedLM(BertConfig(**_BERT)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**_BERT)),
    "t5": t5,
    "llama": llama,
    "torch": Kinds,
}


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def assert_drawn_alike(name: str, actual: Tensor, expected: Tensor) -> None:
    """Constants are equal; what is random has the same mean and spread, as far as its size lets one tell."""
    actual, expected = actual.double().flatten(), expected.double().flatten()
    if expected.numel() == 1 or expected.std() == 0:
        assert torch.equal(actual, expected), name
        return
    assert not torch.equal(actual, expected), f"{name}: the same draw, the seeds differ"
    # The standard error of a sample's deviation is sigma / sqrt(2 n), that of its mean sigma / sqrt(n); six of each.
    slack = 6 * expected.std() / expected.numel() ** 0.5
    assert (actual.std() - expected.std()).abs() < slack, f"{name}: spread {actual.std()}, expected {expected.std()}"
    assert (actual.mean() - expected.mean()).abs() < 1.5 * slack, f"{name}: mean {actual.mean()}"


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_values_are_those_of_a_model_built_in_memory(groups: Groups, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    expected = make()
    torch.manual_seed(2)
    module = on_meta(make)
    shard(module, groups)
    reference = dict(expected.named_parameters())
    for name, param in module.named_parameters():
        assert_drawn_alike(name, whole(param).detach(), reference[name].detach())
    for (name, buffer), (_, wanted) in zip(module.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(buffer, wanted), name
    assert module.state_dict().keys() == expected.state_dict().keys()


def tied_names(module: nn.Module) -> set[tuple[str, ...]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    return {tuple(several) for several in names.values() if len(several) > 1}


@pytest.mark.parametrize("make", [gpt, t5, MODELS["bert"]], ids=["gpt2", "t5", "bert"])
def test_what_was_tied_is_tied(groups: Groups, make: Callable[[], nn.Module]) -> None:
    expected, module = tied_names(make()), on_meta(make)
    assert expected
    shard(module, groups)
    assert tied_names(module) == expected


def test_blocks_draw_different_numbers_from_one_seed(groups: Groups) -> None:
    """As they would one after the other; and the same seed draws the same model again."""
    first, again = on_meta(gpt), on_meta(gpt)
    shard(first, groups)
    shard(again, groups)
    weights = [whole(block.attn.c_attn.weight) for block in first.transformer.h]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(whole(one), whole(other))


def test_the_users_random_numbers_go_on_as_if_nothing_was_drawn(groups: Groups) -> None:
    expected = torch.get_rng_state()
    shard(on_meta(gpt), groups)
    assert torch.equal(torch.get_rng_state(), expected)


class Unset(nn.Module):
    """Has a parameter, and a buffer of a kind, that nothing sets."""

    def __init__(self, buffer: Tensor | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.empty(4))
        self.register_buffer("table", buffer)


def test_a_parameter_that_nothing_sets_is_named(groups: Groups) -> None:
    module = nn.ModuleDict({"inner": on_meta(Unset)})
    with pytest.raises(
        ValueError, match=r"^inner\.scale: on the meta device, and left without a value; give the module"
    ):
        shard(module, groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.int8])
def test_a_buffer_that_nothing_sets_is_named(groups: Groups, dtype: torch.dtype) -> None:
    module = on_meta(lambda: Unset(torch.zeros(3, dtype=dtype)))
    module.scale = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"^table: on the meta device"):
        shard(module, groups)


def test_many_that_nothing_sets_are_counted_off(groups: Groups) -> None:
    module = nn.ModuleList(on_meta(Unset) for _ in range(7))
    with pytest.raises(ValueError, match=r"^0\.scale: on"):
        shard(module, groups)  # the first block
    with pytest.raises(ValueError, match=r"^scales\.0, scales\.1, scales\.2, scales\.3, scales\.4 \.\.\.: on the meta"):
        shard(
            nn.ModuleDict({"scales": nn.ParameterList(nn.Parameter(torch.empty(2, device="meta")) for _ in range(7))}),
            groups,
        )


class Resets(nn.Module):
    """Sets its own values, and unsigned ones to zero, which no guard may take for unset."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(4))
        self.register_buffer("mask", torch.empty(3, dtype=torch.bool))
        self.register_buffer("bytes", torch.empty(3, dtype=torch.uint8))
        self.register_buffer("words", torch.empty(3, dtype=torch.uint16))
        self.register_buffer("passing", torch.empty(3), persistent=False)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, 2.5)
        for buffer in self.buffers():
            buffer.zero_()


def test_reset_parameters_sets_what_is_the_modules_own(groups: Groups) -> None:
    module = on_meta(Resets)
    shard(module, groups)
    assert torch.equal(whole(module.scale), torch.full((4,), 2.5))
    assert all(torch.equal(b, torch.zeros_like(b)) for b in module.buffers())
    assert {b.dtype for b in module.buffers()} == {torch.bool, torch.uint8, torch.uint16, torch.float32}
    assert "passing" not in module.state_dict()


class Tower(nn.Module):
    """A root that sets the values of all that it holds: of its own, of a child outside blocks, of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(4))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.out = nn.Linear(4, 4)

    def reset_parameters(self) -> None:
        for param in self.parameters():
            nn.init.constant_(param, 3.0)


def test_a_root_has_the_last_word_on_what_lies_outside_blocks(groups: Groups) -> None:
    """Its blocks are materialised one by one, and set themselves."""
    module = on_meta(Tower)
    shard(module, groups)
    outside = [module.token, *module.out.parameters()]
    assert all(torch.equal(whole(p), torch.full_like(whole(p), 3.0)) for p in outside)
    uniform = [whole(p) for p in module.layers.parameters()]
    assert all(p.abs().max() <= 0.5 for p in uniform)  # 1/sqrt(fan_in)
    assert not torch.equal(uniform[0], uniform[2])


def test_a_parent_with_nothing_of_its_own_reaches_past_its_blocks(groups: Groups) -> None:
    class Bare(Tower):
        def __init__(self) -> None:
            super().__init__()
            del self.token

    module = on_meta(Bare)
    shard(module, groups)
    assert torch.equal(whole(module.out.weight), torch.full((4, 4), 3.0))


class SetsItsChildren(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(3, 3)

    def reset_parameters(self) -> None:
        nn.init.eye_(self.child.weight)


def test_a_parent_has_the_last_word_on_its_children(groups: Groups) -> None:
    module = on_meta(lambda: nn.ModuleList(SetsItsChildren() for _ in range(2)))
    shard(module, groups)
    assert torch.equal(whole(module[0].child.weight), torch.eye(3))


def test_values_that_exist_are_kept(groups: Groups) -> None:
    """Though the initialisation of what is missing would set them too, be it torch's way or Hugging Face's."""
    sevens = torch.full((128, 32), 7.0)
    module, pretrained = on_meta(lambda: nn.ModuleList(SetsItsChildren() for _ in range(2))), on_meta(gpt)
    module[1].child.weight = nn.Parameter(sevens[:3, :3].clone())
    mlp = pretrained.transformer.h[0].mlp
    mlp.c_fc.bias = nn.Parameter(sevens[:, 0].clone())
    shard(module, groups)
    shard(pretrained, groups)
    assert torch.equal(whole(module[1].child.weight), sevens[:3, :3])
    assert torch.equal(whole(module[0].child.weight), torch.eye(3))
    assert torch.equal(whole(mlp.c_fc.bias), sevens[:, 0])
    assert whole(mlp.c_proj.weight).std().item() == pytest.approx(0.02 / (2 * 8) ** 0.5, rel=0.1)


def test_a_model_inside_another_initialises_its_own(groups: Groups) -> None:
    """The closest Hugging Face model above decides; what lies outside resets itself."""
    module = nn.ModuleDict({"lm": on_meta(gpt), "head": nn.Linear(32, 32, device="meta")})
    shard(module, groups)
    assert whole(module["lm"].transformer.wte.weight).std().item() == pytest.approx(0.02, rel=0.1)
    uniform = 1 / (3 * 32) ** 0.5  # torch's Linear: uniform in +-1/sqrt(fan_in)
    assert whole(module["head"].weight).std().item() == pytest.approx(uniform, rel=0.1)


def test_frozen_stays_frozen(groups: Groups) -> None:
    module = on_meta(gpt)
    for param in module.transformer.h[0].parameters():
        param.requires_grad_(False)
    shard(module, groups)
    assert not any(p.requires_grad for p in module.transformer.h[0].parameters())
    assert all(p.requires_grad for p in module.transformer.h[1].parameters())


def test_only_what_is_named_is_touched() -> None:
    root = on_meta(lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    materialize(root, [("0", root[0])], CPU, seed=3)
    assert not root[0].weight.is_meta
    assert root[1].weight.is_meta


def test_broadcast_groups_by_dtype_and_takes_any_shape() -> None:
    tensors = [torch.randn(2, 3), torch.randn(()), torch.arange(4), torch.randn(0), torch.randn(3, 2).t()]
    copies = [t.clone() for t in tensors]
    broadcast_from_rank_zero(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
