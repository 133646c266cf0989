"""Figures of the tutorial on spline flows.

The functions take tensors and return a :class:`matplotlib.figure.Figure`; nothing goes through
``pyplot``, so no backend is chosen and no global state is left behind. Colours are those of Okabe
and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_ext.training import FitResult

__all__ = [
    "conditional_figure",
    "draws_figure",
    "history_figure",
    "images_figure",
    "plane_figure",
    "uniformity_figure",
]

BLACK, ORANGE, BLUE, VERMILION = "#000000", "#E69F00", "#0072B2", "#D55E00"
STYLE = "pyro_ext.figures"


def _axes(columns: int, height: float = 2.9, width: float = 2.7) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def plane_figure(
    panels: Mapping[str, Tensor | TorchDistribution], half: float, *, cells: int = 150
) -> Figure:
    """
    Show densities on the square from ``-half`` to ``half``, all in the same colours.

    :param panels: for each title points, shape ``(n, 2)``, which are counted, or a distribution.
    :param float half: half a side of the square.
    :param int cells: cells along a side.
    :returns: a figure with one panel for each.
    :raises ValueError: if there is nothing to show, or points have another shape.
    """
    if not panels:
        raise ValueError("panels must hold at least one density")
    densities = {
        title: _counted(each, half, cells)
        if isinstance(each, Tensor)
        else _evaluated(each, half, cells)
        for title, each in panels.items()
    }
    brightest = max(torch.quantile(density, 0.995) for density in densities.values())
    with matplotlib.style.context(STYLE):
        figure, axes = _axes(len(panels), width=2.4)
        for ax, (title, density) in zip(axes, densities.items(), strict=True):
            ax.imshow(
                _array(density).T,
                origin="lower",
                extent=(-half, half, -half, half),
                vmin=0,
                vmax=float(brightest),
                cmap="magma",
            )
            ax.set(title=title, xticks=[], yticks=[])
    return figure


def _counted(points: Tensor, half: float, cells: int) -> Tensor:
    if points.dim() != 2 or points.shape[1] != 2:
        raise ValueError(f"points must have shape (n, 2), got {tuple(points.shape)}")
    points = points.detach().cpu().float()
    counts = torch.histogramdd(points, cells, range=[-half, half] * 2).hist
    return counts / len(points) / (2 * half / cells) ** 2


def _evaluated(density: TorchDistribution, half: float, cells: int) -> Tensor:
    middles = (torch.arange(cells) + 0.5) / cells * 2 * half - half
    grid = torch.cartesian_prod(middles, middles)
    with torch.no_grad():
        return density.log_prob(grid).exp().reshape(cells, cells).float()


def conditional_figure(
    context: Tensor,
    x: Tensor,
    grid: Tensor,
    quantiles: Mapping[str, Tensor],
    levels: Sequence[float],
) -> Figure:
    """
    Show quantiles of one variable against another, over the data.

    :param Tensor context: what the data are conditioned on, shape ``(n,)``.
    :param Tensor x: the data, shape ``(n,)``.
    :param Tensor grid: contexts of the quantiles, shape ``(m,)``.
    :param quantiles: for each of one or two titles, shape ``(len(levels), m)``. The bands of the
        first are filled; the second, the truth for example, is drawn as lines.
    :param levels: the probabilities, increasing and symmetric about one half.
    :returns: a figure with one panel.
    :raises ValueError: if a shape does not fit.
    """
    for title, lines in quantiles.items():
        if lines.shape != (len(levels), len(grid)):
            raise ValueError(
                f"quantiles of {title!r} must have shape ({len(levels)}, {len(grid)}), got "
                f"{tuple(lines.shape)}"
            )
    (filled, bands), *others = ((title, _array(lines)) for title, lines in quantiles.items())
    context, x, grid = map(_array, (context, x, grid))
    with matplotlib.style.context(STYLE):
        figure, (ax,) = _axes(1, 3.4, 6.0)
        ax.scatter(context, x, s=3, color=BLACK, alpha=0.25, linewidths=0, label="data")
        for lower in range(len(levels) // 2):
            label = f"{filled}, {levels[-1 - lower] - levels[lower]:.0%} of probability"
            ax.fill_between(
                grid, bands[lower], bands[-1 - lower], color=BLUE, alpha=0.3, lw=0, label=label
            )
        for title, lines in others:
            for line in lines:
                ax.plot(grid, line, color=VERMILION, lw=0.9)
            ax.plot([], [], color=VERMILION, lw=0.9, label=title)
        ax.set(xlabel="context c", ylabel="x")
        figure.legend(loc="outside right upper")
    return figure


def uniformity_figure(ranks: Mapping[str, Tensor], *, bins: int = 20) -> Figure:
    """
    Show histograms of numbers that should be uniform on the unit interval.

    :param ranks: for each title numbers between 0 and 1, shape ``(n,)``.
    :param int bins: bars of each histogram.
    :returns: a figure with one panel for each; 99 of 100 bars should end in the shaded band.
    """
    with matplotlib.style.context(STYLE):
        figure, axes = _axes(len(ranks), 2.3, 3.4)
        for ax, (title, values) in zip(axes, ranks.items(), strict=True):
            expected = len(values) / bins
            spread = 2.58 * np.sqrt(expected * (1 - 1 / bins))
            ax.axhspan(expected - spread, expected + spread, color=ORANGE, alpha=0.35, lw=0)
            ax.hist(_array(values), bins=bins, range=(0, 1), color=BLUE, alpha=0.7)
            ax.set(title=title, xlabel="P(X < x | c)", ylabel="number")
    return figure


def images_figure(rows: Mapping[str, Tensor], *, columns: int = 16) -> Figure:
    """
    Show rows of small square images.

    :param rows: for each label grey levels between 0 and 1, shape ``(n, pixels)``.
    :param int columns: images to show of each.
    :returns: a figure with one row for each.
    :raises ValueError: if images are not square.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(8.5, 0.55 * len(rows) + 0.1), layout="constrained")
        axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
        for ax, (label, images) in zip(axes, rows.items(), strict=True):
            side = round(images.shape[-1] ** 0.5)
            if side**2 != images.shape[-1]:
                raise ValueError(f"{images.shape[-1]} pixels of {label!r} are no square image")
            square = images[:columns].reshape(-1, side, side)
            strip = torch.nn.functional.pad(square, (1, 0)).transpose(0, 1).flatten(1)
            ax.imshow(_array(strip[:, 1:]), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.set_ylabel(label, rotation=0, ha="right", va="center")
    return figure


def draws_figure(
    draws: Mapping[str, Tensor],
    log_density: Tensor,
    grid: tuple[Tensor, Tensor],
    labels: tuple[str, str],
) -> Figure:
    """
    Show draws of two variables over contours of a density.

    :param draws: for each title shape ``(n, 2)``.
    :param Tensor log_density: on the grid, up to a constant, shape ``(rows, columns)``, where
        rows go with the first variable.
    :param grid: coordinates of rows and of columns.
    :param labels: names of the two variables.
    :returns: a figure with one panel for each.
    """
    height = _array((log_density - log_density.max()).exp())
    rows, columns = map(_array, grid)
    with matplotlib.style.context(STYLE):
        figure, axes = _axes(len(draws))
        for ax, (title, points) in zip(axes, draws.items(), strict=True):
            ax.scatter(*_array(points).T, s=2, color=BLUE, alpha=0.35, linewidths=0)
            ax.contour(
                rows, columns, height.T, levels=[0.01, 0.1, 0.5], colors=VERMILION, linewidths=0.8
            )
            ax.set(title=title, xlabel=labels[0], ylabel=labels[1])
            ax.set(xlim=(rows[0], rows[-1]), ylim=(columns[0], columns[-1]))
    return figure


def history_figure(result: FitResult) -> Figure:
    """
    Show log-likelihoods of the training minibatches and of the validation data.

    :param FitResult result: of ``fit_density`` with validation data.
    :returns: a figure with one panel, where a dot marks the weights that were kept.
    """
    smooth = np.convolve(-_array(result.losses), np.ones(20) / 20, mode="valid")
    steps = _array(result.validation_steps)
    values = _array(result.validation_log_likelihoods)
    with matplotlib.style.context(STYLE):
        figure, (ax,) = _axes(1, 2.6, 5.0)
        ax.plot(np.arange(len(smooth)) + 20, smooth, color=ORANGE, lw=1, label="training")
        ax.plot(steps, values, color=BLUE, lw=1, label="validation")
        kept = steps == result.best_step
        ax.plot(steps[kept], values[kept], "o", color=BLACK, ms=4, label="weights kept")
        top = float(max(smooth.max(), values.max()))
        ax.set(xlabel="step", ylabel="log-likelihood [nats]")
        ax.set_ylim(float(values.max()) - 1.5 * (top - float(values.max())) - 5, top + 2)
        ax.legend()
    return figure
