"""Which modules are found to be blocks, on models of the meta device: nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
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
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block

from lightning_mics.blocks import find_blocks, parameters_at, slots_by_owner

_BERT = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def gpt() -> nn.Module:
    config = GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=32, n_positions=8, bos_token_id=0, eos_token_id=0)
    return on_meta(lambda: GPT2LMHeadModel(config))


def t5() -> nn.Module:
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_decoder_layers=3, num_heads=2)
    return on_meta(lambda: T5ForConditionalGeneration(config))


def llama() -> nn.Module:
    config = LlamaConfig(num_key_value_heads=1, **_BERT)
    return on_meta(lambda: LlamaForCausalLM(config))


def names(root: nn.Module, choice: Any = None) -> list[str]:
    blocks = find_blocks(root, choice)
    assert all(root.get_submodule(block.name) is block.module for block in blocks)
    return [block.name for block in blocks]


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}.{i}" for i in range(count)]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (gpt, numbered("transformer.h", 3)),
        (lambda: on_meta(lambda: BertForMaskedLM(BertConfig(**_BERT))), numbered("bert.encoder.layer", 3)),
        (lambda: on_meta(lambda: RobertaForMaskedLM(RobertaConfig(**_BERT))), numbered("roberta.encoder.layer", 3)),
        (t5, numbered("encoder.block", 2) + numbered("decoder.block", 3)),
        (llama, numbered("model.layers", 3)),
    ],
    ids=["gpt2", "bert", "roberta", "t5", "llama"],
)
def test_hugging_face_layers(make: Callable[[], nn.Module], expected: list[str]) -> None:
    assert names(make()) == expected


def test_layers_inside_a_wrapper() -> None:
    assert names(nn.ModuleDict({"model": gpt()})) == numbered("model.transformer.h", 3)


def layers(count: int, width: int = 4) -> list[nn.Module]:
    return [nn.Linear(width, width, device="meta") for _ in range(count)]


def test_a_plain_list_and_a_plain_sequence() -> None:
    assert names(nn.ModuleDict({"stack": nn.ModuleList(layers(3)), "head": nn.Linear(4, 2)})) == numbered("stack", 3)
    assert names(nn.Sequential(*layers(2))) == ["0", "1"]


def test_torch_transformers() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, device="meta"), 3, enable_nested_tensor=False)
    assert names(encoder) == numbered("layers", 3)
    both = nn.Transformer(8, 2, 2, 3, 16, batch_first=True, device="meta")
    assert names(both) == numbered("encoder.layers", 2) + numbered("decoder.layers", 3)


def test_a_stack_less_than_a_tenth_of_the_largest_is_left_out() -> None:
    large, middle, small = layers(2, 20), layers(2, 10), layers(2, 4)  # 840, 220 and 40 parameters
    root = nn.ModuleDict({"a": nn.ModuleList(small), "b": nn.ModuleList(large), "c": nn.ModuleList(middle)})
    assert names(root) == ["b.0", "b.1", "c.0", "c.1"]


def test_stacks_within_the_blocks_stay_whole() -> None:
    root = nn.ModuleList(nn.Sequential(*layers(3)) for _ in range(2))
    assert names(nn.ModuleDict({"stages": root})) == ["stages.0", "stages.1"]


def test_no_repetition_no_blocks() -> None:
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert names(mlp) == []
    assert names(nn.ModuleList(layers(1))) == []
    assert names(nn.Sequential(nn.ReLU(), nn.ReLU())) == []


def test_a_layer_shared_by_all_places_is_one_module_not_several() -> None:
    (shared,) = layers(1)
    assert names(nn.ModuleList([shared, shared, shared])) == []
    first, second = layers(2)
    stack = nn.ModuleList([first, second, first])
    assert names(stack) == ["0", "1"]
    slots = slots_by_owner(stack, find_blocks(stack))
    assert {name: parameters_at(where) for name, where in slots.items()} == {
        "0": tuple(first.parameters()),
        "1": tuple(second.parameters()),
        "": (),
    }


@pytest.mark.parametrize(
    "choice",
    [
        GPT2Block,
        "GPT2Block",
        [GPT2Block],
        ("GPT2Block", nn.Bilinear),
        {GPT2Block},
        lambda name, module: name.startswith("transformer.h.") and name.count(".") == 2,
        ModuleWrapPolicy({GPT2Block}),
    ],
    ids=["class", "name", "list", "several", "set", "predicate", "policy"],
)
def test_the_same_choice_in_every_form(choice: Any) -> None:
    assert names(gpt(), choice) == numbered("transformer.h", 3)


def test_a_choice_of_finer_blocks() -> None:
    expected = [f"transformer.h.{i}.{part}" for i in range(3) for part in ("attn", "mlp")]
    assert names(gpt(), [GPT2Attention, GPT2MLP]) == expected


def test_a_choice_by_a_base_class() -> None:
    class Special(nn.Linear):
        pass

    root = nn.Sequential(Special(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert names(root, nn.Linear) == ["0", "2"]
    assert names(root, "Special") == ["0"]


def test_a_chosen_module_without_parameters_is_no_block() -> None:
    assert names(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), lambda name, module: True) == ["0"]


def test_a_choice_that_matches_nothing() -> None:
    for choice in (nn.Bilinear, "GPTBlock", lambda name, module: False, nn.Dropout):
        with pytest.raises(ValueError, match="matches no module with parameters; give the class"):
            find_blocks(gpt(), choice)


def test_the_root_itself_is_no_block() -> None:
    with pytest.raises(ValueError, match="matches no module with parameters"):
        find_blocks(gpt(), GPT2LMHeadModel)


def test_a_container_cannot_be_gathered_by_its_forward() -> None:
    with pytest.raises(ValueError, match=r"matches 'transformer\.h', a ModuleList without a forward"):
        find_blocks(gpt(), nn.ModuleList)


@pytest.mark.parametrize("inner", [GPT2Attention, GPT2MLP, "LayerNorm"])
def test_blocks_in_blocks(inner: Any) -> None:
    with pytest.raises(
        ValueError, match=r"matches 'transformer\.h\.0\.\w+' inside 'transformer\.h\.0'; blocks must not"
    ):
        find_blocks(gpt(), [GPT2Block, inner])


def test_names_that_only_begin_alike_are_not_nested() -> None:
    root = nn.ModuleDict({"a": nn.Linear(2, 2), "ab": nn.Linear(2, 2)})
    assert names(root, nn.Linear) == ["a", "ab"]


@pytest.mark.parametrize("choice", [3, 2.0, [GPT2Block, 3], [lambda name, module: True]])
def test_what_is_no_choice(choice: Any) -> None:
    with pytest.raises(TypeError, match="is not understood; give a module class or its name"):
        find_blocks(gpt(), choice)
