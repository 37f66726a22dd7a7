"""Count collectives and messages where they are issued: at torch.distributed itself, and at what a node's ranks read.

Other threads' are counted as well. The order of one thread's calls is kept; between two threads there is none.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist

from lightning_mics.cross_memory import CrossMemory

# Newer and older spellings: whichever the engine calls is seen, and only the outermost of nested calls is counted.
_CALLS = {
    "all_gather": ("all_gather_single", "all_gather_into_tensor", "_all_gather_base", "all_gather"),
    "reduce_scatter": ("reduce_scatter_single", "reduce_scatter_tensor", "_reduce_scatter_base", "reduce_scatter"),
    "all_reduce": ("all_reduce", "all_reduce_coalesced"),
    "broadcast": ("broadcast",),
    "all_to_all": ("all_to_all_single", "all_to_all"),
    "send": ("isend", "send"),
}


class Call(NamedTuple):
    """A collective or a message of this rank.

    Attributes:
        kind: a key of `_CALLS`; what a rank of the node is offered is a "send".
        ranks: the global ranks of its group.
        group: the name of the group, which tells communicators of the same ranks apart.
        numel, dtype: of its first tensor: what a collective writes, a message's own.
        to: the global rank that a message goes to.
    """

    kind: str
    ranks: tuple[int, ...]
    group: str
    numel: int
    dtype: torch.dtype
    to: int | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@contextmanager
def collectives() -> Iterator[list[Call]]:
    """All that this process issues through `torch.distributed` in here, and what its threads do."""
    calls: list[Call] = []
    inside = threading.local()

    def wrap(kind: str, function: Any) -> Any:
        signature = inspect.signature(function)

        def counted(*args: Any, **kwargs: Any) -> Any:
            depth = getattr(inside, "depth", 0)
            if depth == 0:
                calls.append(_call(kind, signature.bind(*args, **kwargs).arguments))
            inside.depth = depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                inside.depth = depth

        return counted

    patches = []
    for kind, names in _CALLS.items():
        for name in names:
            owners = [owner for owner in (dist, dist.distributed_c10d) if hasattr(owner, name)]
            if owners:  # which have the same function, and torch compares them
                counted = wrap(kind, getattr(owners[0], name))
                patches += [patch.object(owner, name, counted) for owner in owners]
    offer = CrossMemory.offer

    def offered(memory: CrossMemory, tensor: torch.Tensor, to: int, tag: int) -> None:
        ranks = tuple(dist.get_process_group_ranks(memory.group))
        calls.append(Call("send", ranks, memory.group.group_name, tensor.numel(), tensor.dtype, ranks[to]))
        offer(memory, tensor, to, tag)

    patches.append(patch.object(CrossMemory, "offer", offered))
    for each in patches:
        each.start()
    try:
        yield calls
    finally:
        for each in reversed(patches):
            each.stop()


def _call(kind: str, arguments: dict[str, Any]) -> Call:
    group = arguments.get("group") or dist.group.WORLD
    ranks = tuple(dist.get_process_group_ranks(group))
    first = next(iter(arguments.values()))
    tensor = first[0] if isinstance(first, list) else first
    to = None
    if kind == "send":
        to = arguments["dst"] if arguments.get("dst") is not None else ranks[arguments["group_dst"]]
    return Call(kind, ranks, group.group_name, tensor.numel(), tensor.dtype, to)
