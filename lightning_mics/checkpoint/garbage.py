"""Python's search for unreachable cycles, put off while a checkpoint's index of millions of records is made.

It would look at all of them over and over, and find none.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Without that search, in the whole process; for as long as making records takes, and no longer."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
