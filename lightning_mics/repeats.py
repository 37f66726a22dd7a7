"""Repeats: a block that runs again in a forward does so on every rank of its partition group.

Where ranks go different ways, a block that one of them skips is passed through. One that it runs again cannot be:
nobody knows in time that there will be another gather, so that the next block's would be taken for it. Here each rank
tells the next one in a ring, from host to host, before a block runs again, and waits to be told by the one before.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = timedelta(minutes=5)
"""For which a rank waits for its neighbours. They have all been at the same block's first run."""
_TAG = 1 << 20  # no message of hop 1 has it

_DIFFER = (
    "{} runs again in a forward on this rank, and {} on another of its partition group, so that their gathers would be "
    "taken for one another's; where ranks go different ways, a block may be skipped, but has to run as often as on the "
    "others: call it equally often (on zeros, where there is nothing to do), or keep parameters whole: partition_size=1"
)


def check_repeat(group: dist.ProcessGroup, name: str, index: int) -> None:
    """Return when this rank's neighbours are about to run the same block again.

    Of ranks that do and ranks that do not, or run another one, some are neighbours.

    Args:
        group: a gloo group of the ranks of the partition group; one message of eight bytes to the next rank in it.
        name: the block's, for people.
        index: the block's.

    Raises:
        RuntimeError: if a neighbour is not about to run it.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine, theirs = torch.tensor([index]), torch.empty(1, dtype=torch.int64)
    sent = dist.isend(mine, group=group, tag=_TAG, group_dst=(rank + 1) % size)
    told = dist.irecv(theirs, group=group, tag=_TAG, group_src=(rank - 1) % size)
    assert sent is not None and told is not None
    try:
        told.wait(PATIENCE)
        sent.wait(PATIENCE)
    except RuntimeError as error:
        raise RuntimeError(_DIFFER.format(name, "does not")) from error
    if int(theirs) != index:
        raise RuntimeError(_DIFFER.format(name, "another one does"))
