"""Memory: how much a rank has, has in use, and had in use at most.

On an accelerator these are the allocator's figures. On CPU they are the process's resident set, as Linux counts it, so
that what the C library keeps for later counts as well.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def in_use(device: torch.device) -> int:
    """Bytes in use now."""
    return _resident("VmRSS") if device.type == "cpu" else torch.accelerator.memory_allocated(device)


def peak(device: torch.device) -> int:
    """The most bytes in use at any time since `reset_peak`."""
    return _resident("VmHWM") if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)


def reset_peak(device: torch.device) -> None:
    """Begin to look for the peak anew. Where Linux does not allow it, the peak is that of the whole process."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _CLEAR.write_text("5")


def total(device: torch.device, ranks_per_node: int) -> int:
    """Bytes that there are for one rank: the device's, or an equal part of the node's memory."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks_per_node
    return torch.accelerator.get_memory_info(device)[1]


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} does not tell {field}; a memory budget needs Linux, or an accelerator")
