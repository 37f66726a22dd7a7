"""Nothing in a checkpoint runs code when it is opened, unless the user asks for it by name."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import StorageMeta

from lightning_mics import consolidate
from lightning_mics.checkpoint import Checkpoint
from lightning_mics.checkpoint.metadata import Reader
from mics_tools.manifest import NAME, Manifest, file_as_written
from tests.checkpoint.saved import dump, made, save
from tests.distributed.ranks import run_ranks


class Plants:
    """A pickle of it makes a file where it is opened."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.flag),)


def _save(path: Path) -> None:
    module, optimizer = made()
    save(path, dump(module, optimizer), module)


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("safety") / "harmless"
    run_ranks(2, _save, path)
    return path


@pytest.fixture
def hostile(harmless: Path, tmp_path: Path) -> Path:
    shutil.copytree(harmless, tmp_path / "hostile")
    return tmp_path / "hostile"


def _sign(path: Path) -> None:
    """Give the manifest the checksums of what is there now, as somebody who means harm would."""
    manifest = Manifest.of(path)
    files = {name: file_as_written(path / name) for name in manifest.files}
    (path / NAME).write_text(Manifest(**{**manifest.__dict__, "files": files}).to_text())


def _index_in(path: Path, index: Any) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(index))


def _plant(path: Path, where: str, flag: Path) -> None:
    plants = Plants(flag)
    if where == ".metadata":
        _index_in(path, plants)
    elif where == "inside .metadata":
        index = pickle.loads((path / ".metadata").read_bytes())
        index.planner_data = {"x": plants}
        _index_in(path, index)
    elif where == "lightning.pt":
        torch.save({"state_dict": {}, "callbacks": plants}, path / where)
    elif where == "ranks.pt":
        torch.save({0: plants}, path / where)
    else:
        place = next(iter(pickle.loads((path / ".metadata").read_bytes()).storage_data.values()))
        file = path / place.relative_path
        torch.save(plants, path / "planted")
        content = (path / "planted").read_bytes().ljust(place.length, b"\0")
        file.write_bytes(file.read_bytes()[: place.offset] + content + file.read_bytes()[place.offset + place.length :])
    _sign(path)


def _load(path: Path, everything: bool = True) -> tuple[str, str]:
    module, optimizer = made(steps=0)
    try:
        Checkpoint(path).load(module, [optimizer])
        Checkpoint(path).of_this_rank()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize("where", [".metadata", "inside .metadata", "lightning.pt", "ranks.pt", "a tensor's bytes"])
def test_a_hostile_checkpoint_runs_nothing(hostile: Path, tmp_path: Path, where: str) -> None:
    flag = tmp_path / "planted"
    _plant(hostile, where, flag)
    ((error, says),) = run_ranks(1, _load, hostile)
    assert not flag.exists()
    assert error != "nothing", says
    if ".metadata" in where:
        assert "asks for posix.mkdir, which no index of tensors holds" in says
    if where == "lightning.pt":
        assert "posix.mkdir" in says and "pass weights_only=False" in says
    if where == "lightning.pt":  # the same file does its work when it is asked to
        with pytest.raises(KeyError):
            Checkpoint(hostile).read(weights_only=False)
        assert flag.exists()


def test_an_index_that_names_files_elsewhere_is_refused(hostile: Path) -> None:
    index = pickle.loads((hostile / ".metadata").read_bytes())
    next(iter(index.storage_data.values())).relative_path = "../elsewhere"
    _index_in(hostile, index)
    _sign(hostile)
    with pytest.raises(pickle.UnpicklingError, match=r"names \.\./elsewhere, outside the checkpoint"):
        Checkpoint(hostile).read()


class Kept:
    """What a user might put among hyperparameters."""


def _save_objects(path: Path) -> list[str]:
    import warnings

    module, optimizer = made()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        save(path, dump(module, optimizer, hyper_parameters={"kept": Kept()}), module)
    return [str(warning.message) for warning in told if "weights_only" in str(warning.message)]


def test_what_is_not_plain_data_is_told_at_the_save_and_needs_to_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "objects"
    told = run_ranks(2, _save_objects, path)
    assert len(told[0]) == 1 and "opens with weights_only=False alone" in told[0][0] and "Kept" in told[0][0]
    assert not told[1]
    with pytest.raises(ValueError, match=r"Kept.*if you trust who saved it, pass weights_only=False"):
        consolidate(path, tmp_path / "file.ckpt")
    consolidate(path, tmp_path / "file.ckpt", weights_only=False)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file.ckpt", weights_only=True)


def test_an_index_that_python_3_13_wrote_is_read(hostile: Path) -> None:
    """There alone the classes of paths have another home."""
    index = pickle.loads((hostile / ".metadata").read_bytes())
    index.storage_meta = StorageMeta(checkpoint_id=PurePosixPath("elsewhere"))
    names = (b"cpathlib._local\n", b"cpathlib\n")
    written = pickle.dumps(index, protocol=2)  # names are lines in it
    here, there = names if names[0] in written else names[::-1]
    (hostile / ".metadata").write_bytes(written.replace(here, there))
    assert there in (hostile / ".metadata").read_bytes()
    assert Reader(hostile).read_metadata().storage_meta.checkpoint_id == PurePosixPath("elsewhere")
