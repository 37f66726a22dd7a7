"""Agreement: what fails on one rank fails on every rank, so that none waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

_T = TypeVar("_T")


def together(action: Callable[[], _T], failure: str) -> _T:
    """Run `action` on every rank; if it raises on any, raise on all. Collective on the default group."""
    result, error = None, None
    try:
        result = action()
    except Exception as exception:
        error = exception
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}")
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"{failure}: {'; '.join(failed[:3])}")
    return result  # type: ignore[return-value]


def tensors_together(action: Callable[[], object], failure: str) -> None:
    """Run a collective of the distributed checkpoint library, which raises on all ranks if on any, tell it plainly."""
    try:
        action()
    except CheckpointException as exception:  # not an Exception: it would pass every handler on its way out
        failed = [f"rank {rank}: {type(e).__name__}: {e}" for rank, (e, _) in sorted(exception.failures.items())]
        raise RuntimeError(f"{failure}: {'; '.join(failed[:3])}") from exception
