"""Figures of the tutorial on partial observations. Nothing goes through ``pyplot``."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.style
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["marginals_figure", "paths_figure"]

BLACK, BLUE, VERMILION = "#000000", "#0072B2", "#D55E00"
STYLE = "pyro_ext.figures"


def paths_figure(
    times: Tensor, truth: Tensor, paths: Tensor, recorded: tuple[Tensor, Tensor]
) -> Figure:
    """
    Show the voltage and the recovery variable of draws, with the truth and what was recorded.

    :param Tensor times: shape ``(num_steps,)``.
    :param Tensor truth: voltage and recovery, shape ``(num_steps, 2)``.
    :param Tensor paths: those of draws, shape ``(n, num_steps, 2)``.
    :param recorded: when the voltage was recorded, and its values.
    :raises ValueError: if shapes differ.
    """
    if truth.shape != (len(times), 2) or paths.shape[1:] != truth.shape:
        raise ValueError(
            f"truth and paths must have shapes ({len(times)}, 2) and (n, {len(times)}, 2), got "
            f"{tuple(truth.shape)} and {tuple(paths.shape)}"
        )
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=paths.dtype)
    low, middle, high = paths.quantile(levels, 0)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7.6, 4.0), layout="constrained")
        for i, ax in enumerate(figure.subplots(2, sharex=True)):
            ax.fill_between(times, low[:, i], high[:, i], color=BLUE, alpha=0.2, lw=0, label="90%")
            ax.plot(times, middle[:, i], color=BLUE, lw=1.2, label="median")
            for path in paths[:5]:
                ax.plot(times, path[:, i], color=BLUE, lw=0.4, alpha=0.6)
            ax.plot(times, truth[:, i], color=BLACK, lw=1.0, ls="--", label="truth")
            ax.set_ylabel(("voltage v", "recovery r")[i])
            if i == 0:
                ax.plot(*recorded, "o", ms=3.5, color=VERMILION, label="recorded")
                ax.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 0.98))
        ax.set_xlabel("time")
    return figure


def marginals_figure(
    draws: Tensor,
    reference: tuple[Tensor, Tensor],
    names: Sequence[str],
    true_values: Sequence[float],
) -> Figure:
    """
    Show histograms of draws, filled, and of weighted draws, as lines.

    :param Tensor draws: shape ``(n, num_parameters)``.
    :param reference: draws of the same number of parameters, and their weights.
    :param names: names of the parameters.
    :param true_values: values that the data were made with.
    """
    others, weights = reference
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(2.1 * len(names), 2.3), layout="constrained")
        for i, ax in enumerate(figure.subplots(1, len(names))):
            low, high = draws[:, i].quantile(0.002), draws[:, i].quantile(0.998)
            edges = np.linspace(
                float(low - 0.1 * (high - low)), float(high + 0.1 * (high - low)), 26
            )
            ax.hist(
                draws[:, i], edges, density=True, color=BLUE, alpha=0.5, label="ConstrainedHMC"
            )
            heights, _ = np.histogram(others[:, i], edges, density=True, weights=weights)
            ax.stairs(heights, edges, color=BLACK, lw=1.2, label="particle filter")
            ax.axvline(true_values[i], color=VERMILION, lw=1, ls=":", label="truth")
            ax.set(xlabel=names[i], yticks=[])
            ax.spines["left"].set_visible(False)
        handles, labels = ax.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure
