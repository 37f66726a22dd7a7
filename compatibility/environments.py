"""Fresh virtual environments, made by pip of given versions, and removed again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_VERSIONS = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({d.metadata['Name'].lower(): d.version for d in m.distributions()}))"
)


class Unavailable(Exception):
    """An environment cannot be made; the message is one line that says why."""


def interpreter(version: str, given: Iterable[Path] = ()) -> Path:
    """A Python of a version.

    Args:
        version: as "3.12".
        given: interpreters to ask before those on PATH.

    Raises:
        Unavailable: if none of them is of that version.
    """
    for path in (*given, *_on_path(f"python{version}")):
        if _asked(path) == version:
            return path
    raise Unavailable(f"there is no Python {version} here")


def _on_path(name: str) -> Iterator[Path]:
    for folder in os.get_exec_path():
        if (path := Path(folder) / name).is_file():
            yield path


def _asked(python: Path) -> str | None:
    """Its version; None of what does not run, as a version manager's stand-in for one that is not chosen."""
    question = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", question], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Attributes:
        folder: where it lies.
        options: of `pip install`, as `("--index-url", URL)`.
    """

    folder: Path
    options: Sequence[str] = ()

    @classmethod
    def make(cls, folder: Path, python: Path, options: Sequence[str] = ()) -> Environment:
        """Make an empty one.

        Raises:
            Unavailable: if this Python makes none.
        """
        done = subprocess.run([python, "-m", "venv", folder], capture_output=True, text=True)
        if done.returncode != 0:
            raise Unavailable(last_line(done.stderr or done.stdout))
        return cls(folder, tuple(options))

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def install(self, *arguments: str | Path) -> None:
        """`pip install` with `arguments`, keeping nothing in pip's cache.

        Raises:
            Unavailable: with pip's last line, if it fails.
        """
        quiet = ("--quiet", "--no-cache-dir", "--no-compile", "--disable-pip-version-check")
        command = [self.python, "-m", "pip", "install", *quiet, *self.options, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=without_ours(os.environ))
        if done.returncode != 0:
            raise Unavailable(last_line(done.stderr or done.stdout))

    def versions(self) -> dict[str, str]:
        """Of every package in it, by name in lower case."""
        done = subprocess.run([self.python, "-c", _VERSIONS], capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def without_ours(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of this process, but for those that show another Python the packages of this one."""
    return {name: value for name, value in environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def last_line(text: str) -> str:
    """The last line that says something; pip's word for an error, and the addresses that it asked, left out."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[-1] if lines else "pip failed without a word"
    return re.sub(r"\S+://\S+", "...", line.removeprefix("ERROR: "))


def constraints(lines: Iterable[str], pins: Mapping[str, str], without: Iterable[str] = ()) -> list[str]:
    """Those of the tested environment, with `pins` in the place of what they say of the same packages.

    Args:
        lines: as `constraints.txt` has them.
        pins: versions by name; an empty one leaves the choice to pip.
        without: further names that pip is to choose.
    """
    free = {name.lower() for name in (*pins, *without)}
    kept = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    kept = [line for line in kept if line.partition("==")[0].lower() not in free]
    return kept + [f"{name}=={version}" for name, version in pins.items() if version]
