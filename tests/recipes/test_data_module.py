"""The data module: its arguments, what a Trainer does with it, and resuming at the exact sample."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import recipes
from recipes.data import SpecialToken, TextDataModule
from tests.distributed.ranks import run_ranks

ROOT = Path(recipes.__file__).parents[1]
SEQ_LEN = 16
BATCH_SIZE = 2


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    for number in range(20):
        words = ["".join(rng.choices("abcdefghij", k=4)) for _ in range(10)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def options(texts: Path, cache: Path) -> dict[str, Any]:
    return {
        "path": str(texts),
        "cache_dir": cache,
        "seq_len": SEQ_LEN,
        "batch_size": BATCH_SIZE,
        "vocab_size": 300,
        "val_fraction": 0.2,
        "seed": 3,
    }


class Recorder(LightningModule):
    """A model of one weight that writes down every training batch, and in each checkpoint how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[list[list[int]]] = []
        self.validations: list[list[list[int]]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"].tolist())
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.validations.append(batch["input_ids"].tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seen"] = len(self.seen)


def train(folder: Path, options: dict[str, Any], ckpt_path: Path | None = None, **trainer: Any) -> Recorder:
    model = Recorder()
    checkpoints = trainer.pop("checkpoints", {})
    Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **checkpoints)],
        **trainer,
    ).fit(model, datamodule=TextDataModule(**options), ckpt_path=ckpt_path)
    return model


EPOCHS, STEPS = {"max_epochs": 3}, {"max_epochs": -1, "max_steps": 36}
BY_STEP = {"every_n_train_steps": 4}
AFTER_EPOCH = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
AFTER_VALIDATION = {"every_n_epochs": 1, "save_on_train_epoch_end": False}


