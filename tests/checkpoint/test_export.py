"""Export: `transformers` opens what comes out, and computes what the trained module computed, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, GPT2Config
from typer.testing import CliRunner, Result

from lightning_mics import memory
from lightning_mics.checkpoint import export_hugging_face
from lightning_mics.checkpoint.hugging_face import configurations
from lightning_mics.checkpoint.safetensors import write
from mics_tools.cli import app
from mics_tools.manifest import Manifest
from tests.checkpoint.saving import save_alone
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import mics, trainer

CONFIGS = {
    "bert": BertConfig(
        vocab_size=97,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        hidden_dropout_prob=0.0,
    ),
    "gpt2": GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=24, resid_pdrop=0.0),
}
AUTO = {"bert": AutoModelForMaskedLM, "gpt2": AutoModelForCausalLM}
IDS = torch.arange(22).reshape(2, 11) * 4


class Language(pl.LightningModule):
    """A model of `transformers`, and a configuration of its own that must not pass for another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.config = CONFIGS[kind]
        self.network = AUTO[kind].from_config(self.config)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(input_ids=batch, labels=batch).loss

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(input_ids=batch).logits

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Loader:
    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


def _train(kind: str, path: Path) -> Any:
    """Train three steps and save; the logits that the trained module gives."""
    torch.manual_seed(3)
    module, run = Language(kind), trainer(mics())
    generator = torch.Generator().manual_seed(dist.get_rank())
    run.fit(module, Loader([torch.randint(0, 97, (2, 11), generator=generator) for _ in range(3)]))
    run.save_checkpoint(path)
    (logits,) = run.predict(module, Loader([IDS]))
    return logits.tolist()


Trained = tuple[str, Path, Tensor]


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """What four ranks saved in two partition groups, and the logits that they computed."""
    path = tmp_path_factory.mktemp(request.param) / "trained.ckpt"
    return request.param, path, torch.tensor(run_ranks(4, _train, request.param, path)[0])


