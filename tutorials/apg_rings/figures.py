"""Figures of the tutorial on rings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from particle_figures import COLOURS, STYLE, sweeps_figure
from particle_figures import clustering_figure as _clustering_figure
from torch import Tensor

__all__ = ["clustering_figure", "shape_figure", "sweeps_figure"]

Decoder = Callable[[Tensor], Tensor]


def clustering_figure(
    x: Tensor, mask: Tensor, columns: Mapping[str, Mapping[str, Tensor]], decoder: Decoder
) -> Figure:
    """
    Show clusterings of several data sets, one in each row, with the curve of every cluster.

    :param Tensor x: points, shape ``(data sets, points, 2)``.
    :param Tensor mask: true for points that are data, shape ``(data sets, points)``.
    :param columns: title, and values of ``centre`` and ``assignment`` for every data set.
    :param decoder: from angles to places relative to a centre.
    """
    curve = _curve(decoder)

    def outline(axis: Axes, latents: dict[str, Tensor], number: int, colour: str) -> None:
        axis.plot(*(latents["centre"][number] + curve).T.numpy(), color=colour, lw=1.0)

    return _clustering_figure(x, mask, columns, outline)


def shape_figure(decoders: Mapping[str, Decoder]) -> Figure:
    """
    Show the shapes that decoders give to clusters.

    :param decoders: by title.
    """
    with matplotlib.style.context(STYLE):
        size = (1.9 * len(decoders), 2.1)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(decoders), squeeze=False, sharex=True, sharey=True)[0]
        for axis, (title, decoder) in zip(axes, decoders.items(), strict=True):
            curve = _curve(decoder)
            axis.plot(*(curve - curve[:-1].mean(0)).T.numpy(), color=COLOURS[0], lw=1.2)
            axis.set(title=title, aspect="equal")
        return figure


@torch.no_grad()
def _curve(decoder: Decoder) -> Tensor:
    return decoder(torch.linspace(-math.pi, math.pi, 121))
