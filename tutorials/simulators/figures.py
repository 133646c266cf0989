"""Figures of the tutorial on simulators. Nothing goes through ``pyplot``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import gaussian_kde
from torch import Tensor

__all__ = ["epidemics_figure", "pairs_figure"]

BLACK, GREY = "#000000", "#BBBBBB"
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
STYLE = "pyro_ext.figures"


def epidemics_figure(x: Tensor, simulated: Tensor, every: int) -> Figure:
    """
    Show an observed epidemic among simulated ones.

    :param Tensor x: logarithms of counts, shape ``(times,)``.
    :param Tensor simulated: shape ``(n, times)``.
    :param int every: days between counts.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(5.5, 2.4), layout="constrained")
        ax = figure.subplots()
        days = every * np.arange(1, len(x) + 1)
        ax.plot(days, simulated.T.numpy(), color=GREY, lw=0.5)
        ax.plot(days, x.numpy(), color=BLACK, marker="o", ms=3, label="observed")
        ax.set(xlabel="day", ylabel="log infectious fraction", ylim=(-9, 0))
        ax.legend(loc="lower right")
    return figure


def pairs_figure(
    draws: Mapping[str, Mapping[str, Tensor]], reference: str, truth: Mapping[str, float]
) -> Figure:
    """
    Show joint and marginal distributions of two latents, one panel per method.

    :param draws: for each method, draws by site, shape ``(n,)``.
    :param str reference: the method whose contours and densities are in every panel.
    :param truth: values that the data were made with, by site; the first two are shown.
    :raises ValueError: if the reference is not among the methods.
    """
    if reference not in draws:
        raise ValueError(f"reference={reference!r} is not among {list(draws)}")
    first, second = list(truth)[:2]
    exact = np.stack([draws[reference][name].numpy() for name in (first, second)])
    limits = [np.quantile(row, [0.0005, 0.9995]) for row in exact]
    limits = [(a - 0.3 * (b - a), b + 0.3 * (b - a)) for a, b in limits]
    axes = [np.linspace(*limit, 80) for limit in limits]
    mesh = np.meshgrid(*axes)
    density = gaussian_kde(exact)(np.stack([m.ravel() for m in mesh])).reshape(80, 80)
    levels = _levels(density, (0.95, 0.5))
    others = [name for name in draws if name != reference]
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(2.3 * len(others), 4.6), layout="constrained")
        grid = figure.subplots(3, len(others), sharey="row", squeeze=False)
        for column, name in enumerate(others):
            color = COLORS[column % len(COLORS)]
            joint = grid[0, column]
            values = [draws[name][site].numpy() for site in (first, second)]
            joint.scatter(*values, s=2, color=color, alpha=0.35, linewidths=0)
            joint.contour(*mesh, density, levels=levels, colors=BLACK, linewidths=0.8)
            joint.plot(*[truth[site] for site in (first, second)], "+", color=BLACK, ms=9)
            joint.set(title=name, xlabel=first, xlim=limits[0], ylim=limits[1])
            for row, site in enumerate((first, second), 1):
                ax = grid[row, column]
                bins = np.linspace(*limits[row - 1], 41)
                ax.hist(values[row - 1], bins=bins, density=True, color=color, alpha=0.6)
                line = gaussian_kde(exact[row - 1])(axes[row - 1])
                ax.plot(axes[row - 1], line, color=BLACK, lw=1, label=reference)
                ax.axvline(truth[site], color=BLACK, lw=0.8, ls=":")
                ax.set(xlabel=site, yticks=[])
        grid[0, 0].set_ylabel(second)
        grid[1, 0].legend(loc="upper right", handlelength=1)
    return figure


def _levels(density: Any, masses: tuple[float, ...]) -> list[float]:
    """Heights of the contours that hold these parts of the mass, increasing."""
    ordered = np.sort(density.ravel())[::-1]
    inside = np.cumsum(ordered) / ordered.sum()
    return sorted(float(ordered[np.searchsorted(inside, mass)]) for mass in masses)
