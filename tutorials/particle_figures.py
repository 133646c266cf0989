"""Figures that the tutorials on amortized population Gibbs share.

The functions take tensors and return a :class:`matplotlib.figure.Figure`; nothing goes through
``pyplot``. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["COLOURS", "STYLE", "budget_figure", "clustering_figure", "sweeps_figure"]

BLACK, ORANGE, BLUE, VERMILION, GREEN = "#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73"
COLOURS = (BLUE, ORANGE, GREEN, VERMILION)
STYLE = "pyro_ext.figures"

Outline = Callable[[Axes, dict[str, Tensor], int, str], None]


def clustering_figure(
    x: Tensor, mask: Tensor, columns: Mapping[str, Mapping[str, Tensor]], outline: Outline
) -> Figure:
    """
    Show clusterings of several data sets, one in each row.

    :param Tensor x: points, shape ``(data sets, points, 2)``.
    :param Tensor mask: true for points that are data, shape ``(data sets, points)``.
    :param columns: title, and latents for every data set; nothing for the points alone. Points
        have the colours of their ``assignment``, and are elsewhere if the column has an ``x``.
    :param outline: draws a cluster, from an axis, the latents of a data set, the number of the
        cluster and a colour.
    """
    with matplotlib.style.context(STYLE):
        size = (1.75 * len(columns), 1.75 * len(x))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(x), len(columns), squeeze=False)
        for row, (points, is_data) in enumerate(zip(x, mask, strict=True)):
            shown = points[is_data]
            centre = 0.5 * (shown.amin(0) + shown.amax(0))
            half = 0.6 * float((shown.amax(0) - shown.amin(0)).max())
            for axis, (title, latents) in zip(axes[row], columns.items(), strict=True):
                own = {name: value[row] for name, value in latents.items()}
                if own:
                    places = own["x"][is_data] if "x" in own else shown
                    _clusters(axis, places, own["assignment"][is_data], own, outline)
                else:
                    axis.scatter(*shown.T.numpy(), s=4, color="0.4", linewidths=0)
                axis.set_xlim(float(centre[0]) - half, float(centre[0]) + half)
                axis.set_ylim(float(centre[1]) - half, float(centre[1]) + half)
                axis.set(xticks=[], yticks=[], aspect="equal")
                axis.spines[["top", "right"]].set_visible(True)
                if row == 0:
                    axis.set_title(title)
            axes[row][0].set_ylabel(f"{int(is_data.sum())} points")
        return figure


def _clusters(
    axis: Axes, points: Tensor, labels: Tensor, latents: dict[str, Tensor], outline: Outline
) -> None:
    for number in range(int(labels.max()) + 1):
        own = points[labels == number]
        axis.scatter(*own.T.numpy(), s=4, color=COLOURS[number], linewidths=0)
        outline(axis, latents, number, COLOURS[number])


def sweeps_figure(
    log_joint: Mapping[str, Tensor], ess: Mapping[str, Tensor], trained_sweeps: int
) -> Figure:
    """
    Show log joint density and ESS against the number of sweeps.

    :param log_joint: by sampler, minus that of the truth, from sweep 1 on.
    :param ess: fraction of the particles, by block, from sweep 2 on.
    :param int trained_sweeps: where the sweeps of training end.
    """
    with matplotlib.style.context(STYLE):
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


def budget_figure(
    num_sweeps: Sequence[int], log_joint: Tensor, ess: Tensor, budget: int
) -> Figure:
    """
    Show what a budget of particles times sweeps gives: averages over runs, and their scatter.

    :param num_sweeps: numbers of sweeps.
    :param Tensor log_joint: minus that of the truth, ``(numbers of sweeps, runs)``.
    :param Tensor ess: fraction of the particles, of the same shape.
    :param int budget: the product.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        titles = (
            "log joint density, minus that of the truth",
            "effective fraction of the particles",
        )
        for axis, values, title in zip(
            figure.subplots(1, 2), (log_joint, ess), titles, strict=True
        ):
            mean, deviation = values.mean(1).numpy(), values.std(1).numpy()
            axis.fill_between(
                list(num_sweeps), mean - deviation, mean + deviation, color=BLUE, alpha=0.2, lw=0
            )
            axis.plot(list(num_sweeps), mean, "o-", color=BLUE, ms=4)
            axis.set_xscale("log")
            axis.set_xticks(list(num_sweeps), [str(k) for k in num_sweeps])
            axis.minorticks_off()
            axis.set(xlabel=f"sweeps K, with {budget} / K particles", title=title)
        return figure
