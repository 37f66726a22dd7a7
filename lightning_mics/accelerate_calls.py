"""What a loop under Accelerate does not say, as it is the user's own: when a model was called for what.

Windows are told by Accelerate, but for the first; after two forwards before one backward hop 2 can no longer follow
behind a block's first gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

from accelerate.logging import get_logger
from typing_extensions import override

from lightning_mics.own_loop import Forwards
from lightning_mics.sharding import MiCSModule

_CALLS = "_mics_calls"

log = get_logger(__name__)


class Calls(Forwards):
    """Forwards of a sharded model.

    Args:
        root: the model.
    """

    def __init__(self, root: MiCSModule) -> None:
        super().__init__(root)
        self.for_training = 0
        """Forwards with gradients since the last backward."""
        self._any = False

    @classmethod
    def of(cls, root: MiCSModule) -> Calls:
        """Those of a root, counted from when this was first asked for."""
        if _CALLS not in root.__dict__:
            root.__dict__[_CALLS] = cls(root)
        calls: Calls = root.__dict__[_CALLS]
        return calls

    @override
    def _trains(self) -> None:
        if not self._any:
            self._root.window.begin("the first; others begin with zero_grad")
            self._root.window.drop()
        self._any = True
        self.for_training += 1
        if self.for_training > 1 and self._root.one_backward:
            _take_several_forwards(self._root)


def abort(roots: Iterable[MiCSModule]) -> None:
    """After an exception in a micro-step: what the window had of these models is gone."""
    for root in roots:
        root.abort()
        Calls.of(root).for_training = 0


def _take_several_forwards(root: MiCSModule) -> None:
    if root.window.optimizer_shards is not None:
        raise RuntimeError(
            'optimizer_state="world" needs a backward after each forward, and the model is called twice before one; '
            'call it once on both inputs, evaluate under torch.no_grad(), or choose optimizer_state="partition"'
        )
    log.info("the model is called several times before a backward: hop 2 begins when backward is over")
    root.one_backward = False
