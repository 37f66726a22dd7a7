"""Single files: a checkpoint directory becomes one for plain Lightning; plain Lightning's are read into shards."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from lightning_mics import consolidate
from mics_tools.cli import app
from tests.checkpoint.saving import save_alone
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import (
    WIDTH,
    Batch,
    Batches,
    Toy,
    batch_of,
    ddp,
    mics,
    optimizer_state,
    parameters,
    seeded,
    trainer,
)
from tests.raising import raised


class Counter(nn.Module):
    """Keeps a number outside tensors, and one in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.seen += 1
        return x

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class Whole(Toy):
    """Everything that a checkpoint holds: hyperparameters, tied weights, a schedule, what is not a parameter.

    It sees the four ranks' batches of each micro-step, however many ranks there are.
    """

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()
        self.middle, self.twin = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.twin.weight = self.middle.weight
        self.counter = Counter()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(self.counter(x))
        for layer in (*self.layers, self.middle, self.twin):
            x = layer(x)
        return self.leave(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        mine = range(dist.get_rank(), 4, dist.get_world_size())
        loss = torch.stack([self.loss(batch_of(batch_idx, rank)) for rank in mine]).mean()
        everyone = loss.detach().clone()
        dist.all_reduce(everyone)
        self.losses.append(everyone.item() / dist.get_world_size())
        return loss

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim == 1]
        groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Saves(pl.Callback):
    """Saves in mid-epoch, after the third of six steps, and looks at what it saved."""

    def __init__(self, path: Path, weights_only: bool = False) -> None:
        self.path, self.weights_only = path, weights_only

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path, weights_only=self.weights_only)
            self.look = _look(trainer, module)

    state_key = "saves"

    def state_dict(self) -> dict[str, str]:
        return {"kept": "by a callback"}


class LooksAfterLoad(pl.Callback):
    state_key = "saves"

    def load_state_dict(self, state: dict[str, str]) -> None:
        self.kept = state["kept"]

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.look = _look(trainer, module)


def _values(tensors: Mapping[Any, Tensor]) -> dict[Any, Any]:
    """Every bit of them, in a form that passes between processes."""
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def _look(trainer: pl.Trainer, module: Any) -> dict[str, Any]:
    return {
        "parameters": _values(parameters(module)),
        "optimizer": _values(optimizer_state(trainer.optimizers[0])),
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in trainer.optimizers[0].param_groups],
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "calls": (module.counter.calls, module.counter.seen.item()),
        "at": (trainer.current_epoch, trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.ready),
    }


def _strategy(name: str) -> Any:
    return {"auto": lambda: "auto", "ddp": ddp, "mics 2": mics, "mics 4": lambda: mics(4)}[name]()


def _save(strategy: str, path: Path, weights_only: bool = False) -> Any:
    """Train six steps, saving after three; what was saved, and the losses of the other three."""
    module, saves = seeded(Whole, lr=2e-2), Saves(path, weights_only)
    trainer(_strategy(strategy), callbacks=[saves]).fit(module, Batches(6))
    return saves.look, module.losses[3:]


def _resume(strategy: str, path: Path | str) -> Any:
    """The same from a file, in a module of other values; what was loaded, the losses, and what the callback kept."""
    module, looks = seeded(Whole, 99, lr=2e-2), LooksAfterLoad()
    trainer(_strategy(strategy), callbacks=[looks]).fit(module, Batches(6), ckpt_path=path)
    return looks.look, module.losses, looks.kept


def _same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in expected:
        assert found[name] == expected[name], name


Consolidated = tuple[Path, dict[str, Any], list[float]]


# -- a directory becomes a file ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def consolidated(tmp_path_factory: pytest.TempPathFactory) -> Consolidated:
    """A file made of what four ranks saved in two partition groups, what they held, and how they went on."""
    path = tmp_path_factory.mktemp("consolidated")
    look, losses = run_ranks(4, _save, "mics 2", path / "sharded.ckpt")[0]
    consolidate(path / "sharded.ckpt", path / "whole.ckpt")
    return path / "whole.ckpt", look, losses


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Consolidated:
    """What one process saved without this package."""
    path = tmp_path_factory.mktemp("plain") / "plain.ckpt"
    look, losses = run_ranks(1, _save, "auto", path)[0]
    return path, look, losses


def test_load_from_checkpoint_reads_it_in_a_process_without_a_group(consolidated: Consolidated) -> None:
    path, look, _ = consolidated
    assert not dist.is_initialized()
    module = Whole.load_from_checkpoint(path)
    assert _values(parameters(module)) == look["parameters"]
    assert module.twin.weight is module.middle.weight and module.hparams.lr == 2e-2
    assert (module.counter.calls, module.counter.seen.item()) == look["calls"] == (3, 3)


@pytest.mark.parametrize(("world", "strategy", "rel"), [(1, "auto", 1e-6), (2, "ddp", 1e-6), (4, "mics 4", 1e-6)])
def test_plain_lightning_resumes_from_it(consolidated: Consolidated, world: int, strategy: str, rel: float) -> None:
    path, look, losses = consolidated
    for found, later, kept in run_ranks(world, _resume, strategy, path):
        _same_state(found, look)
        assert later == pytest.approx(losses, rel=rel)
        assert kept == "by a callback"


