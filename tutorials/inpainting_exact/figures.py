"""Figures of the tutorial on in-painting. Nothing goes through ``pyplot``."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["cost_figure", "images_figure"]

BLUE, VERMILION = "#0072B2", "#D55E00"
STYLE = "pyro_ext.figures"
BOXED = {"axes.spines.top": True, "axes.spines.right": True}


def images_figure(panels: Mapping[str, Tensor], is_observed: Tensor, columns: int) -> Figure:
    """
    Show square images in a grid per panel; observed pixels are dark on light.

    :param panels: for each title rows of pixels between 0 and 1, shape ``(n, side**2)``.
    :param Tensor is_observed: shape ``(side**2,)``.
    :param int columns: images per row.
    :raises ValueError: if rows are no square images, or do not fill the grid's rows.
    """
    side = round(len(is_observed) ** 0.5)
    for title, rows in panels.items():
        if rows.dim() != 2 or rows.shape[1] != side * side or len(rows) % columns:
            raise ValueError(
                f"images of {title!r} must have shape (multiple of {columns}, {side * side}), got "
                f"{tuple(rows.shape)}"
            )
    with matplotlib.style.context([STYLE, BOXED]):
        heights = [len(rows) // columns for rows in panels.values()]
        size = (0.55 * columns, 0.55 * sum(heights) + 0.3 * len(panels))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for ax, (title, rows) in zip(axes, panels.items(), strict=True):
            _grid(ax, rows.numpy(), is_observed.numpy(), columns, side)
            ax.set_title(title)
    return figure


def _grid(ax: Axes, rows: np.ndarray, is_observed: np.ndarray, columns: int, side: int) -> None:
    ink = np.clip(rows, 0, 1)
    shade = np.where(is_observed, 1 - ink, ink).reshape(-1, columns, side, side)
    padded = np.pad(shade, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=0.5)
    picture = padded.transpose(0, 2, 1, 3).reshape(-1, columns * (side + 1))
    ax.imshow(picture[:-1, :-1], cmap="gray", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])


def cost_figure(costs: Mapping[str, Mapping[float, Tensor]]) -> Figure:
    """
    Show the cost of an effective draw against the scale of the noise: dots, and their median.

    :param costs: for each method and scale milliseconds and gradients, shape ``(n, 2)``.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7.4, 2.8), layout="constrained")
        titles = ("processor time / ms", "gradients of the energy")
        for i, (ax, title) in enumerate(zip(figure.subplots(1, 2), titles, strict=True)):
            for color, (name, by_scale) in zip((BLUE, VERMILION), costs.items(), strict=True):
                medians = [float(each[:, i].median()) for each in by_scale.values()]
                ax.plot(list(by_scale), medians, color=color, lw=1.3, label=name)
                for scale, each in by_scale.items():
                    ax.plot([scale] * len(each), each[:, i], "o", color=color, ms=3.5, alpha=0.7)
            ax.set(xlabel="scale of the noise", xscale="log", yscale="log")
            ax.set_title(f"{title}, per effective draw")
            ax.invert_xaxis()
            ax.legend()
    return figure
