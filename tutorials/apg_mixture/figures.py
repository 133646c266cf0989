"""Figures of the tutorial on amortized population Gibbs."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from particle_figures import budget_figure, sweeps_figure
from particle_figures import clustering_figure as _clustering_figure
from torch import Tensor

__all__ = ["budget_figure", "clustering_figure", "sweeps_figure"]


def clustering_figure(
    x: Tensor, mask: Tensor, columns: Mapping[str, Mapping[str, Tensor]]
) -> Figure:
    """
    Show clusterings of several data sets, one in each row, with an ellipse for every cluster.

    :param Tensor x: points, shape ``(data sets, points, 2)``.
    :param Tensor mask: true for points that are data, shape ``(data sets, points)``.
    :param columns: title, and values of ``cluster`` and ``assignment`` for every data set.
    """
    return _clustering_figure(x, mask, columns, _ellipse)


def _ellipse(axis: Axes, latents: dict[str, Tensor], number: int, colour: str) -> None:
    mean, precision = latents["cluster"][number].unbind(-1)
    width, height = (4 * precision.rsqrt()).tolist()  # two standard deviations each way
    ellipse = Ellipse(tuple(mean.tolist()), width, height, fill=False, color=colour, lw=1.2)
    axis.add_patch(ellipse)