def test_a_url_is_resumed_from(plain: Consolidated) -> None:
    path, look, losses = plain
    found, later, _ = run_ranks(2, _resume, "mics 2", f"file://{path}")[0]
    _same_state(found, look)
    assert later == pytest.approx(losses, rel=1e-6)


def test_it_is_laid_out_as_lightnings_own(consolidated: Consolidated, plain: Consolidated) -> None:
    ours, theirs = torch.load(consolidated[0]), torch.load(plain[0])
    assert ours.keys() == theirs.keys() and ours["state_dict"].keys() == theirs["state_dict"].keys()
    (ours,), (theirs,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert [group["params"] for group in ours["param_groups"]] == [group["params"] for group in theirs["param_groups"]]
    assert ours["state"].keys() == theirs["state"].keys()


def test_a_directory_cannot_be_given_to_load_from_checkpoint(consolidated: Consolidated) -> None:
    """If this fails, Lightning reads directories, and the README need not send anybody to consolidate."""
    with pytest.raises(IsADirectoryError):
        Whole.load_from_checkpoint(consolidated[0].with_name("sharded.ckpt"))


def _save_weights(path: Path) -> Any:
    """Save weights, and let one rank alone consolidate them over an older file."""
    look, _ = _save("mics 2", path / "weights.ckpt", weights_only=True)
    if dist.get_rank() == 0:
        (path / "whole.ckpt").write_text("older")
        consolidate(str(path / "weights.ckpt"), str(path / "whole.ckpt"))
    return look


def test_one_rank_alone_replaces_a_file_of_weights(tmp_path: Path) -> None:
    look = run_ranks(2, _save_weights, tmp_path)[0]
    assert _values(parameters(Whole.load_from_checkpoint(tmp_path / "whole.ckpt"))) == look["parameters"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["weights.ckpt", "whole.ckpt"]
    assert "optimizer_states" not in torch.load(tmp_path / "whole.ckpt")


def test_what_cannot_be_consolidated(consolidated: Consolidated, tmp_path: Path) -> None:
    whole = consolidated[0]
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a checkpoint; give the directory"):
        consolidate(tmp_path / "nowhere", tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match="is a single file, not a checkpoint directory; use it as it is"):
        consolidate(whole, tmp_path / "file.ckpt")
    with pytest.raises(IsADirectoryError, match=r"file='.*' is a directory; name a file, as '.*whole\.ckpt'"):
        consolidate(whole.with_name("sharded.ckpt"), tmp_path)
    assert not [*tmp_path.iterdir()]


# -- by the command ----------------------------------------------------------------------------------------------------


def _export(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments), "--to", "lightning"])


def test_the_command_writes_what_plain_lightning_loads_and_resumes_from(
    consolidated: Consolidated, tmp_path: Path
) -> None:
    path, look, losses = consolidated
    file = tmp_path / "new" / "file.ckpt"
    result = _export(path.with_name("sharded.ckpt"), file)
    assert result.exit_code == 0 and f"written to {file}, " in result.stdout
    assert _values(parameters(Whole.load_from_checkpoint(file))) == look["parameters"]
    for found, later, _ in run_ranks(2, _resume, "ddp", file):
        _same_state(found, look)
        assert later == pytest.approx(losses, rel=1e-6)


def test_the_command_says_what_it_cannot_do(consolidated: Consolidated, tmp_path: Path) -> None:
    sharded, out = consolidated[0].with_name("sharded.ckpt"), tmp_path / "file.ckpt"
    damaged = shutil.copytree(sharded, tmp_path / "damaged.ckpt")
    next(damaged.glob("optimizer-*.distcp")).write_bytes(b"short")
    for code, says, result in (
        (1, "error: " + str(damaged) + " is damaged: optimizer-", _export(damaged, out)),
        (2, "is a single file, not a checkpoint directory", _export(consolidated[0], out)),
        (2, "is a directory; name a file", _export(sharded, tmp_path)),
        (2, "model, dtype: only of --to hf", _export(sharded, out, "--model", "x", "--dtype", "float32")),
    ):
        assert result.exit_code == code and says in " ".join(result.stderr.replace("│", "").split()), result.output
    assert [file.name for file in tmp_path.iterdir()] == ["damaged.ckpt"]


class Thing:
    """Not plain data."""


def test_objects_that_are_not_plain_data_are_loaded_when_that_is_asked_for(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="opens with weights_only=False alone"):
        save_alone(tmp_path / "saved", nn.Linear(2, 2), thing=Thing())
    result = _export(tmp_path / "saved", tmp_path / "file.ckpt")
    assert result.exit_code == 2 and "holds objects that are not plain data" in result.stderr
    assert _export(tmp_path / "saved", tmp_path / "file.ckpt", "--no-weights-only").exit_code == 0
    assert isinstance(torch.load(tmp_path / "file.ckpt", weights_only=False)["thing"], Thing)


