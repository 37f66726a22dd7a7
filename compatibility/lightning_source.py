"""Where Lightning's tests come from: a folder, or a git repository at the tag that is nearest to what is installed."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from compatibility.lightning_table import Table

REPOSITORY = "https://github.com/Lightning-AI/pytorch-lightning"
_PACKAGES = ("tests_pytorch", "tests_fabric", "parity_fabric")
_RELEASE = re.compile(r"\d+\.\d+\.\d+")


def copied(source: str, folder: Path, table: Table) -> tuple[Path, str]:
    """Copy Lightning's tests into `folder`, and replace in them what the table says.

    Args:
        source: a folder that holds `tests/`, the path or address of a git repository, or "" for Lightning's own.
        folder: one that exists.
        table: see there.

    Returns:
        The copied folder `tests`, and Lightning's version that they are of.

    Raises:
        ValueError: if there are no tests, or what is to be replaced is not there.
    """
    given = Path(source)
    root = given if source and (given / "tests").is_dir() else _cloned(source or REPOSITORY, folder / "clone")
    for package in _PACKAGES:
        if not (root / "tests" / package).is_dir():
            raise ValueError(
                f"--source {source or REPOSITORY}: no folder tests/{package} is there; give Lightning's own"
            )
        shutil.copytree(root / "tests" / package, folder / "tests" / package)
    for file, rows in table.files.items():
        _replace(folder / "tests" / file, rows.replace)
    return folder / "tests", _version(root)


def _replace(path: Path, texts: Iterable[tuple[str, str]]) -> None:
    content = path.read_text()
    for old, new in texts:
        if old not in content:
            raise ValueError(f"{path.name} has no {old!r}, which the table replaces; bring its row up to date")
        content = content.replace(old, new)
    path.write_text(content)


def _cloned(address: str, folder: Path) -> Path:
    listed = _git("ls-remote", "--tags", "--refs", address)
    tags = [line.rpartition("refs/tags/")[2] for line in listed.splitlines()]
    tag = nearest(importlib.metadata.version("lightning"), tags)
    _git("-c", "advice.detachedHead=false", "clone", "--quiet", "--depth", "1", "--branch", tag, address, str(folder))
    return folder


def nearest(version: str, tags: Iterable[str]) -> str:
    """The tag of a version, or else the next lower of the same minor version, or else its lowest.

    Raises:
        ValueError: if that minor version has none.
    """
    same = sorted(
        (tag for tag in tags if _RELEASE.fullmatch(tag) and _numbers(tag)[:2] == _numbers(version)[:2]), key=_numbers
    )
    if not same:
        raise ValueError(f"no tag of Lightning's minor version of {version} is there; give a folder by --source")
    return next((tag for tag in reversed(same) if _numbers(tag) <= _numbers(version)), same[0])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _version(root: Path) -> str:
    file = root / "src" / "version.info"
    return file.read_text().strip() if file.exists() else "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"git {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout
