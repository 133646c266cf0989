"""Figures of the tutorial on diffusion.

The functions take tensors and return a :class:`matplotlib.figure.Figure`; nothing goes through
``pyplot``, so no backend is chosen and no global state is left behind. Colours are those of Okabe
and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["fields_figure", "lines_figure", "paths_figure", "points_figure"]

BLACK, ORANGE, BLUE, VERMILION = "#000000", "#E69F00", "#0072B2", "#D55E00"
STYLE = "pyro_ext.figures"


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _panels(number: int, half: float) -> tuple[Figure, list[Axes]]:
    if not number:
        raise ValueError("there has to be at least one panel to show")
    figure = Figure(figsize=(2.3 * number, 2.5), layout="constrained")
    axes = list(figure.subplots(1, number, squeeze=False)[0])
    for ax in axes:
        ax.set(xlim=(-half, half), ylim=(-half, half), aspect="equal", xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure, axes


def fields_figure(panels: Mapping[str, tuple[Tensor, Tensor, Tensor]], half: float) -> Figure:
    """
    Show points, and arrows on a grid.

    :param panels: for each title points ``(n, 2)``, grid ``(m, 2)`` and arrows ``(m, 2)``, whose
        directions are shown; their lengths are those of the square roots, in each panel.
    :param float half: half a side of the square.
    :returns: a figure with one panel for each.
    :raises ValueError: if there is nothing to show.
    """
    with matplotlib.style.context(STYLE):
        figure, axes = _panels(len(panels), half)
        for ax, (title, (points, grid, arrows)) in zip(axes, panels.items(), strict=True):
            ax.plot(*_array(points).T, ".", color=ORANGE, markersize=1.0, alpha=0.5)
            lengths = arrows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            arrows = arrows / lengths.sqrt() / lengths.max().sqrt()
            ax.quiver(*_array(grid).T, *_array(arrows).T, color=BLUE, scale=14, width=0.006)
            ax.set_title(title)
    return figure


def points_figure(panels: Mapping[str, Tensor], half: float) -> Figure:
    """
    Show points.

    :param panels: for each title points ``(n, 2)``.
    :param float half: half a side of the square.
    :returns: a figure with one panel for each.
    :raises ValueError: if there is nothing to show.
    """
    with matplotlib.style.context(STYLE):
        figure, axes = _panels(len(panels), half)
        for ax, (title, points) in zip(axes, panels.items(), strict=True):
            ax.plot(*_array(points).T, ".", color=BLACK, markersize=1.0, alpha=0.6)
            ax.set_title(title)
    return figure


def paths_figure(panels: Mapping[str, Tensor], half: float) -> Figure:
    """
    Show paths from noise to data.

    :param panels: for each title paths ``(steps, n, 2)``.
    :param float half: half a side of the square.
    :returns: a figure with one panel for each.
    :raises ValueError: if there is nothing to show.
    """
    with matplotlib.style.context(STYLE):
        figure, axes = _panels(len(panels), half)
        for ax, (title, paths) in zip(axes, panels.items(), strict=True):
            for path in _array(paths.transpose(0, 1)):
                ax.plot(*path.T, color=BLUE, linewidth=0.6, alpha=0.6)
            ax.plot(*_array(paths[0]).T, ".", color=ORANGE, markersize=3, label="noise")
            ax.plot(*_array(paths[-1]).T, ".", color=BLACK, markersize=3, label="data")
            ax.set_title(title)
        axes[0].legend(loc="lower left", handletextpad=0.1)
    return figure


def lines_figure(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    level: float | None = None,
) -> Figure:
    """
    Show lines over a logarithmic axis.

    :param lines: for each name its abscissae and ordinates.
    :param str x_label: of the horizontal axis.
    :param str y_label: of the vertical axis.
    :param level: height of a dashed line.
    :returns: a figure with one panel.
    :raises ValueError: if there is nothing to show.
    """
    if not lines:
        raise ValueError("there has to be at least one line to show")
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(4.2, 2.6), layout="constrained")
        ax = figure.subplots()
        colours = (BLUE, VERMILION, ORANGE)
        for index, (name, (x, y)) in enumerate(lines.items()):
            ax.plot(x, y, "o-", color=colours[index % 3], linewidth=1.2, markersize=3, label=name)
        if level is not None:
            ax.axhline(level, color=BLACK, linestyle="--", linewidth=0.8)
        ax.set(xscale="log", xlabel=x_label, ylabel=y_label)
        ticks = sorted({value for x, _ in lines.values() for value in x})
        ax.set_xticks(ticks, [f"{value:g}" for value in ticks])
        ax.minorticks_off()
        ax.legend()
    return figure
