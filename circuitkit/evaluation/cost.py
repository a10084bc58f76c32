"""What a call costs: seconds and peak memory."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """What a call took.

    Args:
        seconds: wall-clock time.
        peak_bytes: how far memory rose above what was held before: the resident set of the process, or on a GPU
            what torch allocated there; None where the system does not tell.
    """

    seconds: float
    peak_bytes: int | None


def measured(function: Callable[[], T], device: torch.device) -> tuple[T, Cost]:
    """The value of a call and what it took.

    Memory that the process freed earlier and kept is used again without being counted: for a figure that can be
    compared, call this once in a fresh process.
    """
    gc.collect()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else _resident_after_reset()
    start = time.perf_counter()
    value = function()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if cuda else _peak()
    return value, Cost(seconds, None if peak is None or before is None else max(0, peak - before))


def _resident_after_reset() -> int | None:
    """The resident set now, as the start of a new peak where the kernel allows that (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return _peak()


def _peak() -> int | None:
    """Largest resident set so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
