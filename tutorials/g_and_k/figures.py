"""Figures of the tutorial on the g-and-k distribution. Nothing goes through ``pyplot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import gaussian_kde
from torch import Tensor

__all__ = ["marginals_figure"]

BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
STYLE: Any = ["pyro_ext.figures", {"axes.spines.left": False}]


def marginals_figure(
    draws: Mapping[str, Tensor],
    reference: Tensor,
    names: Sequence[str],
    true_values: Sequence[float],
) -> Figure:
    """
    Show histograms of every method's draws below the density of the reference.

    :param draws: for each method draws of shape ``(n, num_parameters)``; one row of panels each.
    :param Tensor reference: draws of the reference, likewise.
    :param names: names of the parameters.
    :param true_values: values that the data were made with.
    :raises ValueError: if there is no method, or draws have another shape.
    """
    if not draws:
        raise ValueError("draws must hold at least one method")
    for name, each in draws.items():
        if each.dim() != 2 or each.shape[1] != len(names):
            raise ValueError(
                f"draws of {name!r} must have shape (n, {len(names)}), got {tuple(each.shape)}"
            )
    with matplotlib.style.context(STYLE):
        size = (2.2 * len(names), 1.0 + 1.25 * len(draws))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(draws), len(names), sharex="col", squeeze=False)
        for i, name in enumerate(names):
            values = reference[:, i].numpy()
            low, high = np.quantile(values, [0.001, 0.999])
            low, high = low - 0.2 * (high - low), high + 0.2 * (high - low)
            axis = np.linspace(low, high, 200)
            density = gaussian_kde(values)(axis)
            for row, (method, each) in enumerate(draws.items()):
                ax = grid[row, i]
                color = (BLUE, ORANGE, GREEN)[row % 3]
                ax.hist(
                    each[:, i].clamp(low, high).numpy(),
                    bins=40,
                    range=(low, high),
                    density=True,
                    color=color,
                    alpha=0.6,
                    label=method if i == 0 else None,
                )
                label = "inverted likelihood" if i == row == 0 else None
                ax.plot(axis, density, color=BLACK, lw=1.1, label=label)
                ax.axvline(true_values[i], color=BLACK, lw=0.8, ls=":")
                ax.set_yticks([])
            grid[-1, i].set_xlabel(name)
        figure.legend(loc="outside upper left", ncols=len(draws) + 1)
    return figure