# Lightning says where the files of a resumed run went, that it would like more workers, and that epochs are short.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("checkpoints", "length", "accumulate", "objective"),
    [
        (BY_STEP, EPOCHS, 1, "causal"),
        (BY_STEP, STEPS, 2, "masked"),
        (AFTER_EPOCH, EPOCHS, 2, "masked"),
        (AFTER_EPOCH, STEPS, 1, "causal"),
        (AFTER_VALIDATION, EPOCHS, 2, "causal"),
        (AFTER_VALIDATION, STEPS, 1, "masked"),
    ],
)
def test_a_resumed_run_sees_what_it_would_have_seen(
    tmp_path: Path, options: dict[str, Any], checkpoints: Any, length: dict[str, int], accumulate: int, objective: str
) -> None:
    options = {**options, "objective": objective}
    run = {**length, "checkpoints": checkpoints, "accumulate_grad_batches": accumulate}
    whole = train(tmp_path / "whole", options, **run)
    files = sorted((tmp_path / "whole").glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    assert len(files) >= 2
    for number, file in enumerate(files):
        seen = torch.load(file, weights_only=True)["seen"]
        resumed = train(tmp_path / str(number), options, file, **run)
        assert resumed.seen == whole.seen[seen:], f"resumed from {file.name}"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_resumes_exactly_with_workers_that_load_ahead(tmp_path: Path, options: dict[str, Any]) -> None:
    run = {"max_epochs": -1, "max_steps": 12, "checkpoints": {"every_n_train_steps": 5}, "accumulate_grad_batches": 2}
    whole = train(tmp_path / "whole", options, **run)
    options["num_workers"] = 2
    train(tmp_path / "workers", options, **run)
    resumed = train(tmp_path / "resumed", options, next((tmp_path / "workers").glob("*step=5.ckpt")), **run)
    assert resumed.seen == whole.seen[10:]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_resumes_with_the_next_sample_at_another_batch_size(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = train(tmp_path / "whole", options, max_steps=8)
    train(tmp_path / "first", options, max_steps=4, checkpoints={"every_n_train_steps": 4})
    options["batch_size"] *= 2
    resumed = train(tmp_path / "second", options, tmp_path / "first" / "epoch=0-step=4.ckpt", max_steps=6)
    assert [one + next_one for one, next_one in zip(whole.seen[4::2], whole.seen[5::2], strict=True)] == resumed.seen


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_data_cannot_be_resumed(tmp_path: Path, options: dict[str, Any]) -> None:
    train(tmp_path, options, max_steps=4, checkpoints={"every_n_train_steps": 4})
    options["seed"] += 1
    with pytest.raises(ValueError, match=r"the checkpoint's data were .*'seed': 3.*these are .*'seed': 4"):
        train(tmp_path, options, tmp_path / "epoch=0-step=4.ckpt", max_steps=6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_validation_is_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    model = train(tmp_path, {**options, "objective": "masked"}, max_epochs=2, num_sanity_val_steps=0)
    half = len(model.validations) // 2
    assert half > 0
    assert model.validations[:half] == model.validations[half:]


def recorded(options: dict[str, Any]) -> tuple[Any, Any]:
    """What a rank sees in training and in validation."""
    model = Recorder()
    Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, datamodule=TextDataModule(**options))
    return model.seen, model.validations


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ranks_share_the_samples_as_one_process_would_take_them(tmp_path: Path, options: dict[str, Any]) -> None:
    # A cache of its own: this run makes the tokens, in one of its processes.
    (seen_0, validated_0), (seen_1, validated_1) = run_ranks(2, recorded, {**options, "cache_dir": tmp_path / "cache"})
    together = train(tmp_path, {**options, "batch_size": 2 * BATCH_SIZE}, max_epochs=2, num_sanity_val_steps=0)
    assert [share_0 + share_1 for share_0, share_1 in zip(seen_0, seen_1, strict=True)] == together.seen
    validated = {str(sample) for batch in (*validated_0, *validated_1) for sample in batch}
    assert validated == {str(sample) for batch in together.validations for sample in batch}
    assert len(validated_0) == len(validated_1)


def opened(options: dict[str, Any], **others: Any) -> TextDataModule:
    data = TextDataModule(**{**options, **others})
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_batch_is_what_transformers_takes(options: dict[str, Any], objective: str) -> None:
    data = opened(options, objective=objective)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert set(batch) == {"input_ids", "labels"}
        for values in batch.values():
            assert values.dtype == torch.int64
            assert values.shape == (BATCH_SIZE, SEQ_LEN)


def test_the_summary(options: dict[str, Any], texts: Path, cache: Path) -> None:
    data = opened(options)
    summary = data.describe()
    assert (summary.name, summary.folder.parent, summary.documents) == (str(texts), cache, 20)
    assert summary.train_samples == summary.train_tokens // SEQ_LEN == BATCH_SIZE * len(data.train_dataloader())
    assert summary.validation_samples == summary.validation_tokens // SEQ_LEN
    assert summary.log_vocab == pytest.approx(math.log(300))
    assert 1 < data.unigram_entropy == summary.unigram_entropy < summary.log_vocab


def test_text_goes_to_ids_and_back(options: dict[str, Any]) -> None:
    data = opened(options)
    ids = data.encode("añ [EOS]\n")
    assert ids.dtype == torch.int64
    assert data.decode(ids) == "añ [EOS]\n"
    assert data.decode([SpecialToken.CLS, *ids.tolist(), SpecialToken.EOS]) == "añ [EOS]\n"


def test_nothing_can_be_asked_before_the_tokens_are_there(options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"the tokens are not open; call prepare_data\(\) and setup\(\)"):
        TextDataModule(**options).describe()


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LIGHTNING_MICS_CACHE", raising=False)
    assert TextDataModule().cache_dir == Path.home() / ".cache" / "lightning-mics"
    monkeypatch.setenv("LIGHTNING_MICS_CACHE", str(tmp_path))
    assert TextDataModule().cache_dir == tmp_path
    assert TextDataModule(cache_dir="/elsewhere").cache_dir == Path("/elsewhere")


class Rank0:
    """A trainer whose rank 0 has the tokens of another key."""

    def __init__(self, key: str | None) -> None:
        self.strategy = self
        self.key = key

    def broadcast(self, _: object) -> str | None:
        return self.key


def test_a_node_that_has_other_text_is_told(options: dict[str, Any]) -> None:
    data = TextDataModule(**options)
    data.prepare_data()
    data.trainer = Rank0("another-key")  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"another-key on this node: .* differs between the nodes; make text"):
        data.setup()
    data.trainer = Rank0(None)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"rank 0 has no tokens; call prepare_data\(\) before setup\(\)"):
        data.setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 261}, r"vocab_size=261 is too small; choose at least 262 \(all bytes"),
        ({"seq_len": 7}, r"seq_len=7 is too small; choose at least 8"),
        ({"batch_size": 0}, r"batch_size=0 is too small; choose at least 1"),
        ({"seed": -1}, r"seed=-1 is too small; choose at least 0"),
        ({"num_workers": -1}, r"num_workers=-1 is too small; choose at least 0"),
        ({"max_documents": 0}, r"max_documents=0 is too small; choose at least 1"),
        ({"val_fraction": 0.0}, r"val_fraction=0.0 is not between 0 and 1"),
        ({"val_fraction": 1.0}, r"val_fraction=1.0 is not between 0 and 1"),
        ({"objective": "both"}, r"objective='both' is unknown; choose one of causal, masked"),
        ({"path": "a", "dataset": "b"}, r"path='a' and dataset='b' are both given; give one of them"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextDataModule(**arguments)


def test_a_sequence_longer_than_the_text(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"seq_len=5000 is longer than the train side of .*, which has \d+ tokens"):
        opened(options, seq_len=5000)


def test_a_batch_larger_than_the_corpus(options: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"batch_size=500 on world_size=1 takes 500 samples a micro-step, and there are"
    ):
        opened(options, batch_size=500).train_dataloader()


def composed(data: str, *overrides: str) -> TextDataModule:
    given = [f"+data={data}", "+model.objective=masked", "+model.seq_len=32", "+seed=5", *overrides]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        module: TextDataModule = instantiate(compose(overrides=given).data)
    return module


def test_the_configuration_gives_the_constructors_own_defaults() -> None:
    data, default = composed("text"), TextDataModule()
    assert (data.objective, data.seq_len, data.seed) == ("masked", 32, 5)
    for name in ("corpus", "batch_size", "vocab_size", "val_fraction", "num_workers", "cache_dir"):
        assert getattr(data, name) == getattr(default, name)


def test_the_configuration_takes_any_path(texts: Path) -> None:
    assert next(composed("text", f"data.path={texts}").corpus.documents()).name == "0.txt"


def test_the_configuration_of_a_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [f"row {number} of a small dataset, long enough to fill samples of eight tokens" for number in range(40)]
    datasets.Dataset.from_dict({"body": rows}).save_to_disk(tmp_path / "rows")
    settings = {"dataset": tmp_path / "rows", "text_column": "body", "cache_dir": tmp_path / "cache"}
    sizes = {"seq_len": 8, "vocab_size": 300}
    data = composed("hf", *(f"data.{name}={value}" for name, value in {**settings, **sizes}.items()))
    data.prepare_data()
    data.setup()
    assert data.describe().documents == 40
    assert "small dataset" in data.decode(data.train_dataloader()._samples._tokens.ids[:100])  # type: ignore
