"""The memory ladder: what stays whole in memory, and what that saves on the wire.

Two-hop synchronisation with regathering needs the least memory. Each further rung keeps something whole that the next
block, backward or micro-step would otherwise move again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

AUTO = "auto"
"""Instead of a rung's name: the fastest that fits."""


class Parameters(StrEnum):
    """How long a block's parameters stay gathered."""

    BLOCK = "block"
    """While the block runs: gathered for its forward, and again for its backward."""
    MICRO_STEP = "micro_step"
    """From its forward to its backward: gathered once a micro-step."""
    WINDOW = "window"
    """Until the optimizer's step: gathered once a window."""


class Gradients(StrEnum):
    """Where the gradients of a window are summed."""

    SHARDED = "sharded"
    """In shards: hop 1 in each micro-step."""
    WHOLE = "whole"
    """Whole, on each rank: hop 1 at the boundary only."""


@dataclass(frozen=True)
class Rung:
    """One rung: "<parameters>/<gradients>", as "block/sharded".

    For a model of M bytes in blocks of B, partition size p and a window of w, a rank holds beside its shards and sends
    within its partition group in each optimizer step:

    ===================  =============================  ==================================
    part                 held                           sent, in units of (p-1)/p * M
    ===================  =============================  ==================================
    block/...            c blocks                       2 w gathers, less (2 w - 1) c B
    micro_step/...       M, in forward and backward     w gathers, less (w - 1) c B
    window/...           M, between optimizer steps     1 gather
    .../sharded          c blocks at a time             w reduce-scatters
    .../whole            M, between micro-steps         1 reduce-scatter
    ===================  =============================  ==================================

    c blocks are whole at a time: the one that runs and the next, on CPU one more where they come from other nodes. The
    last c stay so from forward to backward, and the first c from there to the next micro-step's forward: what would be
    gathered at once again is not freed. What lies outside the blocks is gathered once a micro-step, or once a window.
    Under manual optimization nobody knows which backward will be the window's last: `window` and `whole` act as
    `micro_step` and `sharded`, and the first c blocks are freed.
    """

    parameters: Parameters = Parameters.BLOCK
    gradients: Gradients = Gradients.SHARDED

    @classmethod
    def parse(cls, rung: Rung | str) -> Rung:
        """The rung that a user named.

        Raises:
            ValueError: if there is none of that name; the message lists those that there are.
        """
        if isinstance(rung, Rung):
            return rung
        by_name = {str(each): each for each in RUNGS}
        if not isinstance(rung, str) or rung not in by_name:
            raise ValueError(
                f"rung={rung!r} is not on the memory ladder; choose one of {', '.join(by_name)}, or {AUTO!r}"
            )
        return by_name[rung]

    def gathers(self, window: int, index: int, blocks: int, whole: int) -> int:
        """How often a window of `window` micro-steps gathers block `index` of `blocks`, if `whole` are so at a time."""
        stays_before_forward, stays_after_forward = index < whole, index >= blocks - whole
        forward = 1 if stays_before_forward or self.parameters == Parameters.WINDOW else window
        backward = 0 if stays_after_forward or self.parameters != Parameters.BLOCK else window
        return forward + backward

    def gathers_outside(self, window: int) -> int:
        """How often it gathers what lies outside the blocks."""
        return 1 if self.parameters == Parameters.WINDOW else window

    def reduce_scatters(self, window: int) -> int:
        """How often a window of `window` micro-steps reduces each gradient in the partition group."""
        return window if self.gradients == Gradients.SHARDED else 1

    def __str__(self) -> str:
        return f"{self.parameters}/{self.gradients}"


RUNGS = tuple(Rung(parameters, gradients) for parameters in Parameters for gradients in Gradients)


@dataclass(frozen=True)
class Whole:
    """Bytes of one block, or of what lies outside the blocks, while it is whole.

    Attributes:
        parameters: as they are gathered.
        gradients: as a backward makes them.
        sums: gradients as they are summed.
    """

    parameters: int
    gradients: int
    sums: int


@dataclass(frozen=True)
class ModelBytes:
    """What a rank holds of a sharded model.

    Attributes:
        shards: parameters and the window's gradients, in shards.
        blocks: in order of execution.
        outside: what lies outside the blocks.
        whole: how many blocks are whole at a time, on the lowest rung.
    """

    shards: int
    blocks: tuple[Whole, ...]
    outside: Whole
    whole: int = 2

    def peak(self, rung: Rung) -> int:
        """The most bytes that a rank holds at once in a window: shards, and whatever is whole, without activations.

        The optimizer's state comes on top. Below stand a backward's two moments at each block: it computes, while the
        blocks behind it are on their way and the gradients of the one before are; and it hands its gradients over, or
        at the boundary the sums that were held.
        """
        everything = sum(block.parameters for block in self.blocks)
        whole = rung.gradients == Gradients.WHOLE
        held = left = sum(block.sums for block in (*self.blocks, self.outside)) if whole else 0
        most = held
        reducing = [0]  # gradients of the blocks before, under way
        for index in reversed(range(len(self.blocks))):
            block = self.blocks[index]
            stop = max(index + 1, self.whole)  # the first ones stay
            match rung.parameters:
                case Parameters.BLOCK:
                    gathered = sum(each.parameters for each in self.blocks[max(0, index + 1 - self.whole) : stop])
                case Parameters.MICRO_STEP:
                    gathered = sum(each.parameters for each in self.blocks[:stop])
                case Parameters.WINDOW:
                    gathered = everything
            stays = index < self.whole or rung.parameters == Parameters.WINDOW
            after = gathered if stays else gathered - block.parameters
            computing = gathered + block.gradients + max(held, sum(reducing))
            handing_over = after + block.sums + sum(reducing[1:]) + (left if whole else block.gradients)
            most = max(most, computing, handing_over)
            left -= block.sums
            reducing = [*reducing, block.sums][1 - self.whole :]
        stay = self.blocks if rung.parameters == Parameters.WINDOW else self.blocks[: self.whole]
        kept = sum(block.parameters for block in stay)
        outside = self.outside.parameters + self.outside.gradients
        last = kept + self.outside.gradients + max(held, self.outside.sums)
        return self.shards + max(most + outside, last)