def _logits(kind: str, folder: Path, **options: Any) -> Tensor:
    """As whoever only has the folder computes them; nothing may be missing or left over."""
    model, report = AUTO[kind].from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def _mics(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# -- what transformers makes of it -------------------------------------------------------------------------------------


def test_the_manifest_has_the_configuration_with_the_real_class(trained: Trained) -> None:
    kind, path, _ = trained
    ((name, config),) = Manifest.of(path).models.items()
    classes = {"bert": "BertForMaskedLM", "gpt2": "GPT2LMHeadModel"}
    assert name == "network" and config["model_type"] == kind and config["architectures"] == [classes[kind]]


def _sharded_by_itself() -> list[str]:
    models = {kind: AUTO[kind].from_config(CONFIGS[kind]) for kind in CONFIGS}
    for model in models.values():
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        if not type(model).__name__.startswith("FSDP"):
            raise AssertionError("the engine renames no class any more")
    return [configurations(model)[""]["architectures"] for model in models.values()]


def test_the_engines_own_class_is_seen_through() -> None:
    assert run_ranks(2, _sharded_by_itself)[0] == [["BertForMaskedLM"], ["GPT2LMHeadModel"]]


def test_from_pretrained_computes_what_was_trained(trained: Trained, tmp_path: Path) -> None:
    kind, path, logits = trained
    result = _mics("export", path, "--to", "hf", tmp_path / "out")
    assert result.exit_code == 0 and f"written to {tmp_path / 'out'}, " in result.stdout
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(_logits(kind, tmp_path / "out"), logits)


def test_it_is_laid_out_as_transformers_own(trained: Trained, tmp_path: Path) -> None:
    kind, path, _ = trained
    export_hugging_face(path, tmp_path / "ours", max_shard_size=6000)
    AUTO[kind].from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs", max_shard_size="6KB")
    ours, theirs = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs"))
    assert ours == theirs
    ours, theirs = (
        json.loads((tmp_path / side / "model.safetensors.index.json").read_text()) for side in ("ours", "theirs")
    )
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert ours["metadata"]["total_parameters"] == theirs["metadata"]["total_parameters"]


def test_files_are_as_large_as_they_may_be(trained: Trained, tmp_path: Path) -> None:
    kind, path, logits = trained
    assert _mics("export", path, "--to", "hf", tmp_path / "out", "--max-shard-size", "5 kB").exit_code == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    sizes = []
    for file in files:
        with safe_open(file, "pt") as opened:
            tensors = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118 no mapping
        sizes.append(sum(tensor.nbytes for tensor in tensors))
        assert sizes[-1] <= 5000 or len(tensors) == 1
    assert len(sizes) > 3 and max(sizes) == 97 * 16 * 4, "the embedding has a file of its own"
    assert torch.equal(_logits(kind, tmp_path / "out"), logits)


def test_a_dtype_is_cast_when_it_is_asked_for(trained: Trained, tmp_path: Path) -> None:
    kind, path, _ = trained
    export_hugging_face(path, tmp_path / "same")
    assert _mics("export", path, "--to", "hf", tmp_path / "cast", "--dtype", "bfloat16").exit_code == 0
    same, cast = (AUTO[kind].from_pretrained(tmp_path / name).state_dict() for name in ("same", "cast"))
    for name, tensor in same.items():
        assert tensor.dtype == torch.float32 and torch.equal(cast[name], tensor.bfloat16())


# -- what it reads, and refuses ----------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_it_reads_is_verified_first(tmp_path: Path) -> None:
    path, out = tmp_path / "saved", tmp_path / "out"
    save_alone(path, Parts())
    _flip(next(path.glob("optimizer-*.distcp")))
    export_hugging_face(path, tmp_path / "weights", model="generator")
    result = _mics("export", path, "--to", "hf", out, "--model", "generator", "--verify", "full")
    assert result.exit_code == 1 and "optimizer-00000-0.distcp: its bytes are not those that were" in result.stderr
    _flip(next(path.glob("model-*.distcp")))
    result = _mics("export", path, "--to", "hf", out, "--model", "generator")
    assert result.exit_code == 1 and "model-00000-0.distcp: its bytes are not those that were" in result.stderr
    assert not out.exists()
    assert _mics("export", path, "--to", "hf", out, "--model", "generator", "--verify", "off").exit_code == 0


class Parts(nn.Module):
    """Two models of `transformers`, one tied to what lies outside of it and before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 16)
        self.generator = AUTO["gpt2"].from_config(CONFIGS["gpt2"])
        self.nested = nn.ModuleDict({"critic": AUTO["bert"].from_config(CONFIGS["bert"])})
        self.generator.set_input_embeddings(self.embed)
        self.generator.tie_weights()


def test_one_of_several_models_is_chosen(tmp_path: Path) -> None:
    module = Parts().eval()
    save_alone(tmp_path / "saved", module)
    for kind, name, model in (("gpt2", "generator", module.generator), ("bert", "nested.critic", module.nested.critic)):
        result = _mics("export", tmp_path / "saved", "--to", "hf", tmp_path / kind, "--model", name)
        assert result.exit_code == 0, result.output
        with torch.no_grad():
            assert torch.equal(_logits(kind, tmp_path / kind), model(input_ids=IDS).logits)
    for model, says in ((None, "holds several Hugging Face models; choose model= one of"), ("x", "model='x' is no")):
        with pytest.raises(ValueError, match=says + r".*'generator', 'nested\.critic'"):
            export_hugging_face(tmp_path / "saved", tmp_path / "out", model=model)


def test_a_module_that_is_the_model_itself(tmp_path: Path) -> None:
    model = AUTO["bert"].from_config(CONFIGS["bert"]).eval()
    save_alone(tmp_path / "saved", model)
    export_hugging_face(tmp_path / "saved", tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(_logits("bert", tmp_path / "out"), model(input_ids=IDS).logits)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    save_alone(tmp_path / "saved", nn.Linear(2, 2))
    out = tmp_path / "out"
    cases = {
        "holds no Hugging Face model": (tmp_path / "saved", out),
        "is not a checkpoint; give the directory": (tmp_path / "nowhere", out),
        "dtype='int3' is not understood; choose one of float32, bfloat16": (tmp_path / "saved", out, "--dtype", "int3"),
        "'5 pounds' is no size": (tmp_path / "saved", out, "--max-shard-size", "5 pounds"),
        "verify='a bit' is not understood": (tmp_path / "saved", out, "--verify", "a bit"),
        "is there already; name one that is not": (tmp_path / "saved", tmp_path),
    }
    for says, arguments in cases.items():
        result = _mics("export", *arguments, "--to", "hf")
        assert result.exit_code == 2 and result.stderr.startswith("error: ") and says in result.stderr, result.output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["saved"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left, as meant")

    save_alone(tmp_path / "saved", Parts())
    monkeypatch.setattr("lightning_mics.checkpoint.safetensors.os.fsync", full)
    result = _mics("export", tmp_path / "saved", "--to", "hf", tmp_path / "out", "--model", "generator")
    assert result.exit_code == 2 and "error: no space left, as meant" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


# -- memory ------------------------------------------------------------------------------------------------------------


class Large(nn.Module):
    """A model of tensors of 8 MB, as far as an export can tell."""

    base_model_prefix = "large"

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.config = CONFIGS["bert"]
        self.layers = nn.ModuleList(nn.Linear(2000, 1000, bias=False) for _ in range(tensors))


def _growth(path: Path) -> int:
    """Bytes by which a process grows for 24 tensors that before has exported two."""
    device, before = torch.device("cpu"), 0
    for tensors in (2, 24):
        memory.reset_peak(device)
        before = memory.in_use(device)
        export_hugging_face(path / f"{tensors}", path / f"{tensors}-out", max_shard_size="50MB")
    return memory.peak(device) - before


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    for tensors in (2, 24):
        save_alone(tmp_path / f"{tensors}", Large(tensors))
    (growth,) = run_ranks(1, _growth, tmp_path)
    # One is two, as it is read and copied, and the C library keeps what was freed for a while.
    assert growth < 24 * 8e6 / 2, f"{growth} bytes for 24 tensors of 8 MB"
    assert len([*(tmp_path / "24-out").glob("*.safetensors")]) == 4


# -- the format --------------------------------------------------------------------------------------------------------


def test_the_formats_own_reader_reads_every_dtype(tmp_path: Path) -> None:
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    others = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    values = torch.arange(-6, 6)
    tensors = {f"größe.{dtype}": values.to(dtype).reshape(3, 4) for dtype in (*others, *floats)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "odd": torch.ones(7, dtype=torch.uint8)}
    tensors["turned"] = torch.arange(6.0).reshape(2, 3).T
    write(tmp_path / "all.safetensors", tensors, tensors.__getitem__)
    with safe_open(tmp_path / "all.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"} and set(opened.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = opened.get_tensor(name)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    content = (tmp_path / "all.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:start]).items():
        where = start + entry.get("data_offsets", [0])[0]
        assert name == "__metadata__" or where % tensors[name].itemsize == 0, f"{name} is not aligned"
    with pytest.raises(ValueError, match=r"a has torch\.complex128, which safetensors does not have"):
        write(tmp_path / "x.safetensors", {"a": torch.zeros(2, dtype=torch.complex128)}, tensors.__getitem__)
