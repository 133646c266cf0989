"""Finished runs, kept in files so that a benchmark started again does what is missing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks._report import OUTPUT, progress


def output_path(name: str) -> str:
    """Where a file of this name is kept."""
    os.makedirs(OUTPUT, exist_ok=True)
    return os.path.join(OUTPUT, name)


def kept(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result in a file of this name, or else by running."""
    path = output_path(f"{name}.json")
    if not os.path.exists(path):
        progress(name)
        result = run()
        with open(path, "w") as file:
            json.dump(result, file)
    with open(path) as file:
        found: dict[str, Any] = json.load(file)
    return found


def standard_error(values: Tensor) -> float:
    """Of the mean of independent values."""
    return float(values.std()) / math.sqrt(len(values))
