"""Tables for people: where a checkpoint comes from and what it holds; what a configuration has become."""

from __future__ import annotations

import math
from collections import defaultdict

from rich.table import Column, Table

from mics_tools.manifest import Manifest
from mics_tools.migrate import Fate, Migration
from mics_tools.units import in_units

_PARTS = ("model", "optimizer")
_WRITERS = {"all": "all ranks", "group": "one partition group"}


def overview(manifest: Manifest) -> list[Table]:
    """Where a checkpoint comes from, its tensors by part and dtype, its files by part."""
    return [_facts(manifest), _tensors(manifest), _files(manifest)]


def fates(migration: Migration) -> list[Table]:
    """Which keys were written, which need nothing, and which have no counterpart, each with what there is to say."""
    tables = []
    for fate in Fate:
        keys: dict[str, list[str]] = defaultdict(list)
        for told in migration.told:
            if told.fate is fate:
                keys[told.text].append(told.key)
        if keys:
            tables.append(table := Table(Column(fate, overflow="fold"), ""))
            for text, alike in keys.items():
                table.add_row("\n".join(alike), text)
    return tables


def _facts(manifest: Manifest) -> Table:
    topology = manifest.topology
    n, k, p = (topology[name] for name in ("world_size", "ranks_per_node", "partition_size"))
    table = Table(show_header=False, box=None)
    table.add_row("saved", manifest.saved)
    table.add_row("step", f"{manifest.step}, in epoch {manifest.epoch}")
    table.add_row("topology", f"{n} ranks, {k} a node, in partition groups of {p}")
    table.add_row("writers", _WRITERS.get(manifest.writers, manifest.writers))
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    for name, config in manifest.models.items():
        classes = ", ".join(config.get("architectures") or ["a model"])
        table.add_row("model", f"{classes} ({config.get('model_type')}) at {name!r}")
    return table


def _tensors(manifest: Manifest) -> Table:
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for key, tensor in manifest.tensors.items():
        count = counts[_part_of(key), tensor.dtype]
        count[0] += 1
        count[1] += math.prod(tensor.shape)
    table = _table("tensors of", "dtype", "tensors", "values")
    for (part, dtype), (tensors, values) in sorted(counts.items()):
        table.add_row(part, dtype, str(tensors), in_units(values))
    return table


def _files(manifest: Manifest) -> Table:
    table = _table("files of", "files", "size")
    sizes = {part: [file.size for name, file in manifest.files.items() if _part_of(name) == part] for part in _PARTS}
    sizes["the rest"] = [file.size for name, file in manifest.files.items() if _part_of(name) not in _PARTS]
    for part, some in (*sizes.items(), ("all", [file.size for file in manifest.files.values()])):
        if some:
            table.add_row(part, str(len(some)), in_units(sum(some), "B"))
    return table


def _part_of(name: str) -> str:
    """The first word of a tensor's or a file's name."""
    return name.split("-")[0].split(".")[0]


def _table(first: str, *others: str) -> Table:
    table = Table(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
