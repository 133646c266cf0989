"""Figures of the tutorial on questions to a trained autoencoder.

The functions take tensors and return a :class:`matplotlib.figure.Figure`; nothing goes through
``pyplot``, so no backend is chosen and no global state is left behind. Colours are those of Okabe
and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

__all__ = [
    "completions_figure",
    "intervals_figure",
    "posteriors_figure",
    "questions_figure",
    "scores_figure",
]

BLACK, ORANGE, BLUE, VERMILION = "#000000", "#E69F00", "#0072B2", "#D55E00"
GREEN, PINK, SKY = "#009E73", "#CC79A7", "#56B4E9"
STYLE = "pyro_ext.figures"


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _colours(images: Tensor, seen: Tensor | None) -> np.ndarray:
    """Grey levels, but from blue to orange where a pixel was seen; shape ``(n, s, s, 3)``."""
    side = math.isqrt(images.shape[-1])
    if side**2 != images.shape[-1]:
        raise ValueError(f"{images.shape[-1]} pixels are no square image")
    grey = images.detach().float().clamp(0, 1).unsqueeze(-1)
    colours = grey.expand(*images.shape, 3)
    if seen is not None:
        dark, bright = (torch.tensor(matplotlib.colors.to_rgb(c)) for c in (BLUE, ORANGE))
        colours = torch.where(seen.unsqueeze(-1), dark + grey * (bright - dark), colours)
    return _array(colours.reshape(*images.shape[:-1], side, side, 3))


def _show(ax: Axes, image: np.ndarray) -> None:
    ax.imshow(image)
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def questions_figure(images: Tensor, mask: Tensor, completed: Tensor | None = None) -> Figure:
    """
    Show images, what was seen of them, and some completions.

    :param Tensor images: shape ``(n, pixels)``, between 0 and 1.
    :param Tensor mask: true where a pixel was seen, of the same shape.
    :param completed: further images, shape ``(k, n, pixels)``.
    :returns: a figure with a column for each image. What was seen goes from blue for black to
        orange for white; what was not is grey in the second row.
    """
    rows = [("image", images, None), ("seen", torch.where(mask, images, 0.75), mask)]
    rows += [
        (f"draw {i + 1}", c, mask) for i, c in enumerate([] if completed is None else completed)
    ]
    with matplotlib.style.context(STYLE):
        size = 0.72
        figure = Figure(
            figsize=(size * images.shape[0] + 0.6, size * len(rows)), layout="constrained"
        )
        axes = figure.subplots(len(rows), images.shape[0], squeeze=False)
        for line, (label, shown, seen) in zip(axes, rows, strict=True):
            for ax, image in zip(line, _colours(shown, seen), strict=True):
                _show(ax, image)
            line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    return figure


def completions_figure(
    image: Tensor, mask: Tensor, completed: Mapping[str, Tensor], *, side: int = 3
) -> Figure:
    """
    Show one question, and a square of completions by each method.

    :param Tensor image: shape ``(pixels,)``.
    :param Tensor mask: what was seen, of the same shape.
    :param completed: for each title at least ``side ** 2`` images, shape ``(n, pixels)``.
    :param int side: images along the side of a square.
    """
    with matplotlib.style.context(STYLE):
        width = 1.5
        figure = Figure(figsize=(width * (len(completed) + 1), width + 0.3), layout="constrained")
        axes = figure.subplots(1, len(completed) + 1)
        seen = _colours(torch.where(mask, image, 0.75), mask)
        _show(axes[0], seen)
        axes[0].set_title("seen")
        for ax, (title, images) in zip(axes[1:], completed.items(), strict=True):
            tiles = _colours(images[: side**2], mask)
            gap = np.ones((len(tiles), 1, tiles.shape[2], 3))
            tiles = np.concatenate([tiles, gap], 1)
            tiles = np.concatenate([tiles, np.ones((len(tiles), tiles.shape[1], 1, 3))], 2)
            lines = [
                np.concatenate(list(tiles[i * side : (i + 1) * side]), 1) for i in range(side)
            ]
            _show(ax, np.concatenate(lines, 0)[:-1, :-1])
            ax.set_title(title)
    return figure


def posteriors_figure(
    draws: Mapping[str, Tensor], log_posterior: Tensor, axis: Tensor, *, half: float = 3.0
) -> Figure:
    """
    Show draws of two latents over the contours of the exact posterior.

    :param draws: for each title shape ``(n, 2)``.
    :param Tensor log_posterior: on the grid, shape ``(len(axis) ** 2,)``, the second latent
        running faster.
    :param Tensor axis: coordinates along either side of the grid.
    :param float half: show from minus this to this.
    :returns: a figure with one panel for the posterior and one for each title. The contours hold
        50, 90 and 99 % of the probability.
    """
    size = len(axis)
    if log_posterior.shape != (size**2,):
        raise ValueError(
            f"log_posterior must have shape ({size**2},), got {tuple(log_posterior.shape)}"
        )
    probability = log_posterior.detach().double().softmax(0)
    levels = _levels(probability, (0.99, 0.9, 0.5))
    height = _array(probability.reshape(size, size).T)
    place = _array(axis)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(2.0 * (len(draws) + 1), 2.2), layout="constrained")
        axes = figure.subplots(1, len(draws) + 1, sharex=True, sharey=True)
        for ax, (title, points) in zip(axes, {"exact": None, **draws}.items(), strict=True):
            if points is None:
                ax.contourf(place, place, height, [*levels, 1.0], colors=[SKY, BLUE, BLACK])
            else:
                ax.scatter(*_array(points).T, s=3, color=BLUE, alpha=0.35, linewidths=0)
                ax.contour(place, place, height, levels, colors=VERMILION, linewidths=0.8)
            ax.set(title=title, xlabel="$z_1$", xlim=(-half, half), ylim=(-half, half))
            ax.set_aspect("equal")
        axes[0].set_ylabel("$z_2$")
    return figure


def _levels(probability: Tensor, contents: Sequence[float]) -> list[float]:
    """Smallest probabilities of a cell in the smallest sets with these contents, increasing."""
    ordered = probability.sort(descending=True).values
    total = ordered.cumsum(0)
    last = len(ordered) - 1
    indices = [min(int((total < content).sum()), last) for content in contents]
    levels = [float(ordered[i]) for i in indices]
    # contours must differ, also if a handful of cells holds everything
    return [level * (1 + 1e-6 * i) for i, level in enumerate(levels)]


def scores_figure(scores: Mapping[str, Tensor], reference: str, label: str) -> Figure:
    """
    Compare log-densities of the same questions by several methods with those of one of them.

    :param scores: for each method shape ``(questions,)``.
    :param str reference: the method on the horizontal axis.
    :param str label: what the axes show.
    """
    markers = "osD^vP"
    colours = [BLUE, VERMILION, GREEN, ORANGE, PINK, SKY]
    others = {name: values for name, values in scores.items() if name != reference}
    if len(others) > len(markers):
        raise ValueError(f"at most {len(markers)} methods fit beside the reference")
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        ax = figure.subplots()
        x = _array(scores[reference])
        for (name, values), marker, colour in zip(others.items(), markers, colours, strict=False):
            ax.plot(x, _array(values), marker, ms=4, mfc="none", color=colour, label=name)
        low = min(float(values.min()) for values in scores.values())
        high = max(float(values.max()) for values in scores.values())
        ax.plot([low, high], [low, high], color=BLACK, lw=0.7)
        ax.set(xlabel=f"{label}, {reference}", ylabel=label)
        figure.legend(loc="outside right upper")
    return figure


def intervals_figure(
    draws: Tensor, truth: Tensor, mask: Tensor, names: Sequence[str], *, content: float = 0.9
) -> Figure:
    """
    Show what is imputed of one row of a table, with its uncertainty.

    :param Tensor draws: of the completed row, shape ``(n, columns)``.
    :param Tensor truth: the whole row, shape ``(columns,)``.
    :param Tensor mask: true where it was seen, of the same shape.
    :param names: of the columns.
    :param float content: probability of the intervals.
    """
    tail = torch.tensor([(1 - content) / 2, 0.5, (1 + content) / 2], dtype=draws.dtype)
    low, middle, high = (_array(q) for q in draws.quantile(tail, 0))
    place, seen, actual = np.arange(len(names)), _array(mask), _array(truth)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(8.0, 3.2), layout="constrained")
        ax = figure.subplots()
        free = ~seen
        ax.vlines(place[free], low[free], high[free], color=SKY, lw=4, label=f"{content:.0%}")
        ax.plot(place[free], middle[free], "_", color=BLUE, ms=8, label="median")
        ax.plot(place[free], actual[free], "x", color=VERMILION, ms=5, label="truth")
        ax.plot(place[seen], actual[seen], "o", color=BLACK, ms=3.5, label="seen")
        ax.set_xticks(place, names, rotation=90)
        ax.set(ylabel="standard deviations")
        figure.legend(loc="outside right upper")
    return figure
