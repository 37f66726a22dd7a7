"""A choice: one of a few words that a user gives for an argument."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Choice(StrEnum):
    """Words that an argument takes."""

    @classmethod
    def parse(cls, word: str, argument: str) -> Self:
        """The one that a user gave.

        Args:
            word: what was given.
            argument: for which.

        Raises:
            ValueError: if there is none of that name; names the argument, and what is allowed.
        """
        if word not in list(cls):
            raise ValueError(f"{argument}={word!r} is not understood; choose one of {', '.join(cls)}")
        return cls(word)
