"""Tables in documents: what lies between a pair of marks is written anew by the script that the table is of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def marks(name: str) -> tuple[str, str]:
    """Those around the table of that name."""
    return f"<!-- {name}: written by a script -->", f"<!-- {name}: end -->"


def replace(document: str, name: str, table: str) -> str:
    """`document` with `table` between the marks of `name`.

    Raises:
        ValueError: if the document does not have both, once and in order.
    """
    begin, end = marks(name)
    head, found, rest = document.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed) or begin in rest:
        raise ValueError(f"the document must have {begin} and, behind it, {end}, once")
    return f"{head}{begin}\n\n{table.strip()}\n\n{end}{tail}"


def between(document: str, name: str) -> str:
    """The table between the marks of `name`."""
    begin, end = marks(name)
    return document.partition(begin)[2].partition(end)[0].strip()


def write(path: Path, name: str, table: str) -> None:
    """`replace` in a file."""
    path.write_text(replace(path.read_text(), name, table))


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
