"""What `shard` makes of a module, on real ranks: values, gradients, memory, and what it refuses."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_mics.groups import Groups
from lightning_mics.sharding import shard
from lightning_mics.topology import Topology
from tests.distributed.counting import collectives
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import whole, wholes

VOCAB, SEQ, WIDTH = 64, 8, 16


def gpt(dropout: float = 0.0) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=3,
            n_embd=WIDTH,
            n_head=2,
            vocab_size=VOCAB,
            n_positions=SEQ,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


class Layer(nn.Module):
    """Parameters of every awkward shape, and one frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.rand(1) + 0.5)
        self.shift = nn.Parameter(torch.randn(3))
        self.gate = nn.Parameter(torch.rand(WIDTH), requires_grad=False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm(self.act(self.linear(x))) * self.scale * self.gate
        return x + nn.functional.pad(self.shift, (0, WIDTH - 3))


class Awkward(nn.Module):
    """Weights tied between two blocks (0 and 2), and between a block (1) and the head outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.layers[2].linear.weight = self.layers[0].linear.weight
        self.head.weight = self.layers[1].linear.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


MODELS: dict[str, Callable[[], nn.Module]] = {"gpt": gpt, "awkward": Awkward}


def groups_of(partition_size: int) -> Groups:
    groups = Groups.create(Topology(4, 4, partition_size), "cpu")
    dist.barrier()  # a rank that is refused early must not leave while another one still connects
    return groups


def digests(module: nn.Module) -> dict[str, str]:
    """Of every whole parameter and buffer, bit for bit."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {n: hashlib.sha1(t.contiguous().numpy().tobytes()).hexdigest() for n, t in wholes(dict(tensors)).items()}


# -- values ------------------------------------------------------------------------------------------------------------


class Resettable(nn.Module):
    """`Layer`s are not: they hold parameters that nothing sets."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 32) for _ in range(2))
        self.norm = nn.BatchNorm1d(WIDTH)


def _from_meta() -> list[dict[str, str]]:
    torch.manual_seed(100 + dist.get_rank())
    found = []
    for partition_size in (1, 2, 4):
        with torch.device("meta"):
            module = nn.ModuleList([gpt(), Resettable()])
        shard(module, groups_of(partition_size))
        found.append(digests(module))
    return found


def test_values_from_meta_are_one_model_on_every_rank_whatever_p_is() -> None:
    everywhere = [digest for by_size in run_ranks(4, _from_meta) for digest in by_size]
    assert len(everywhere) == 12
    assert everywhere[0].keys() >= {
        "0.transformer.wte.weight",
        "1.layers.1.self_attn.in_proj_weight",
        "1.norm.running_var",
    }
    assert all(other == everywhere[0] for other in everywhere)


def _with_values(name: str, partition_size: int) -> dict[str, str]:
    torch.manual_seed(100 + dist.get_rank())
    module = MODELS[name]()
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.uniform_()
        else:
            buffer.fill_(dist.get_rank() + 5)
    shard(module, groups_of(partition_size))
    return digests(module)


@pytest.mark.parametrize("name", MODELS)
def test_values_that_differ_become_rank_zeros(name: str) -> None:
    torch.manual_seed(100)
    expected = MODELS[name]()
    for buffer in expected.buffers():
        if buffer.is_floating_point():
            buffer.uniform_()
        else:
            buffer.fill_(5)
    assert run_ranks(4, _with_values, name, 2) == [digests(expected)] * 4


# -- gradients ---------------------------------------------------------------------------------------------------------


def batch_of(rank: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(rank))


def expected_gradients(reference: nn.Module, world_size: int) -> dict[str, Tensor | None]:
    """The mean over all ranks' batches, by one process."""
    for rank in range(world_size):
        (reference(batch_of(rank)).square().mean() / world_size).backward()
    return {name: param.grad for name, param in reference.named_parameters()}


def _gradients(partition_size: int, by_user: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    reference, groups = Awkward(), groups_of(partition_size)
    torch.manual_seed(0)
    module = Awkward()
    if by_user:
        # Its own weight is not tied to anything outside it.
        module.layers[1].linear.weight = nn.Parameter(module.layers[1].linear.weight.detach().clone())
        reference.layers[1].linear.weight = nn.Parameter(reference.layers[1].linear.weight.detach().clone())
        if dist.get_rank() >= partition_size:  # the first replica's values are to win
            nn.init.zeros_(module.layers[1].linear.weight)
        fully_shard(module.layers[1], mesh=groups.partition_mesh)
    root = shard(module, groups)
    root.one_backward = True
    with root.window.backward():
        root(batch_of(dist.get_rank())).square().mean().backward()
    root.window.close()
    expected = expected_gradients(reference, 4)
    far = {}
    assert [name for name, _ in module.named_parameters()] == [*expected]
    for name, param in module.named_parameters():
        wanted = expected[name]
        assert (param.grad is None) == (wanted is None), name
        if wanted is not None:
            far[name] = (whole(param.grad) - wanted).abs().max().item()
    return {
        "far": max(far.values()),
        "tied": module.layers[0].linear.weight is module.layers[2].linear.weight,
        "tied outside": module.head.weight is module.layers[1].linear.weight,
        "frozen": [n for n, p in module.named_parameters() if not p.requires_grad],
        "blocks": [block.name for block in root.blocks],
        "sharded": {isinstance(p, DTensor) for p in module.parameters()},
    }


@pytest.mark.parametrize("partition_size", [1, 2, 4])
def test_tied_frozen_and_small_parameters_get_their_gradients(partition_size: int) -> None:
    for found in run_ranks(4, _gradients, partition_size):
        assert found.pop("far") < 1e-6
        assert found == {
            "tied": True,
            "tied outside": True,
            "frozen": [f"layers.{i}.gate" for i in range(3)],
            "blocks": [f"layers.{i}" for i in range(3)],
            "sharded": {partition_size > 1},
        }


def test_a_block_that_the_user_sharded_over_the_partition_group_is_taken_over() -> None:
    for found in run_ranks(4, _gradients, 2, True):
        assert found["far"] < 1e-6
        assert found["blocks"] == [f"layers.{i}" for i in range(3)]


def _no_parameters() -> tuple[str, list[float]]:
    root = shard(nn.Sequential(nn.ReLU(), nn.Tanh()), groups_of(2))
    root.one_backward = True
    x = torch.ones(3, requires_grad=True)
    with root.window.backward():
        root(x).sum().backward()
    root.window.close()
    root.release()
    return root.describe(), x.grad.tolist()


def test_a_module_without_parameters_runs() -> None:
    slope = 1 - torch.tanh(torch.ones(())).item() ** 2
    for described, grad in run_ranks(4, _no_parameters):
        assert described == "0 parameters outside blocks"
        assert grad == pytest.approx([slope] * 3)


# -- memory ------------------------------------------------------------------------------------------------------------


class PeakBytes(TorchDispatchMode):
    """The most bytes of real storage alive after any operation in here, of what was made in here."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor) and not tensor.is_meta:
                self._alive[tensor.untyped_storage()] = None
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self._alive))
        return result


def _peak() -> int:
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(128, 128) for _ in range(16)))
    groups = groups_of(4)
    with PeakBytes() as measured:
        shard(module, groups)
    return measured.peak


def test_no_rank_ever_holds_the_whole_model() -> None:
    """All shards, one whole block, and a quarter of a block: the mask (a byte an element) of what is unset in it."""
    block = 4 * (128 * 128 + 128)
    for peak in run_ranks(4, _peak):
        assert 16 * block / 4 + block <= peak < 16 * block / 4 + 1.3 * block


def _saved_and_gradients(checkpointing: bool) -> tuple[int, dict[str, str]]:
    torch.manual_seed(0)
    module = gpt(dropout=0.1)
    root = shard(module, groups_of(2), activation_checkpointing=checkpointing)
    tokens = torch.randint(0, VOCAB, (2, SEQ))
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[id(tensor)] = tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = root(input_ids=tokens, labels=tokens).loss
    kept = sum(saved.values())
    with root.window.backward():
        loss.backward()
    root.window.close()
    grads = {n: p.grad.full_tensor().numpy().tobytes() for n, p in module.named_parameters()}
    return kept, {n: hashlib.sha1(g).hexdigest() for n, g in grads.items()}


def test_activation_checkpointing_saves_less_and_changes_no_bit() -> None:
    """With dropout: the recomputed forward draws the same mask."""
    for (plain, expected), (saved, actual) in zip(
        run_ranks(4, _saved_and_gradients, False), run_ranks(4, _saved_and_gradients, True), strict=True
    ):
        assert actual == expected
        assert saved < plain / 2


def _forwards(by_user: Callable[[GPT2LMHeadModel], object], asked: bool) -> tuple[int, list[str]]:
    """How often the first layer's MLP runs forward in a training step, and what was warned of."""
    module, count = gpt(), 0
    by_user(module)

    def note(*_: Any) -> None:
        nonlocal count
        count += 1

    module.transformer.h[0].mlp.c_fc.register_forward_hook(note)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        root = shard(module, groups_of(2), activation_checkpointing=asked)
    tokens = torch.zeros(1, SEQ, dtype=torch.long)
    loss = root(input_ids=tokens, labels=tokens).loss
    with root.window.backward():
        loss.backward()
    root.window.close()
    return count, [str(each.message) for each in caught if "activation_checkpointing" in str(each.message)]


def _wrapped(module: nn.Module) -> None:
    apply_activation_checkpointing(module, check_fn=lambda layer: type(layer).__name__ == "GPT2MLP")


def _recomputed_once() -> list[tuple[int, list[str]]]:
    ways = (lambda _: None, _wrapped, lambda module: module.gradient_checkpointing_enable())
    return [_forwards(way, asked) for way in ways for asked in (False, True)]


def test_what_the_user_recomputes_is_not_recomputed_twice() -> None:
    for rank, found in enumerate(run_ranks(4, _recomputed_once)):
        assert [count for count, _ in found] == [1, 2, 2, 2, 2, 2]
        told = [
            "the model already contains checkpointed layers, which are left as they are: transformer.h.0" in text[0]
            for _, text in found
            if text
        ]
        assert told == [True, True] * (rank == 0)


# -- refusals ----------------------------------------------------------------------------------------------------------


def _mixed_dtypes() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].bias = nn.Parameter(module[1].bias.detach().half())
    return module


def _elsewhere() -> nn.Module:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fully_shard(module[0], mesh=dist.init_device_mesh("cpu", (4,)))
    return module


def _refused(make: Callable[[], nn.Module], blocks: Any) -> tuple[str, int]:
    groups, module = groups_of(2), make()
    with collectives() as calls:
        try:
            shard(module, groups, blocks=blocks)
        except ValueError as error:
            return str(error), len(calls)
    return "none", len(calls)


@pytest.mark.parametrize(
    ("make", "blocks", "message"),
    [
        (_mixed_dtypes, None, r"^1: trainable parameters of several dtypes .*torch\.float16: 1.*convert the module"),
        (_elsewhere, None, r"^0\.weight is sharded already, over ranks \[0, 1, 2, 3\], not over .* \[(0, 1|2, 3)\]"),
        (gpt, "Nothing", r"^blocks='Nothing' matches no module"),
    ],
    ids=["dtypes", "other mesh", "blocks"],
)
def test_what_cannot_be_sharded_is_refused_on_every_rank_before_any_collective(
    make: Callable[[], nn.Module], blocks: Any, message: str
) -> None:
    for said, issued in run_ranks(4, _refused, make, blocks):
        assert re.search(message, said), said
        assert issued == 0


# -- what it says of itself --------------------------------------------------------------------------------------------


def _bytes(partition_size: int, window: int) -> tuple[str, tuple[int, int, int]]:
    root = shard(gpt(), groups_of(partition_size))
    told = root.wire_bytes(window)
    return root.describe(), (told.gather, told.hop_1, told.hop_2)


@pytest.mark.parametrize("partition_size", [1, 2, 4])
def test_bytes_on_the_wire(partition_size: int) -> None:
    """GPT-2 of width 16: a block has two norms (4 x 16), attention (16 x 48 + 48, 16 x 16 + 16) and an MLP
    (16 x 64 + 64, 64 x 16 + 16); outside are the embeddings (64 + 8) x 16 and a norm (2 x 16)."""
    window, p, r = 4, partition_size, 4 // partition_size
    block = 4 * 16 + (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16)
    outside = (64 + 8) * 16 + 2 * 16
    # Two of three blocks stay at each of the seven turns between forwards and backwards.
    blocks = 2 * window * 3 - 2 * (2 * window - 1)
    gather = 4 * (blocks * block + window * outside) * (p - 1) // p
    hop_1 = 4 * window * (3 * block + outside) * (p - 1) // p
    hop_2 = 4 * 2 * (r - 1) * (3 * block + outside) // (p * r)
    for described, told in run_ranks(4, _bytes, partition_size, window):
        assert described == (
            f"3 x GPT2Block of {block:,} parameters (transformer.h.0 ... transformer.h.2)\n"
            f"{outside:,} parameters outside blocks"
        )
        assert told == (gather, hop_1, hop_2)
