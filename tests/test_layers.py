"""The house rule: imports run downward only, and private names of others stand in `_compat` alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_mics
import mics_tools

PACKAGE = Path(lightning_mics.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted(Path(mics_tools.__file__).parent.glob("*.py"))

# Lowest first. What stands in one row does not import its like.
ROWS = (
    {
        "topology",
        "choice",
        "network",
        "ladder",
        "precision",
        "memory",
        "flat",
        "cross_memory",
        "shards",
        "version",
        "_compat",
    },
    {"averages", "repeats", "groups", "channels"},
    {"collectives", "climb", "residency", "held", "trials"},
    {"exchange", "native"},
    {"pipelined"},
    {"wire", "blocks", "materialize", "usage"},
    {"comms", "block_order", "recompute"},
    {"optimizer_shards"},
    {"two_hop", "offload"},
    {"accounting"},
    {"sharding"},
    {"checkpoint", "loaders", "preemption", "probe", "telemetry", "planner"},
    {"arguments", "own_loop", "refusals", "successors"},
    {
        "running",
        "saving",
        "fabric_saving",
        "planning",
        "accelerate_arguments",
        "accelerate_calls",
        "accelerate_optimizer",
    },
    {"accelerate_saving", "accelerate_planning", "fit_planning"},
    {"strategy", "fabric", "accelerate"},
    {"callbacks", "hugging_face_trainer"},
    {"plan_arguments", "hydra_workload"},
    {"workloads"},
    {"plan_command", "probe_command"},
    {"simulate_command"},
    {"__main__"},
)
ENGINE = set().union(*ROWS[: ROWS.index({"sharding"}) + 1])
INTEGRATED = ("lightning", "pytorch_lightning", "accelerate", "transformers", "recipes")
FOREIGN = ("torch", *INTEGRATED[:-1])


def part(path: Path) -> str:
    """The name in ROWS that a file belongs to: its own, or that of its folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every dotted name that a file imports, wherever in it: `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_parts(path: Path) -> set[str]:
    own = (name.split(".") for name in imports(path) if name.split(".")[0] == "lightning_mics")
    return {names[1] for names in own if len(names) > 1}


def named(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=str(path.relative_to(PACKAGE.parent))) for path in paths]


@pytest.mark.parametrize("path", named([path for path in MODULES if part(path) != "__init__"]))
def test_imports_run_downward(path: Path) -> None:
    name = part(path)
    (row,) = (i for i, names in enumerate(ROWS) if name in names)
    allowed = set().union(*ROWS[:row]) | {name}
    assert imported_parts(path) <= allowed


@pytest.mark.parametrize("path", named([path for path in MODULES if part(path) in ENGINE]))
def test_the_engine_knows_no_integration(path: Path) -> None:
    if part(path) == "_compat":
        pytest.skip("holds Lightning's differences too, by name")
    assert not [name for name in imports(path) if name.split(".")[0] in INTEGRATED]


@pytest.mark.parametrize("name", ["topology", "network", "ladder"])
def test_pure_python(name: str) -> None:
    assert not [name for name in imports(PACKAGE / f"{name}.py") if name.split(".")[0] in (*FOREIGN, "numpy")]


@pytest.mark.parametrize("path", named(TOOLS))
def test_the_tools_stand_below_the_package(path: Path) -> None:
    """Only the commands reach up, each when it runs: tests/mics_tools/test_cli.py sees that none is imported before."""
    foreign = [name for name in imports(path) if name.split(".")[0] in (*FOREIGN, "numpy", "lightning_mics")]
    assert not foreign or path.name == "cli.py"


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def dotted(node: ast.expr) -> list[str]:
    """`a.b.c` as its parts; empty for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    head = dotted(node.value) if isinstance(node, ast.Attribute) else []
    return [*head, node.attr] if head and isinstance(node, ast.Attribute) else []


def foreign_names(tree: ast.Module) -> set[str]:
    """Names in a file that stand for something of torch or Lightning."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(a.asname or a.name).split(".")[0] for a in node.names if a.name.split(".")[0] in FOREIGN}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def private_touches(source: str) -> list[str]:
    tree = ast.parse(source)
    foreign = foreign_names(tree)
    touched = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and (dotted(node) or ["?"])[0] in foreign:
            names = [".".join(dotted(node))]
        else:
            continue
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        touched += [
            name
            for name in names
            if any(is_private(p) for p in name.split(".")) and (not is_import or name.split(".")[0] in FOREIGN)
        ]
    return touched


@pytest.mark.parametrize(
    ("source", "touched"),
    [
        ("import torch\ntorch._C.f()", ["torch._C.f", "torch._C"]),
        ("from torch.distributed._tensor import DTensor", ["torch.distributed._tensor.DTensor"]),
        ("from torch import _x as y", ["torch._x"]),
        ("import torch.distributed as dist\ndist._all()", ["dist._all"]),
        ("import lightning.pytorch as pl\npl.Trainer._run", ["pl.Trainer._run"]),
        ("import os\nos._exit(1)\nself._x = torch.__version__", []),
        ("from lightning_mics._compat import in_backward", []),
    ],
)
def test_the_search_finds_private_names(source: str, touched: list[str]) -> None:
    assert private_touches(source) == touched


@pytest.mark.parametrize("path", named([path for path in MODULES if part(path) != "_compat"]))
def test_private_names_of_others_stand_in_compat_alone(path: Path) -> None:
    assert private_touches(path.read_text()) == []
