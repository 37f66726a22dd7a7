"""Count collectives where they are issued: at torch.distributed itself, not at our own code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.distributed as dist

# Newer and older spellings: whichever the engine calls is seen, and only the outermost of nested calls is counted.
_CALLS = {
    "all_gather": ("all_gather_single", "all_gather_into_tensor", "_all_gather_base", "all_gather"),
    "reduce_scatter": ("reduce_scatter_single", "reduce_scatter_tensor", "_reduce_scatter_base", "reduce_scatter"),
    "all_reduce": ("all_reduce", "all_reduce_coalesced"),
    "broadcast": ("broadcast",),
    "all_to_all": ("all_to_all_single", "all_to_all"),
}


class Call(NamedTuple):
    """A collective: its kind, the global ranks that take part, and the numel and dtype of its first tensor."""

    kind: str
    ranks: tuple[int, ...]
    numel: int
    dtype: str


@contextmanager
def collectives() -> Iterator[list[Call]]:
    """All collectives issued through `torch.distributed` in here, in order."""
    calls: list[Call] = []
    depth = 0

    def wrap(kind: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth == 0:
                group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
                ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
                tensor = args[0] if args else next(iter(kwargs.values()))
                tensor = tensor[0] if isinstance(tensor, list) else tensor
                calls.append(Call(kind, ranks, tensor.numel(), str(tensor.dtype)))
            depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1

        return counted

    patches = []
    for kind, names in _CALLS.items():
        for name in names:
            for owner in (dist, dist.distributed_c10d):
                if hasattr(owner, name):
                    patches.append(patch.object(owner, name, wrap(kind, getattr(owner, name))))
    for each in patches:
        each.start()
    try:
        yield calls
    finally:
        for each in reversed(patches):
            each.stop()
