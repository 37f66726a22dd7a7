"""Agreement: what fails on one rank fails on every rank, so that none waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch.distributed as dist

from lightning_mics.checkpoint.garbage import uncollected

_T = TypeVar("_T")


def together(action: Callable[[], _T], failure: str, group: dist.ProcessGroup | None = None) -> _T:
    """Run `action` on every rank; if it raises on any, raise on all. Collective on `group`, the default group."""
    result, error = None, None
    try:
        result = action()
    except Exception as exception:
        error = exception
    errors: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    if any(errors):
        raise RuntimeError(f"{failure}: {'; '.join(_listed(errors))}")
    return result  # type: ignore[return-value]


def gathered(action: Callable[[], _T], failure: str, group: dist.ProcessGroup | None = None) -> list[_T]:
    """As `together`; rank 0 gets every rank's result, in their order, and the others get none."""
    result = together(action, failure, group)
    results: list[_T] | None = [result] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    with uncollected():
        dist.gather_object(result, results, dst=0, group=group)
    return results or []


def _listed(errors: Iterable[str | None]) -> list[str]:
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
    return failed[:3] + ([f"and {len(failed) - 3} more ranks"] if len(failed) > 3 else [])
