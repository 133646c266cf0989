"""Figures of the tutorial on amortized population Gibbs.

The functions take tensors and return a :class:`matplotlib.figure.Figure`; nothing goes through
``pyplot``. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch import Tensor

__all__ = ["budget_figure", "clustering_figure", "sweeps_figure"]

BLACK, ORANGE, BLUE, VERMILION, GREEN = "#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73"
CLUSTERS = (BLUE, ORANGE, GREEN)
STYLE: Any = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "figure.dpi": 90,
}


def clustering_figure(
    x: Tensor, mask: Tensor, columns: Mapping[str, Mapping[str, Tensor]]
) -> Figure:
    """
    Show clusterings of several data sets, one in each row.

    :param Tensor x: points, shape ``(data sets, points, 2)``.
    :param Tensor mask: true for points that are data, shape ``(data sets, points)``.
    :param columns: title, and values of ``cluster`` and ``assignment`` for every data set.
    """
    with matplotlib.rc_context(STYLE):
        size = (1.75 * len(columns), 1.75 * len(x))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(x), len(columns), squeeze=False)
        for row, (points, is_data) in enumerate(zip(x, mask, strict=True)):
            shown = points[is_data]
            centre = 0.5 * (shown.amin(0) + shown.amax(0))
            half = 0.6 * float((shown.amax(0) - shown.amin(0)).max())
            for axis, (title, latents) in zip(axes[row], columns.items(), strict=True):
                labels = latents["assignment"][row][is_data]
                _clusters(axis, shown, labels, latents["cluster"][row])
                axis.set_xlim(float(centre[0]) - half, float(centre[0]) + half)
                axis.set_ylim(float(centre[1]) - half, float(centre[1]) + half)
                axis.set(xticks=[], yticks=[], aspect="equal")
                axis.spines[["top", "right"]].set_visible(True)
                if row == 0:
                    axis.set_title(title)
            axes[row][0].set_ylabel(f"{int(is_data.sum())} points")
        return figure


def _clusters(axis: Axes, points: Tensor, labels: Tensor, cluster: Tensor) -> None:
    for number, colour in enumerate(CLUSTERS):
        own = points[labels == number]
        axis.scatter(own[:, 0].numpy(), own[:, 1].numpy(), s=4, color=colour, linewidths=0)
        mean, precision = cluster[number].unbind(-1)
        width, height = (4 * precision.rsqrt()).tolist()  # two standard deviations each way
        ellipse = Ellipse(tuple(mean.tolist()), width, height, fill=False, color=colour, lw=1.2)
        axis.add_patch(ellipse)


def sweeps_figure(
    log_joint: Mapping[str, Tensor], ess: Mapping[str, Tensor], trained_sweeps: int
) -> Figure:
    """
    Show log joint density and ESS against the number of sweeps.

    :param log_joint: by sampler, minus that of the truth, from sweep 1 on.
    :param ess: fraction of the particles, by block, from sweep 2 on.
    :param int trained_sweeps: where the sweeps of training end.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        colours = (BLUE, VERMILION, GREEN)
        for (name, values), colour in zip(log_joint.items(), colours, strict=False):
            left.plot(range(1, len(values) + 1), values.numpy(), color=colour, label=name)
        left.axhline(0, color=BLACK, lw=0.7, ls=":")
        left.set(xlabel="sweep", title="log joint density, minus that of the truth")
        styles: Sequence[str] = ("-", "--", "-.")
        for (name, values), style in zip(ess.items(), styles, strict=False):
            sweeps = range(2, len(values) + 2)
            right.plot(sweeps, values.numpy(), color=BLACK, ls=style, label=name)
        right.set(xlabel="sweep", title="effective fraction of the particles", ylim=(0, 1.05))
        for axis in (left, right):
            axis.axvspan(1, trained_sweeps, color="0.93", zorder=0)
            axis.legend()
        return figure


def budget_figure(num_sweeps: Sequence[int], log_joint: Tensor, budget: int) -> Figure:
    """
    Show what a budget of particles times sweeps gives.

    :param num_sweeps: numbers of sweeps.
    :param Tensor log_joint: minus that of the truth, for each of them and each data set.
    :param int budget: the product.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.9), layout="constrained")
        axis = figure.subplots()
        mean = log_joint.mean(1)
        error = log_joint.std(1) / log_joint.shape[1] ** 0.5
        bars = {"fmt": "o-", "color": BLUE, "ms": 4, "capsize": 2}
        axis.errorbar(list(num_sweeps), mean.numpy(), error.numpy(), **bars)
        axis.axhline(0, color=BLACK, lw=0.7, ls=":")
        axis.set_xscale("log")
        axis.set_xticks(list(num_sweeps), [str(k) for k in num_sweeps])
        axis.minorticks_off()
        axis.set(xlabel=f"sweeps K, with {budget} / K particles")
        axis.set_title("log joint density, minus that of the truth")
        return figure
