"""Figures of the tutorial on human pose. Nothing goes through ``pyplot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["errors_figure", "poses_figure"]

BLACK, BLUE, VERMILION, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
STYLE = "pyro_ext.figures"
Edges = Sequence[tuple[int, int]]


def poses_figure(
    edges: Edges, joints: Mapping[str, Tensor], images: Mapping[str, Tensor], observed: Tensor
) -> Figure:
    """
    Show poses as the camera sees them, from the front and from the side.

    :param edges: pairs of joints to connect.
    :param joints: for each title positions in metres, shape ``(num_joints, 3)``; the first is
        drawn in black.
    :param images: their images, shape ``(2 * num_joints,)``.
    :param Tensor observed: the image that was observed, shown by circles.
    :raises ValueError: if there is nothing to show, or images belong to other poses.
    """
    if not joints or list(joints) != list(images):
        raise ValueError(
            f"there must be an image of every pose, got {list(joints)} and {list(images)}"
        )
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(1.75 * len(joints), 6.2), layout="constrained")
        grid = figure.subplots(3, len(joints), sharex="row", sharey="row", squeeze=False)
        for column, (title, X) in enumerate(joints.items()):
            color = BLACK if column == 0 else BLUE
            seen = images[title].unflatten(-1, (2, -1))
            x, y, z = X.unbind(-1)
            # the camera looks at the front, so that the body's left is on the right of the image
            views = (seen.unbind(), (-x, y), (z, y))
            for ax, (across, up) in zip(grid[:, column], views, strict=True):
                _draw(ax, edges, across, up, color)
            across, up = observed.unflatten(-1, (2, -1))
            grid[0, column].plot(across, up, "o", ms=4, mfc="none", mec=VERMILION, mew=0.8)
            grid[0, column].set_title(title)
        for ax, label in zip(
            grid[:, 0], ("image", "from the front", "from the side"), strict=True
        ):
            ax.set_ylabel(label)
    return figure


def _draw(ax: Axes, edges: Edges, across: Tensor, up: Tensor, color: str) -> None:
    for i, j in edges:
        ax.plot(across[[i, j]], up[[i, j]], color=color, lw=1.6, solid_capstyle="round")
    ax.plot(across, up, "o", ms=2.2, color=color)
    ax.set(xticks=[], yticks=[], aspect="equal")
    for side in ax.spines.values():
        side.set_visible(False)


def errors_figure(runs: Mapping[str, Sequence[tuple[Tensor, Tensor]]]) -> Figure:
    """
    Show the error of running posterior means against time.

    :param runs: for each method, seconds and errors of one or more runs.
    :raises ValueError: if there is no run.
    """
    if not any(runs.values()):
        raise ValueError("runs must hold at least one run")
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(6.2, 3.0), layout="constrained")
        ax = figure.subplots()
        for color, (name, lines) in zip((BLUE, VERMILION, GREEN), runs.items(), strict=False):
            for i, (seconds, errors) in enumerate(lines):
                ax.plot(seconds, 100 * errors, color=color, lw=1.3, label=None if i else name)
        ax.set(
            xlabel="processor time / s, set-up and warm-up included",
            ylabel="error of the mean pose / cm",
            xscale="log",
            yscale="log",
        )
        ax.legend()
    return figure
