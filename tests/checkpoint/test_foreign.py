"""Sharded checkpoints that Lightning's own strategies write are resumed from: every value, and nothing that runs."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.fsdp import fully_shard

from lightning_mics.checkpoint import Checkpoint
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import (
    WIDTH,
    Batches,
    Toy,
    assert_close,
    assert_same_losses,
    mics,
    optimizer_state,
    parameters,
    seeded,
    trainer,
)


class Tied(Toy):
    """Two groups of parameters, two layers with one weight, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.twin = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.twin.weight = self.middle.weight
        self.register_buffer("offset", torch.arange(8.0) / 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x + self.offset)
        for layer in (*self.layers, self.middle, self.twin):
            x = layer(x)
        return self.leave(x)

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim == 1]
        return torch.optim.AdamW([{"params": others, "weight_decay": 0.0}, {"params": decayed}], lr=self.lr)


class ByHand(Tied):
    """Sharded as ModelParallelStrategy has its users do it."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)


class Looks(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.seen = parameters(pl_module), optimizer_state(trainer.optimizers[0])


class Saves(Looks):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)
            self.seen = parameters(pl_module), optimizer_state(trainer.optimizers[0])


def _resumed(path: Path) -> list[str]:
    saves, looks = Saves(path), Looks()
    whole = seeded(ByHand)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer(strategy, callbacks=[saves]).fit(whole, Batches(6))
    resumed = seeded(Tied, 99)
    trainer(mics(), callbacks=[looks]).fit(resumed, Batches(6), ckpt_path=path)
    assert_close(looks.seen[0], saves.seen[0], "parameters")
    assert_close(looks.seen[1], saves.seen[1], "optimizer state")
    assert_same_losses(resumed.losses, whole.losses[3:], "after the resume", rtol=1e-5)
    alone = Checkpoint(path).read()
    if dist.get_rank() == 0 and alone["state_dict"].keys() != whole.state_dict().keys():
        raise AssertionError(sorted(alone["state_dict"].keys() ^ whole.state_dict().keys()))
    return sorted(os.listdir(path))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("foreign") / "mp.ckpt"
    names, _ = run_ranks(2, _resumed, path)
    assert "meta.pt" in names and "manifest.json" not in names
    return path


class Plants:
    """A pickle of it makes a folder where it is opened."""

    def __init__(self, flag: str) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.mkdir, (self.flag,)


@pytest.mark.parametrize("key", ["optimizer_0.param_groups.0.lr", "state_dict.enter.weight"])
def test_what_is_no_tensor_in_it_runs_nothing(foreign: Path, tmp_path: Path, key: str) -> None:
    """The library's own reader would run it."""
    index = pickle.loads((foreign / ".metadata").read_bytes())
    buffer, flag = io.BytesIO(), tmp_path / "planted"
    torch.save(Plants(str(flag)), buffer)
    place = next(place for at, place in index.storage_data.items() if at.fqn == key)
    index.state_dict_metadata[key] = BytesStorageMetadata()
    place.relative_path, place.offset, place.length = "planted.distcp", 0, len(buffer.getvalue())
    others = {at: its for at, its in index.storage_data.items() if at.fqn != key}
    index.storage_data = {**others, MetadataIndex(key): place}
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for file in foreign.iterdir():
        (hostile / file.name).write_bytes(file.read_bytes())
    (hostile / ".metadata").write_bytes(pickle.dumps(index))
    (hostile / "planted.distcp").write_bytes(buffer.getvalue())
    with pytest.raises(pickle.UnpicklingError, match=r"posix.mkdir"):
        Checkpoint(hostile).read()
    assert not flag.exists()


def test_every_value_of_a_sharded_checkpoint_of_lightnings_is_there(foreign: Path) -> None:
    found = Checkpoint(foreign).read()
    assert [group["weight_decay"] for group in found["optimizer_states"][0]["param_groups"]] == [0.0, 0.01]
    assert found["global_step"] == 3
