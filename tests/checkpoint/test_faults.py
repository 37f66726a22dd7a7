"""Whatever happens to a file of a checkpoint, it is found before anything is loaded."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_mics.checkpoint import Checkpoint, DamagedCheckpoint, Verify
from mics_tools.manifest import NAME
from tests.checkpoint.saved import dump, made, save
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import assert_close, parameters

FAULTS = 1000


def _flip_a_bit(path: Path, draw: random.Random, _: list[Path]) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _overwrite(path: Path, draw: random.Random, _: list[Path]) -> None:
    content = path.read_bytes()
    start = draw.randrange(len(content))
    noise = draw.randbytes(min(512, len(content) - start))
    path.write_bytes(content[:start] + noise + content[start + len(noise) :])


def _truncate(path: Path, draw: random.Random, _: list[Path]) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(1, path.stat().st_size)])


def _append(path: Path, draw: random.Random, _: list[Path]) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 9)))


def _empty(path: Path, draw: random.Random, _: list[Path]) -> None:
    path.write_bytes(b"")


def _lose(path: Path, draw: random.Random, _: list[Path]) -> None:
    path.unlink()


def _swap(path: Path, draw: random.Random, files: list[Path]) -> None:
    other = draw.choice([file for file in files if file.read_bytes() != path.read_bytes()])
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


WAYS: tuple[Callable[[Path, random.Random, list[Path]], None], ...] = (
    _flip_a_bit,
    _overwrite,
    _truncate,
    _append,
    _empty,
    _lose,
    _swap,
)


def _strike_often(path: Path) -> dict[str, int]:
    """Strike copies of a checkpoint, and count what was found by the kind of the fault."""
    whole, copy, draw = path / "whole", path / "copy", random.Random(0)
    module, optimizer = made(steps=0)
    before = parameters(module)
    found: Counter[str] = Counter()
    for number in range(FAULTS):
        shutil.copytree(whole, copy)
        files = sorted(file for file in copy.rglob("*") if file.is_file())
        strike, file = WAYS[number % len(WAYS)], draw.choice(files)
        unhurt = file.read_bytes()
        strike(file, draw, files)
        if file.exists() and file.read_bytes() == unhurt:
            raise AssertionError(f"{strike.__name__} did nothing")
        try:
            Checkpoint(copy).load(module, [optimizer], verify=Verify.FULL if number % 2 else Verify.AUTO)
        except DamagedCheckpoint as damage:
            if not {file.name, NAME} & damage.damage.keys():  # the manifest alone, where it was struck itself
                raise AssertionError(f"{strike.__name__} on {file.name}: told {damage}") from damage
            found[strike.__name__] += 1
        else:
            raise AssertionError(f"{strike.__name__} on {file.name} was not found")
        shutil.rmtree(copy)
    assert_close(parameters(module), before, "nothing was loaded")
    if optimizer.state:
        raise AssertionError("nothing was loaded, yet the optimizer has state")
    Checkpoint(whole).load(module, [optimizer])
    if torch.equal(parameters(module)["embed.weight"], before["embed.weight"]):
        raise AssertionError("a whole one is loaded, by the same call")
    return dict(found)


def _save(path: Path) -> None:
    module, optimizer = made()
    save(path, dump(module, optimizer), module)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("faults")
    run_ranks(4, _save, path / "whole")
    return path


def test_a_thousand_faults_are_found_and_none_is_loaded(whole: Path) -> None:
    (found,) = run_ranks(1, _strike_often, whole)
    assert sum(found.values()) == FAULTS and len(found) == len(WAYS)


def _one_rank_finds_it(path: Path) -> tuple[str, str]:
    module, optimizer = made(steps=0)
    damaged = path / "shared"
    with pytest.raises(DamagedCheckpoint) as raised:
        Checkpoint(damaged).load(module, [optimizer])
    for verify in (Verify.AUTO, Verify.OFF):  # without the optimizer its files are not read
        Checkpoint(damaged).load(module, [], verify=verify)
    with pytest.raises(DamagedCheckpoint):
        Checkpoint(damaged).load(module, [], verify=Verify.FULL)
    return type(raised.value).__name__, str(raised.value)


def test_what_one_rank_finds_every_rank_tells_and_what_is_not_read_is_not_checked(whole: Path) -> None:
    shutil.copytree(whole / "whole", whole / "shared")
    (whole / "shared" / "optimizer-00002-0.distcp").write_bytes(b"")
    answers = run_ranks(2, _one_rank_finds_it, whole)
    assert len(set(answers)) == 1
    assert "shared is damaged: optimizer-00002-0.distcp: 0 bytes of " in answers[0][1]
    assert "Nothing of it was loaded" in answers[0][1]
