"""What an action raises, as text that a rank can hand back."""

from __future__ import annotations

from collections.abc import Callable


def raised(action: Callable[[], object]) -> str:
    """The exception's class and message, or "nothing"."""
    try:
        action()
    except Exception as exception:
        return f"{type(exception).__name__}: {exception}"
    return "nothing"
