"""A checkpoint directory: one replica's bytes, whole or not there, and refused on every rank where it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_mics.checkpoint import Checkpoint
from tests.checkpoint.saved import Model, dump, made, save, sharded, trained
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import assert_close, optimizer_state, parameters


def _raised(action: Callable[[], object]) -> tuple[str, str]:
    """The class and the message of what `action` raises, CheckpointException (a BaseException) included."""
    try:
        action()
    except BaseException as exception:
        return type(exception).__name__, str(exception)
    return "nothing", ""


# -- what is written ---------------------------------------------------------------------------------------------------


def _save_wide(path: Path) -> int:
    module, optimizer = made(width=128)
    save(path, dump(module, optimizer), module)
    state = [*parameters(module).values(), *optimizer_state(optimizer).values(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in state)


def test_one_replica_is_written_and_shared_among_all_ranks(tmp_path: Path) -> None:
    replica = run_ranks(4, _save_wide, tmp_path / "one")[0]
    metadata = dcp.FileSystemReader(tmp_path / "one").read_metadata()
    chunks = [
        chunk.sizes.numel() * entry.properties.dtype.itemsize
        for entry in metadata.state_dict_metadata.values()
        for chunk in entry.chunks
    ]
    assert sum(chunks) == replica
    places = [(index.fqn, tuple(index.offset or ())) for index in metadata.storage_data]
    assert len(places) == len(set(places)) == len(chunks)
    assert not [name for name in metadata.state_dict_metadata if "head" in name], "a tied weight is one tensor"
    for kind in ("model", "optimizer"):
        sizes = [file.stat().st_size for file in (tmp_path / "one").glob(f"{kind}-*.distcp")]
        assert len(sizes) == 4 and max(sizes) < 1.1 * min(sizes)
    overhead = 2000 * len(chunks)  # of the serialised tensors' own headers
    assert replica <= sum(file.stat().st_size for file in (tmp_path / "one").glob("*.distcp")) < replica + overhead


def test_the_librarys_own_tool_makes_a_file_of_it(tmp_path: Path) -> None:
    run_ranks(4, _save_wide, tmp_path / "one")
    dcp_to_torch_save(tmp_path / "one", tmp_path / "file.pt")
    found, ours = torch.load(tmp_path / "file.pt", weights_only=True), Checkpoint(tmp_path / "one").read()
    whole = {f"model.{name}": value for name, value in ours["state_dict"].items() if "head" not in name}
    for name, state in ours["optimizer_states"][0]["state"].items():
        whole |= {f"optimizer.0.{name}.{field}": value for field, value in state.items()}
    assert_close(found, whole, "every tensor")


def _overwrite(path: Path) -> None:
    module, optimizer = made()
    checkpoint = Checkpoint(path)
    for note in ("first", "second"):
        save(path, dump(module, optimizer, note=note), module)
        if dist.get_rank() == 0:
            if [child.name for child in path.parent.iterdir()] != [path.name]:
                raise AssertionError(f"left over: {sorted(child.name for child in path.parent.iterdir())}")
            (path.parent / f".{path.name}.old" / "of a process that was killed").mkdir(parents=True)
        dist.barrier()
    other, its = made(steps=0)
    if checkpoint.load(other, [its])["note"] != "second":
        raise AssertionError("the first save is still there")
    assert_close(parameters(other), parameters(module), "parameters")
    assert_close(optimizer_state(its), optimizer_state(optimizer), "optimizer state")
    dist.barrier()
    if dist.get_rank() == 0:
        checkpoint.remove()
    dist.barrier()
    if path.exists():
        raise AssertionError("still there")


def test_the_same_path_is_overwritten_and_removed(tmp_path: Path) -> None:
    run_ranks(4, _overwrite, tmp_path / "again")


# -- saves that fail ---------------------------------------------------------------------------------------------------


class Unwritable:
    def __reduce__(self) -> Any:
        raise OSError("no space left, as meant")


def _full_disk(*_: Any, **__: Any) -> None:
    raise OSError("no space left, as meant")


def _failing_saves(path: Path) -> list[tuple[str, str]]:
    root = sharded(Model())
    module, optimizer, checkpoint = root.module, torch.optim.AdamW(root.parameters()), Checkpoint(path)
    trained(root, optimizer)
    save(path, dump(module, optimizer, note="whole"), module)
    before = parameters(module)
    trained(root, optimizer)
    rank, failures = dist.get_rank(), []
    rng = {"bad": Unwritable()} if rank == 2 else None
    failures.append(_raised(lambda: save(path, dump(module, optimizer), module, rng)))
    bad = {"bad": Unwritable()} if rank == 0 else {}
    failures.append(_raised(lambda: save(path, dump(module, optimizer, **bad), module)))
    with patch.object(dcp.FileSystemWriter, "write_data", _full_disk) if rank == 3 else nullcontext():
        failures.append(_raised(lambda: save(path, dump(module, optimizer), module)))
    other, its = made(steps=0)
    if checkpoint.load(other, [its])["note"] != "whole":
        raise AssertionError("what stood there was replaced")
    assert_close(parameters(other), before, "what stood there")
    save(path, dump(module, optimizer, note="healed"), module)
    if checkpoint.load(other, [its])["note"] != "healed":
        raise AssertionError("a save after a failed one")
    return failures


def test_a_rank_that_cannot_write_fails_the_save_on_all_and_leaves_what_stood_there(tmp_path: Path) -> None:
    for rank, (rng, rest, tensors) in enumerate(run_ranks(4, _failing_saves, tmp_path / "kept")):
        assert rng[0] == ("OSError" if rank == 2 else "RuntimeError") and "as meant" in rng[1]
        assert rest[0] == ("OSError" if rank == 0 else "RuntimeError") and "as meant" in rest[1]
        assert tensors[0] == ("OSError" if rank == 3 else "RuntimeError") and "no space left, as meant" in tensors[1]
        assert rank == 3 or "rank 3: OSError" in tensors[1]


# -- loads that do not fit ---------------------------------------------------------------------------------------------


def _misfits(path: Path) -> dict[str, tuple[str, str]]:
    module, optimizer = made()
    saved = Checkpoint(path / "saved")
    save(saved.path, dump(module, optimizer), module)
    save(path / "weights", {"state_dict": module.state_dict()}, module)
    if dist.get_rank() == 0:
        (path / "file.ckpt").write_text("one file")
    dist.barrier()

    wide, double, renamed = Model(16), Model().double(), Model()
    renamed.tail = renamed.norm
    del renamed.norm
    narrow = [torch.optim.AdamW(list(module.parameters())[1:])]
    unreadable = "not_there" if dist.get_rank() == 1 else "saved"
    before = parameters(module), optimizer_state(optimizer)
    found = {
        "missing": _raised(lambda: Checkpoint(path / "none").load(module, [])),
        "on one rank": _raised(lambda: Checkpoint(path / unreadable).load(module, [])),
        "a file": _raised(lambda: Checkpoint(path / "file.ckpt").load(module, [])),
        "weights": _raised(lambda: Checkpoint(path / "weights").load(module, [optimizer])),
        "shape": _raised(lambda: saved.load(sharded(wide).module, [])),
        "dtype": _raised(lambda: saved.load(sharded(double).module, [])),
        "name": _raised(lambda: saved.load(sharded(renamed).module, [])),
        "fewer": _raised(lambda: saved.load(module, narrow)),
        "optimizers": _raised(lambda: saved.load(module, [optimizer, optimizer])),
    }
    assert_close(parameters(module), before[0], "a refused load leaves the module")
    assert_close(optimizer_state(optimizer), before[1], "a refused load leaves the optimizer")
    saved.load(renamed, [], strict=False)
    assert_close(
        {k: v for k, v in parameters(renamed).items() if "tail" not in k},
        {k: v for k, v in before[0].items() if "norm" not in k},
        "strict=False loads what is there",
    )
    return found


@pytest.fixture(scope="module")
def misfits(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, str]]]:
    return run_ranks(4, _misfits, tmp_path_factory.mktemp("misfits"))


@pytest.mark.parametrize(
    ("case", "error", "says"),
    [
        ("missing", "FileNotFoundError", "is not a checkpoint"),
        ("a file", "ValueError", "is a single file, not a checkpoint directory"),
        ("weights", "ValueError", "holds weights only, no optimizer state to resume from"),
        ("shape", "ValueError", "embed.weight: saved with shape (13, 8) and torch.float32, the module has (13, 16)"),
        ("dtype", "ValueError", "the module has (13, 8) and torch.float64"),
        ("name", "ValueError", "missing in the checkpoint [tail.bias, tail.num_batches_tracked"),
        ("fewer", "ValueError", "first different: layers.0.weight here, embed.weight there"),
        ("optimizers", "ValueError", "was saved with 1 optimizers, there are 2 now"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(
    misfits: list[dict[str, tuple[str, str]]], case: str, error: str, says: str
) -> None:
    for found in misfits:
        assert found[case][0] == error
        assert says in found[case][1]


def test_what_one_rank_cannot_read_is_refused_on_every_rank(misfits: list[dict[str, tuple[str, str]]]) -> None:
    classes = [found["on one rank"][0] for found in misfits]
    assert classes == ["RuntimeError", "FileNotFoundError", "RuntimeError", "RuntimeError"]
    assert all("is not a checkpoint" in found["on one rank"][1] for found in misfits)
