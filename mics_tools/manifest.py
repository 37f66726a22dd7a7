"""The manifest of a checkpoint: what it holds, so that it can be shown and checked without opening the rest.

    DIR/manifest.json

is JSON, made for people as well. Its last field is the checksum of all the text before it, so that a manifest that was
damaged does not pass for another one. A directory without its manifest is no checkpoint: it is written last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

NAME = "manifest.json"
FORMAT = 1
_KIND = "lightning-mics checkpoint"
_SEAL = ',\n  "checksum": '
_BUFFER = 1 << 22
_OTHERS = (".metadata", "lightning.pt")  # what a checkpoint has beside its manifest, even when that is lost


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not what was written.

    Attributes:
        damage: for each file, what is wrong with it.
    """

    def __init__(self, folder: str | os.PathLike[str], damage: Mapping[str, str]) -> None:
        self.damage = dict(damage)
        listed = [f"{name}: {reason}" for name, reason in self.damage.items()]
        more = f"; and {len(listed) - 5} more" if len(listed) > 5 else ""
        super().__init__(
            f"{os.fspath(folder)} is damaged: {'; '.join(listed[:5])}{more}. Nothing of it was loaded; copy the files "
            "anew from where they are whole, or take another checkpoint"
        )


@dataclass(frozen=True)
class File:
    """A file of a checkpoint: its size in bytes and its checksum (XXH3, 128 bits, hexadecimal)."""

    size: int
    xxh3_128: str


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint: the name of its dtype, as "float32", and its whole shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: optimizer steps taken.
        epoch: the epoch that was under way, from 0.
        saved: when, in UTC, as ISO 8601.
        writers: "all" ranks shared the writing, or one partition "group" did it.
        versions: of the packages that wrote it.
        topology: world_size, ranks_per_node and partition_size of the run that wrote it.
        files: by name, relative to the checkpoint, with "/" between parts.
        tensors: by name: "model.<name>", or "optimizer.<number>.<name>.<what>".
        tied: further names of tensors of the model, and the names that they have in `tensors`; both without "model.".
        models: for each Hugging Face model within, under its name in the module: its configuration.
    """

    step: int
    epoch: int
    saved: str
    writers: str
    versions: Mapping[str, str]
    topology: Mapping[str, int]
    files: Mapping[str, File]
    tensors: Mapping[str, TensorEntry]
    tied: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def to_text(self) -> str:
        """As it is written."""
        text = json.dumps({"kind": _KIND, "format": FORMAT} | asdict(self), indent=2)
        return _sealed(text.removesuffix("\n}"))

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """The manifest that was written so.

        Raises:
            ValueError: if it was not, or not by a version that is understood.
        """
        head, _, _ = text.rpartition(_SEAL)
        if text != _sealed(head):
            raise ValueError("its checksum is not that of its text")
        fields = json.loads(text)
        if fields.pop("kind") != _KIND or fields.pop("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}; open it with the version of lightning-mics that wrote it")
        del fields["checksum"]
        files = {name: File(**file) for name, file in fields.pop("files").items()}
        tensors = {name: TensorEntry(t["dtype"], tuple(t["shape"])) for name, t in fields.pop("tensors").items()}
        return cls(**fields, files=files, tensors=tensors)

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> Manifest:
        """The manifest of the checkpoint in `folder`.

        Raises:
            DamagedCheckpoint: if it is not there, or not what was written.
        """
        try:
            return cls.from_text((Path(folder) / NAME).read_bytes().decode())
        except FileNotFoundError:
            raise DamagedCheckpoint(folder, {NAME: "missing"}) from None
        except (ValueError, KeyError, TypeError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise DamagedCheckpoint(folder, {NAME: str(error)}) from None
        except OSError as error:
            raise DamagedCheckpoint(folder, {NAME: f"cannot be read: {error}"}) from None

    def damage(
        self,
        folder: str | os.PathLike[str],
        names: Iterable[str] | None = None,
        *,
        contents: bool = True,
        on_read: Callable[[int], object] | None = None,
    ) -> dict[str, str]:
        """For each damaged file, what is wrong with it.

        Args:
            folder: of the checkpoint.
            names: of the files to look at; all by default.
            contents: read them and compare checksums, not sizes alone.
            on_read: told how many bytes were read, again and again.
        """
        found = {}
        for name in self.files if names is None else names:
            try:
                reason = _damage_of(Path(folder) / name, self.files[name], contents, on_read)
            except FileNotFoundError:
                reason = "missing"
            except OSError as error:
                reason = f"cannot be read: {error}"
            if reason is not None:
                found[name] = reason
        return found


def check_kind(folder: str | os.PathLike[str]) -> None:
    """Before a checkpoint directory is read.

    Raises:
        FileNotFoundError: if `folder` is none, not even a damaged one.
        ValueError: if it is a checkpoint in a single file, or any other file.
    """
    if Path(folder).is_file():
        raise ValueError(
            f"{os.fspath(folder)} is a single file, not a checkpoint directory; use it as it is: load_from_checkpoint "
            "and ckpt_path take it"
        )
    if not any((Path(folder) / name).exists() for name in (NAME, *_OTHERS)):
        raise FileNotFoundError(f"{os.fspath(folder)} is not a checkpoint; give the directory that was saved")


def file_as_written(path: str | os.PathLike[str], on_read: Callable[[int], object] | None = None) -> File:
    """The size and the checksum of a file; `on_read` is told how many bytes were read, again and again."""
    with open(path, "rb") as stream:
        checksum, size, buffer = xxhash.xxh3_128(), 0, memoryview(bytearray(_BUFFER))
        while count := stream.readinto(buffer):
            checksum.update(buffer[:count])
            size += count
            if on_read is not None:
                on_read(count)
    return File(size, checksum.hexdigest())


def _damage_of(path: Path, expected: File, contents: bool, on_read: Callable[[int], object] | None) -> str | None:
    size = path.stat().st_size
    if not path.is_file():
        return "not a file"
    if size != expected.size:
        return f"{size} bytes of {expected.size}"
    if contents and file_as_written(path, on_read) != expected:
        return "its bytes are not those that were written"
    return None


def _sealed(head: str) -> str:
    return f'{head}{_SEAL}"{xxhash.xxh3_128_hexdigest(head.encode())}"\n}}\n'
