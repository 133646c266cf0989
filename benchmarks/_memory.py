"""Memory that an operation needs."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import torch


def growth(operation: Callable[[], object], device: str) -> int:
    """Bytes by which the memory in use grows at most during an operation."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        operation()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest resident set starts anew
    before = resident("VmRSS")
    operation()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])
