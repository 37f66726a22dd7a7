"""Text files, read where they lie.

A path is a file, a folder or a glob; no path is the source of Python's own standard library, a text that
every machine has.
"""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from recipes.data.corpus import Document

# Tests hold tables and deliberately broken sources, and many distributions of Python leave them out.
_STANDARD_LIBRARY_SKIPS = frozenset({"site-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class TextFiles:
    """The text files that a path stands for, in order of name.

    Args:
        path: a file, a folder (with all below it), or a glob (``**`` allowed); ``None`` is the source of
            Python's own standard library, without its tests. Hidden files, ``__pycache__`` and binary files
            (a NUL byte in the first 8 KiB) are passed over. Bytes that are not UTF-8 become U+FFFD.
        max_documents: keep the first so many files, ``None`` for all.
    """

    path: str | None = None
    max_documents: int | None = None

    @property
    def name(self) -> str:
        """The path as it was given."""
        return "the Python standard library" if self.path is None else self.path

    def documents(self) -> Iterator[Document]:
        """Yield the files' text, named relative to the folder that they were found in.

        Raises:
            FileNotFoundError: ``path`` is no file, no folder, and matches nothing as a glob.
        """
        root, files = self._find()
        named = sorted((file.relative_to(root).as_posix(), file) for file in files)
        readable = (Document(name, text) for name, file in named if (text := _read(file)).strip())
        yield from islice(readable, self.max_documents)

    def _find(self) -> tuple[Path, list[Path]]:
        if self.path is None:
            return _standard_library()
        path = Path(self.path).expanduser()
        if path.is_dir():
            return path, _visible_files(path, path.rglob("*"))
        if path.is_file():
            return path.parent, [path]
        root = _fixed_parent(path)
        files = _visible_files(root, map(Path, glob.glob(str(path), recursive=True)))
        if not files:
            raise FileNotFoundError(
                f"path={self.path!r} is no file, no folder, and as a glob matches no file; "
                "give an existing path, or leave it out for the Python standard library"
            )
        return root, files


def _standard_library() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = _visible_files(root, root.rglob("*.py"))
    skips = _STANDARD_LIBRARY_SKIPS
    return root, [file for file in files if skips.isdisjoint(file.relative_to(root).parts[:-1])]


def _visible_files(root: Path, paths: Iterable[Path]) -> list[Path]:
    def visible(parts: tuple[str, ...]) -> bool:
        return not any(part.startswith(".") or part == "__pycache__" for part in parts)

    return [path for path in paths if visible(path.relative_to(root).parts) and path.is_file()]


def _fixed_parent(pattern: Path) -> Path:
    """The deepest folder above everything that a glob can match."""
    fixed = Path(pattern.anchor)
    for part in pattern.relative_to(fixed).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed


def _read(file: Path) -> str:
    content = file.read_bytes()
    if b"\0" in content[:8192]:
        return ""
    return content.decode("utf-8", errors="replace")
