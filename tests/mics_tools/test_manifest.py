"""A manifest says what was written, and no other text passes for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mics_tools.manifest import DamagedCheckpoint, File, Manifest, TensorEntry, file_as_written

MANIFEST = Manifest(
    step=7,
    epoch=2,
    saved="2026-01-02T03:04:05+00:00",
    writers="all",
    versions={"torch": "2.13.0"},
    topology={"world_size": 4, "ranks_per_node": 2, "partition_size": 2},
    files={"rng/a.pt": File(3, "00"), "b": File(5, "01")},
    tensors={"model.größe": TensorEntry("float32", (2, 3)), "model.step": TensorEntry("int64", ())},
    models={"net": {"model_type": "bert", "nested": {"a": [1, None]}}},
)


def test_what_is_written_is_read() -> None:
    assert Manifest.from_text(MANIFEST.to_text()) == MANIFEST
    assert MANIFEST.size == 8


@settings(deadline=None)
@given(st.data())
def test_no_other_text_passes_for_it(data: st.DataObject) -> None:
    text = MANIFEST.to_text().encode()
    place = data.draw(st.integers(0, len(text) - 1))
    how = data.draw(st.sampled_from(["another byte", "cut", "one more", "one less", "doubled"]))
    byte = bytes([data.draw(st.integers(0, 255).filter(lambda value: value != text[place]))])
    damaged = {
        "another byte": text[:place] + byte + text[place + 1 :],
        "cut": text[:place],
        "one more": text[:place] + byte + text[place:],
        "one less": text[:place] + text[place + 1 :],
        "doubled": text + text,
    }[how]
    with pytest.raises((ValueError, KeyError, TypeError)):
        Manifest.from_text(damaged.decode())


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda path: None, "manifest.json: missing"),
        (lambda path: path.mkdir(), "manifest.json: cannot be read: "),
        (lambda path: path.write_bytes(b"\xff\xfe"), "manifest.json: 'utf-8' codec"),
        (lambda path: path.write_text(MANIFEST.to_text().replace("\n", "\r\n")), "its checksum is not"),
        (lambda path: path.write_text(""), "its checksum is not"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_damage(tmp_path: Path, made: object, says: str) -> None:
    made(tmp_path / "manifest.json")  # type: ignore[operator]
    with pytest.raises(DamagedCheckpoint) as raised:
        Manifest.of(tmp_path)
    assert says in str(raised.value)


def test_a_manifest_of_another_format_names_the_version() -> None:
    from mics_tools import manifest

    text = MANIFEST.to_text()
    head = text.rpartition(manifest._SEAL)[0].replace('"format": 1', '"format": 2')
    with pytest.raises(ValueError, match="it is not of format 1; open it with the version of lightning-mics"):
        Manifest.from_text(manifest._sealed(head))


def _written(folder: Path) -> Manifest:
    files = {}
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"")):
        (folder / name).write_bytes(content)
        files[name] = file_as_written(folder / name)
    return Manifest(1, 0, "", "all", {}, {}, files, {})


def test_each_damaged_file_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    manifest = _written(tmp_path)
    assert manifest.damage(tmp_path) == {}
    (tmp_path / "a").write_bytes(b"onf")
    (tmp_path / "b").write_bytes(b"tw")
    (tmp_path / "c").unlink()
    found = manifest.damage(tmp_path)
    assert found == {"a": "its bytes are not those that were written", "b": "2 bytes of 3", "c": "missing"}
    assert manifest.damage(tmp_path, contents=False).keys() == {"b", "c"}
    assert manifest.damage(tmp_path, ["a"]).keys() == {"a"}
    (tmp_path / "c").mkdir()
    assert "c" in manifest.damage(tmp_path)
    (tmp_path / "a").unlink()
    (tmp_path / "a").symlink_to(tmp_path / "a")
    assert "cannot be read" in manifest.damage(tmp_path)["a"]


def test_it_needs_neither_torch_nor_lightning() -> None:
    code = (
        "import sys, mics_tools.manifest; sys.exit(bool({'torch', 'lightning', 'lightning_mics'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
