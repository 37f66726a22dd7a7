"""`mics show` and `mics verify`: what they say, how they exit, and that they start without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mics_tools.cli import app
from mics_tools.manifest import NAME, Manifest, TensorEntry, file_as_written

FILES = {
    "model-00000-0.distcp": b"m" * 3000,
    "model-00001-0.distcp": b"n" * 3000,
    "optimizer-00000-0.distcp": b"o" * 9000,
    ".metadata": b"index",
    "lightning.pt": b"rest",
}
TENSORS = {
    "model.a.weight": TensorEntry("float32", (30, 40)),
    "model.a.bias": TensorEntry("bfloat16", (40,)),
    "optimizer.0.a.weight.exp_avg": TensorEntry("float32", (30, 40)),
    "optimizer.0.a.weight.step": TensorEntry("float32", ()),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory laid out as a checkpoint; what the files hold is not looked at."""
    folder = tmp_path / "step=30.ckpt"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    manifest = Manifest(
        step=30,
        epoch=2,
        saved="2026-11-23T19:59:56+00:00",
        writers="all",
        versions={"lightning-mics": "0.1.0", "torch": "2.13.0"},
        topology={"world_size": 8, "ranks_per_node": 4, "partition_size": 2},
        files={name: file_as_written(folder / name) for name in FILES},
        tensors=TENSORS,
        models={"network": {"model_type": "bert", "architectures": ["BertForMaskedLM"]}},
    )
    (folder / NAME).write_text(manifest.to_text())
    return folder


def _mics(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _rows(text: str) -> list[list[str]]:
    """The cells of tables, and the words of other lines."""
    return [[cell.strip() for cell in line.strip("│┃ \n").replace("┃", "│").split("│")] for line in text.splitlines()]


# -- show --------------------------------------------------------------------------------------------------------------


def test_show_tells_what_there_is(checkpoint: Path) -> None:
    result = _mics("show", checkpoint)
    assert result.exit_code == 0
    text, rows = " ".join(result.stdout.split()), _rows(result.stdout)
    for fact in (
        "2026-11-23T19:59:56+00:00",
        "30, in epoch 2",
        "8 ranks, 4 a node, in partition groups of 2",
        "all ranks",
        "lightning-mics 0.1.0, torch 2.13.0",
        "BertForMaskedLM (bert) at 'network'",
    ):
        assert fact in text
    assert ["model", "float32", "1", "1.2 k"] in rows and ["model", "bfloat16", "1", "40"] in rows
    assert ["optimizer", "float32", "2", "1.2 k"] in rows
    assert ["model", "2", "6 kB"] in rows and ["optimizer", "1", "9 kB"] in rows
    assert ["the rest", "2", "9 B"] in rows and ["all", "5", "15 kB"] in rows
    assert f"{checkpoint}: whole by the sizes of its files, 5 files, 15 kB" in result.stdout


def test_show_compares_sizes_and_reads_nothing_else(checkpoint: Path) -> None:
    _flip(checkpoint / "model-00000-0.distcp")
    assert _mics("show", checkpoint).exit_code == 0
    (checkpoint / "model-00000-0.distcp").write_bytes(b"short")
    result = _mics("show", checkpoint)
    assert result.exit_code == 1
    assert f"{checkpoint}: damaged\n  model-00000-0.distcp: 5 bytes of 3000\n" in result.stdout
    assert "8 ranks" in result.stdout


# -- verify ------------------------------------------------------------------------------------------------------------


def test_verify_names_every_damaged_file_with_what_is_wrong(checkpoint: Path) -> None:
    assert _mics("verify", checkpoint).stdout == f"{checkpoint}: whole, 5 files, 15 kB\n"
    _flip(checkpoint / "optimizer-00000-0.distcp")
    (checkpoint / "model-00001-0.distcp").unlink()
    (checkpoint / "lightning.pt").write_bytes(b"")
    result = _mics("verify", checkpoint)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{checkpoint}: damaged",
        "  model-00001-0.distcp: missing",
        "  optimizer-00000-0.distcp: its bytes are not those that were written",
        "  lightning.pt: 0 bytes of 4",
    ]


def test_quick_compares_sizes_alone(checkpoint: Path) -> None:
    _flip(checkpoint / "model-00000-0.distcp")
    result = _mics("verify", "--quick", checkpoint)
    assert result.exit_code == 0 and "whole by the sizes of its files" in result.stdout
    (checkpoint / "model-00000-0.distcp").unlink()
    assert _mics("verify", "--quick", checkpoint).exit_code == 1


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_manifest_that_is_not_what_was_written_is_damage(checkpoint: Path, command: str) -> None:
    path = checkpoint / NAME
    path.write_text(path.read_text().replace('"step": 30', '"step": 31'))
    result = _mics(command, checkpoint)
    assert result.exit_code == 1 and f"  {NAME}: its checksum is not that of its text" in result.stdout
    path.unlink()
    result = _mics(command, checkpoint)
    assert result.exit_code == 1 and f"  {NAME}: missing" in result.stdout


@pytest.mark.parametrize("command", ["show", "verify"])
def test_what_is_no_checkpoint(tmp_path: Path, command: str) -> None:
    for path, says in ((tmp_path / "nowhere", "is not a checkpoint"), (tmp_path, "is not a checkpoint")):
        result = _mics(command, path)
        assert result.exit_code == 2 and f"error: {path} {says}; give the directory that was saved" in result.stderr
    (tmp_path / "file.ckpt").write_text("one file")
    result = _mics(command, tmp_path / "file.ckpt")
    assert result.exit_code == 2 and "is a single file, not a checkpoint directory" in result.stderr


def test_several_are_all_verified(checkpoint: Path, tmp_path: Path) -> None:
    assert _mics("verify", checkpoint, checkpoint).exit_code == 0
    _flip(checkpoint / "lightning.pt")
    result = _mics("verify", tmp_path, checkpoint)
    assert result.exit_code == 2 and f"{checkpoint}: damaged" in result.stdout


@pytest.mark.parametrize("command", ["show", "verify"])
def test_what_a_save_that_did_not_end_left_is_told(
    checkpoint: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint.parent / ".step=40.ckpt.partial").mkdir()
    monkeypatch.chdir(checkpoint)
    result = _mics(command, ".")
    assert result.exit_code == 0
    assert f"note: {checkpoint.parent}/.step=40.ckpt.partial was left by a save that did not end" in result.stderr


# -- as a process ------------------------------------------------------------------------------------------------------


def test_they_start_without_torch(checkpoint: Path) -> None:
    script = """if True:
        import json, sys
        from mics_tools.cli import app
        for command in ("show", "verify"):
            app([command, sys.argv[1]], standalone_mode=False)
        print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
    """
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", script, str(checkpoint)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert "mics_tools" in imported
    assert not imported & {"torch", "lightning", "lightning_mics", "numpy", "transformers"}


def test_it_is_a_module_as_well(checkpoint: Path) -> None:
    _flip(checkpoint / "lightning.pt")
    command = [sys.executable, "-m", "mics_tools", "verify", str(checkpoint)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 1 and "lightning.pt" in done.stdout
