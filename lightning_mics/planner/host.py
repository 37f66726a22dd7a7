"""Host: what an engine's collectives cost a rank's processors, beside what the network takes.

Hooks, copies, memory that is touched for the first time, threads that carry messages and add up: where ranks compute on
processors, all of it is taken from the computation. In between, messages are waited for. Each cost is a line over the
bytes of a block, as measured on the cluster at hand (`measured_host`). Accelerators have none: their hosts run ahead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Part(StrEnum):
    """What costs something."""

    HOOKS = "hooks"
    """Of a block in a micro-step, forward and backward, whatever is sent."""
    KEEP = "keep"
    """Gradients stay whole after a micro-step, and parameters do not, so that the engine keeps gradients apart."""
    GATHER = "gather"
    HOP_1 = "hop 1"
    HOP_2 = "hop 2"


class Thread(StrEnum):
    """Which of a rank's threads pays."""

    COMPUTING = "computing"
    BESIDE = "beside"
    NONE = "none"
    """Nothing runs: messages are under way, and ranks wait for one another. What tiers have as latency, where an
    engine has no lines."""


@dataclass(frozen=True)
class Line:
    """Seconds of a processor, with all ranks of the cluster at work: `seconds + per_byte * nbytes`.

    Raises:
        ValueError: for a negative or infinite figure.
    """

    seconds: float = 0.0
    per_byte: float = 0.0

    def __post_init__(self) -> None:
        for name in ("seconds", "per_byte"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value!r} must be finite and not negative")

    def of(self, nbytes: float) -> float:
        """Seconds, of so many bytes."""
        return self.seconds + self.per_byte * nbytes


_NOTHING = Line()


@dataclass(frozen=True)
class Cost:
    """Where a line belongs.

    Attributes:
        part: what costs.
        between_nodes: whether it goes between nodes; of collectives only.
        thread: who pays.
    """

    part: Part
    between_nodes: bool = False
    thread: Thread = Thread.COMPUTING

    def __str__(self) -> str:
        return f"{self.part}, {'between' if self.between_nodes else 'inside'}, {self.thread}"

    @classmethod
    def parse(cls, text: str) -> Cost:
        """What `str` wrote.

        Raises:
            ValueError: if it did not.
        """
        part, where, thread = text.split(", ")
        return cls(Part(part), ("inside", "between").index(where) == 1, Thread(thread))


@dataclass(frozen=True)
class Host:
    """An engine's costs; what has no line here is told by other figures.

    Attributes:
        lines: by what they are of.
    """

    lines: Mapping[Cost, Line] = field(default_factory=dict)

    def knows(self, part: Part) -> bool:
        """Whether there is any line of it."""
        return any(cost.part == part for cost in self.lines)

    def seconds(self, part: Part, thread: Thread, nbytes: float, between_nodes: bool = False) -> float:
        """What it costs, by the line of its tier; by the other tier's where this one was not measured."""
        here = Cost(part, between_nodes, thread)
        other = Cost(part, not between_nodes, thread)
        measured = any(Cost(part, between_nodes, each) in self.lines for each in Thread)
        return self.lines.get(here if measured else other, _NOTHING).of(nbytes)

    def as_json(self) -> dict[str, Any]:
        """For a probe's file."""
        return {str(cost): asdict(line) for cost, line in self.lines.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Host:
        """What `as_json` wrote.

        Raises:
            TypeError, ValueError: if it did not.
        """
        return cls({Cost.parse(text): Line(**line) for text, line in content.items()})
