"""Run a recipe on ranks that have all imported already: what the command does, without ten seconds of starting it."""

from __future__ import annotations

import io
import os
import runpy
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tests.distributed.ranks import run_ranks
from tests.recipes.composing import ROOT

RUN_ID = "run"


def shown_by(ranks: int, script: str, arguments: Sequence[str], cwd: Path) -> str:
    """What `python recipes/<script> <arguments>` shows in `cwd`, in processes that Lightning's launcher has started.

    Raises:
        AssertionError: if it ends with an error, with what it says of it.
    """
    env = {"LIGHTNING_MICS_CACHE": str(cwd / "cache"), "LIGHTNING_MICS_RUN_ID": RUN_ID}
    shown, *others = run_ranks(ranks, _as_a_script, str(ROOT / "recipes" / script), [*arguments], cwd, **env)
    assert others == [""] * (ranks - 1)  # rank 0 alone speaks
    return shown


def _as_a_script(script: str, arguments: list[str], cwd: Path) -> str:
    os.chdir(cwd)
    sys.argv = [script, *arguments]
    with redirect_stdout(io.StringIO()) as shown, redirect_stderr(io.StringIO()) as told:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            assert not end.code, shown.getvalue()[-2000:] + told.getvalue()[-4000:]
    return shown.getvalue()
