"""Figures of the tutorial on autoregressive energy machines.

The functions take tensors and return a :class:`matplotlib.figure.Figure`; nothing goes through
``pyplot``, so no backend is chosen and no global state is left behind. Colours are those of Okabe
and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.style
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["conditional_figure", "counted", "error_figure", "plane_figure", "trap_figure"]

BLACK, ORANGE, BLUE, VERMILION = "#000000", "#E69F00", "#0072B2", "#D55E00"
STYLE = "pyro_ext.figures"


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def counted(points: Tensor, half: float, cells: int) -> Tensor:
    """
    Density of points on the square from ``-half`` to ``half``, by counting.

    :param Tensor points: shape ``(n, 2)``.
    :param float half: half a side of the square.
    :param int cells: cells along a side.
    :returns: shape ``(cells, cells)``.
    """
    counts = torch.histogramdd(points.detach().cpu(), cells, range=[-half, half] * 2).hist
    return counts / len(points) / (2 * half / cells) ** 2


def plane_figure(panels: Mapping[str, Tensor], half: float) -> Figure:
    """
    Show densities on the square from ``-half`` to ``half``, all in the same colours.

    :param panels: for each title densities on a grid, first axis to the right.
    :param float half: half a side of the square.
    :returns: a figure with one panel for each.
    :raises ValueError: if there is nothing to show.
    """
    if not panels:
        raise ValueError("panels must hold at least one density")
    brightest = float(torch.quantile(next(iter(panels.values())).flatten(), 0.995))
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(2.4 * len(panels), 2.6), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (title, density) in zip(axes, panels.items(), strict=True):
            ax.imshow(
                _array(density.T),
                origin="lower",
                extent=(-half, half, -half, half),
                cmap="magma",
                vmin=0.0,
                vmax=brightest,
            )
            ax.set(title=title, xticks=[], yticks=[])
    return figure


def conditional_figure(x: Tensor, curves: Mapping[str, Tensor]) -> Figure:
    """
    Show densities of one number; the first is the truth.

    :param Tensor x: shape ``(m,)``.
    :param curves: for each label a density, shape ``(m,)``.
    :returns: a figure with one panel.
    """
    colors = [BLACK, BLUE, VERMILION, ORANGE]
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7.0, 2.6), layout="constrained")
        ax = figure.subplots()
        for (label, curve), color in zip(curves.items(), colors, strict=False):
            is_truth = color == BLACK
            width = 0.0 if is_truth else 1.3
            ax.plot(_array(x), _array(curve), color=color, lw=width, label=label)
            if is_truth:
                ax.fill_between(_array(x), _array(curve), color="0.85", label=label)
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles[1:], labels[1:])
        ax.set(xlabel="x", ylabel="density", title="One conditional", ylim=(0, None))
    return figure


def error_figure(numbers: Sequence[int], errors: Mapping[str, Tensor]) -> Figure:
    """
    Show how errors of estimates fall with the number of draws.

    :param numbers: draws.
    :param errors: for each label absolute errors, shape ``(len(numbers), n)``.
    :returns: a figure with one panel; bands are from the 5th to the 95th percentile.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(3.6, 2.8), layout="constrained")
        ax = figure.subplots()
        for (label, error), color in zip(errors.items(), [BLUE, VERMILION], strict=False):
            low, middle, high = error.quantile(torch.tensor([0.05, 0.5, 0.95]).to(error), 1)
            ax.fill_between(numbers, _array(low), _array(high), color=color, alpha=0.2, lw=0)
            ax.plot(numbers, _array(middle), color=color, marker="o", ms=3, lw=1.2, label=label)
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="draws of the proposal",
            ylabel="error of log p, nats",
            title="Estimates against quadrature",
        )
        ax.legend()
    return figure


def trap_figure(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """
    Show what objectives say while they train, and what quadrature says, all on one scale.

    :param runs: for each title ``{"step": ..., "estimate": ..., "quadrature": ...}``.
    :returns: a figure with one panel for each run.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(3.4 * len(runs), 2.6), layout="constrained")
        axes = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
        for ax, (title, run) in zip(axes, runs.items(), strict=True):
            ax.plot(run["step"], run["estimate"], color=VERMILION, lw=1.3, label="objective")
            ax.plot(run["step"], run["quadrature"], color=BLUE, lw=1.3, label="quadrature")
            ax.set(title=title, xlabel="step")
        axes[0].set_ylabel("log p, nats")
        axes[-1].legend()
    return figure
