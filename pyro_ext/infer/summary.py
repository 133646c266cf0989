"""The table that ``MCMC.summary`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from pyro.infer.mcmc.util import summary as statistics_by_site
from torch import Tensor

__all__ = ["summary_table"]

_FORMATS = {"n_eff": "{:.0f}", "r_hat": "{:.3f}"}


def summary_table(samples: Mapping[str, Tensor], prob: float) -> str:
    """
    Statistics of posterior draws, a row for every number.

    The statistics are Pyro's; values are shown to four significant digits, so that a small
    parameter does not read 0.00.

    :param samples: draws by site, ``(chains, draws, ...)``.
    :param float prob: probability mass of the interval.
    """
    rows: list[list[str]] = []
    header = [""]
    for name, statistics in statistics_by_site(dict(samples), prob).items():
        header = ["", *statistics]
        shape = statistics["mean"].shape
        for index in product(*map(range, shape)):
            label = f"{name}[{','.join(map(str, index))}]" if shape else name
            values = ((key, float(value[index])) for key, value in statistics.items())
            rows.append([label, *(_FORMATS.get(key, "{:.4g}").format(v) for key, v in values)])
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    table = [header, *rows]
    cells = [[cell.rjust(w) for cell, w in zip(row, widths, strict=True)] for row in table]
    return "\n".join("  ".join(row) for row in cells)
