"""Tables of results: printed, and kept with the date, the machine and the versions."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")
OUTPUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "output")


def progress(message: str) -> None:
    """Say on stderr what is being done; stdout is for tables."""
    print(message, file=sys.stderr, flush=True)


def write_table(name: str, rows: Sequence[dict[str, str]], how: str, packages: list[str]) -> None:
    """
    Print a Markdown table, and write it to ``benchmarks/results/<name>.md``.

    :param str name: name of the file.
    :param rows: the same keys in each, the columns.
    :param str how: the circumstances, such as the number of threads.
    :param packages: what to name the versions of.
    """
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row[key] for key in header) + " |" for row in rows]
    table = "\n".join(lines)
    print(f"\n{name}\n{table}", flush=True)
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    os.makedirs(RESULTS, exist_ok=True)
    with open(os.path.join(RESULTS, f"{name}.md"), "w") as file:
        file.write(f"{date.today()}, {machine()}, {how}; {versions}.\n\n{table}\n")


def threads_in_words(number: int) -> str:
    return "one thread" if number == 1 else f"{number} threads"


def machine() -> str:
    """The processor and how many cores of it there are."""
    try:
        with open("/proc/cpuinfo") as file:
            models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return f"{models[0]}, {len(models)} cores"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