def test_a_write_that_fails_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object, path: Path) -> None:
        path.write_text("half")
        raise OSError("no space left, as meant")

    save_alone(tmp_path / "saved", nn.Linear(2, 2))
    (tmp_path / "file.ckpt").write_text("older")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="as meant"):
        consolidate(tmp_path / "saved", tmp_path / "file.ckpt")
    assert (tmp_path / "file.ckpt").read_text() == "older"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file.ckpt", "saved"]


# -- a directory restores what is not a parameter ----------------------------------------------------------------------


def test_a_directory_restores_all_of_it(consolidated: Consolidated) -> None:
    path, look, losses = consolidated
    for found, later, kept in run_ranks(4, _resume, "mics 2", path.with_name("sharded.ckpt")):
        _same_state(found, look)
        assert later == losses and kept == "by a callback"


# -- a file is read into shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "strategy"), [(4, "mics 2"), (4, "mics 4")])
def test_a_file_of_plain_lightning_is_resumed_from(plain: Consolidated, world: int, strategy: str) -> None:
    path, look, losses = plain
    for found, later, kept in run_ranks(world, _resume, strategy, path):
        _same_state(found, look)
        assert later == pytest.approx(losses, rel=1e-6)
        assert kept == "by a callback"


class Truncates(LooksAfterLoad):
    """Somebody writes over the file in place, once it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            self.path.write_text("")
        dist.barrier()


def _overwritten(path: Path) -> Any:
    module = seeded(Whole, 99, lr=2e-2)
    trainer(mics(), callbacks=[Truncates(path)]).fit(module, Batches(6), ckpt_path=path)
    return module.losses


def test_nothing_is_left_in_the_file_once_it_is_loaded(plain: Consolidated, tmp_path: Path) -> None:
    """Memory that is mapped to a file which has become shorter kills the process that reads it."""
    for losses in run_ranks(2, _overwritten, shutil.copy(plain[0], tmp_path / "copy.ckpt")):
        assert losses == pytest.approx(plain[2], rel=1e-6)


class Renamed(Whole):
    """Has another name for a layer, and mends it where Lightning lets it."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.out = self.leave
        del self.leave

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in (*self.layers, self.middle, self.twin):
            x = layer(x)
        return self.out(x)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        for name in ("weight", "bias"):
            state[f"out.{name}"] = state.pop(f"leave.{name}")


def _evaluate(path: Path) -> Any:
    module = seeded(Renamed, 99)
    trainer(mics(4)).validate(module, Batches(1), ckpt_path=path, verbose=False)
    return _values(parameters(module))


def test_a_file_is_evaluated_after_the_modules_own_hook(plain: Consolidated) -> None:
    path, look, _ = plain
    expected = {name.replace("leave", "out"): value for name, value in look["parameters"].items()}
    for found in run_ranks(4, _evaluate, path):
        assert found == expected


class OneGroup(Whole):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class TwoOptimizers(Whole):
    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW([p]) for p in (self.enter.weight, self.leave.weight)]


class Wider(Whole):
    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.leave = nn.Linear(WIDTH, 5)


class Longer(Whole):
    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.more = nn.Linear(WIDTH, WIDTH)


def _misfits(path: Path) -> dict[str, str]:
    def fit(module: Toy, file: Path = path) -> str:
        return raised(lambda: trainer(mics()).fit(module, Batches(6), ckpt_path=file))

    def validate(module: Toy, **options: Any) -> str:
        run = trainer(mics(), **options)
        return raised(lambda: run.validate(module, Batches(1), ckpt_path=path, verbose=False))

    if dist.get_rank() == 0:
        checkpoint = torch.load(path)
        del checkpoint["optimizer_states"]
        torch.save(checkpoint, path.with_name("weights.ckpt"))
        path.with_name("text.ckpt").write_text("no checkpoint")
    dist.barrier()
    return {
        "groups": fit(seeded(OneGroup)),
        "optimizers": fit(seeded(TwoOptimizers)),
        "weights": fit(seeded(Whole), path.with_name("weights.ckpt")),
        "text": fit(seeded(Whole), path.with_name("text.ckpt")),
        "shape": validate(seeded(Wider)),
        "name": validate(seeded(Longer)),
        "dtype": validate(seeded(Whole), precision="64-true"),
    }


@pytest.fixture(scope="module")
def misfits(plain: Consolidated) -> list[dict[str, str]]:
    return run_ranks(2, _misfits, plain[0])


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("groups", "ValueError: the optimizer holds groups of [19] parameters, the checkpoint [13, 6]"),
        ("optimizers", "was saved with 1 optimizers, there are 2 now; return as many from configure_optimizers"),
        ("weights", "holds weights only, no optimizer state to resume from; "),
        ("text", "text.ckpt holds objects that are not plain data, or is no checkpoint: "),
        ("name", 'Missing key(s) in state_dict: "more.weight"'),
        ("shape", "size mismatch for leave.weight"),
        ("dtype", "enter.weight: saved as torch.float32, the module has torch.float64"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_on_every_rank(misfits: list[dict[str, str]], case: str, says: str) -> None:
    for found in misfits:
        assert says in found[case]
