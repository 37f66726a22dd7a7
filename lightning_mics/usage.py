"""Usage: which parameters got a gradient on this rank.

The engine reduces a parameter that a rank did not use as zeros, so that the ranks stay in step. Whether it was used at
all is known only where autograd leaves its gradient: on the gathered parameter, before hop 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor


class Usage:
    """Notes, for each sharded parameter, that its gathered form received a gradient since `forget()`.

    Args:
        gathered_by: for each sharded module (a block, or the root), where its parameters are registered:
            pairs of a module and an attribute name. The module's forward must be hooked by the engine already.
    """

    def __init__(self, gathered_by: Mapping[nn.Module, list[tuple[nn.Module, str]]]) -> None:
        self._seen: set[int] = set()
        self._watched: set[int] = set()
        for gathering, slots in gathered_by.items():
            sharded = [id(getattr(owner, name)) for owner, name in slots]
            # Not prepended, so that it runs after the engine has gathered.
            gathering.register_forward_pre_hook(partial(self._watch, slots, sharded))

    def saw(self, param: nn.Parameter) -> bool:
        """Whether the sharded `param` got a gradient on this rank."""
        return id(param) in self._seen

    def forget(self, params: Iterable[nn.Parameter] | None = None) -> None:
        """Begin anew: nothing was seen, or none of `params`."""
        if params is None:
            self._seen.clear()
        else:
            self._seen.difference_update(map(id, params))

    def _watch(self, slots: list[tuple[nn.Module, str]], sharded: list[int], *_: Any) -> None:
        for (owner, name), key in zip(slots, sharded, strict=True):
            gathered = getattr(owner, name)
            if gathered.requires_grad and id(gathered) not in self._watched and not isinstance(gathered, DTensor):
                self._watched.add(id(gathered))
                gathered.register_post_accumulate_grad_hook(lambda _, key=key: self._seen.add(key))
