"""Figures of the tutorial on tracking, and its animation."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from canvas import CANVAS, RANGE, SIZE
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from particle_figures import COLOURS, STYLE
from PIL import Image
from torch import Tensor

__all__ = [
    "animation",
    "ess_figure",
    "frames_figure",
    "images_figure",
    "scores_figure",
    "sweeps_figure",
]

DIGITS = (*COLOURS, "#CC79A7")
IMAGE: Any = {"cmap": "gray_r", "vmin": 0, "vmax": 1, "interpolation": "nearest"}


def frames_figure(rows: Mapping[str, tuple[Tensor, Tensor | None]], every: int = 1) -> Figure:
    """
    Show videos as rows of frames.

    :param rows: title, frames ``(frames, CANVAS, CANVAS)``, and positions ``(frames, digits, 2)``
        to draw as coloured boxes, or ``None``.
    :param int every: show only some of the frames.
    """
    num_columns = len(range(0, len(next(iter(rows.values()))[0]), every))
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(0.95 * num_columns, 1.12 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), num_columns, squeeze=False)
        for row, (title, (frames, where)) in zip(axes, rows.items(), strict=True):
            for axis, t in zip(row, range(0, len(frames), every), strict=True):
                _frame(axis, frames[t], None if where is None else where[t])
            row[0].set_title(title)
        return figure


def _frame(axis: Axes, frame: Tensor, where: Tensor | None) -> None:
    axis.imshow(frame.numpy(), **IMAGE)
    for position, colour in zip([] if where is None else where, DIGITS, strict=False):
        left, top = (0.5 * RANGE * (position + 1) - 0.5).tolist()
        across = left + SIZE * np.array([0, 1, 1, 0, 0])
        down = top + SIZE * np.array([0, 0, 1, 1, 0])
        axis.plot(across, down, color=colour, lw=1)
    axis.set(xticks=[], yticks=[], xlim=(-0.5, CANVAS - 0.5), ylim=(CANVAS - 0.5, -0.5))
    axis.spines[["top", "right"]].set_visible(True)


def images_figure(rows: Mapping[str, Tensor]) -> Figure:
    """
    Show images of digits.

    :param rows: title and images, ``(images, SIZE, SIZE)``.
    """
    num_columns = max(len(images) for images in rows.values())
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(0.6 * num_columns, 0.85 * len(rows)))
        figure.set_layout_engine("constrained", h_pad=0.1)  # room for titles
        axes = figure.subplots(len(rows), num_columns, squeeze=False)
        for row, (title, images) in zip(axes, rows.items(), strict=True):
            for axis in row:
                axis.set_axis_off()
            for axis, image in zip(row, images, strict=False):
                axis.imshow(image.numpy(), **IMAGE)
            row[0].set_title(title).set_in_layout(False)  # longer than its column is wide
        return figure


def scores_figure(frame: Tensor, images: Tensor, scores: Tensor, drawn: Tensor) -> Figure:
    """
    Show what the proposal of positions sees.

    :param Tensor frame: a frame.
    :param Tensor images: digits to look for, ``(digits, SIZE, SIZE)``.
    :param Tensor scores: of every whole pixel, ``(digits, rows, columns)``.
    :param Tensor drawn: positions that were drawn, ``(digits, draws, 2)``.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(1.7 * (len(images) + 1), 2.0), layout="constrained")
        axes = figure.subplots(1, len(images) + 1)
        _frame(axes[0], frame, None)
        axes[0].set_title("frame")
        for number, axis in enumerate(axes[1:]):
            score = scores[number] - scores[number].max()
            axis.imshow(score.numpy(), cmap="viridis", vmin=-100, vmax=0)
            left, top = (0.5 * RANGE * (drawn[number] + 1)).T.numpy()
            axis.plot(left, top, ".", color=DIGITS[number], ms=4)
            axis.set(xlim=(-0.5, RANGE + 0.5), ylim=(RANGE + 0.5, -0.5))
            inset = axis.inset_axes((0.68, 0.68, 0.3, 0.3))
            inset.imshow(images[number].numpy(), **IMAGE)
            inset.set(xticks=[], yticks=[])
            axis.set(xticks=[], yticks=[], title=f"score of digit {number + 1}")
        return figure


def sweeps_figure(curves: Mapping[str, tuple[Tensor, Tensor]], trained_sweeps: int) -> Figure:
    """
    Show squared error and log joint density against the number of sweeps.

    :param curves: squared errors, and log joint densities per frame relative to those after the
        first sweep, by name; from sweep 1 on.
    :param int trained_sweeps: where the sweeps of training end.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        styles = ("-", "--", ":")
        names = sorted({name.split(",")[0] for name in curves})
        for name, (error, log_joint) in curves.items():
            number = names.index(name.split(",")[0])
            same = [other for other in curves if other.split(",")[0] == names[number]]
            look: Any = {"color": COLOURS[number], "ls": styles[same.index(name) % 3]}
            sweeps = range(1, len(error) + 1)
            left.plot(sweeps, error.numpy(), label=name, **look)
            right.plot(sweeps, log_joint.numpy(), **look)
        left.set(xlabel="sweep", title="mean squared error", yscale="log")
        right.set(xlabel="sweep", title="log joint density per frame, gained")
        for axis in (left, right):
            axis.axvspan(1, trained_sweeps, color="0.93", zorder=0)
        left.set_ylim(top=2 * left.get_ylim()[1])  # room for the legend
        left.legend(ncols=2)
        return figure


def ess_figure(ess: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    """
    Show the effective fraction of the particles, frame by frame.

    :param ess: of the positions in every frame ``(frames,)``, and of what, by name.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(5.2, 2.6), layout="constrained")
        axis = figure.subplots()
        for (name, (where, what)), colour in zip(ess.items(), COLOURS, strict=False):
            axis.plot(
                range(1, len(where) + 1), where.numpy(), "o-", ms=3, color=colour, label=name
            )
            axis.axhline(float(what), color=colour, ls=":", lw=1)
        axis.set(xlabel="frame", ylim=(0, 1.02), title="ESS / L of where; dotted: of what")
        axis.legend()
        return figure


def animation(
    panels: Mapping[str, tuple[Tensor, Tensor | None]], seconds_per_frame: float = 0.2
) -> bytes:
    """
    A GIF of videos side by side.

    :param panels: title, frames and positions, as for :func:`frames_figure`.
    :param float seconds_per_frame: how slow.
    """
    with matplotlib.style.context([STYLE, {"figure.dpi": 72}]):
        figure = Figure(figsize=(1.9 * len(panels), 2.1), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes: Sequence[Axes] = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, title in zip(axes, panels, strict=True):
            axis.set_title(title)

        shots = []
        for t in range(len(next(iter(panels.values()))[0])):
            for axis, (frames, where) in zip(axes, panels.values(), strict=True):
                for old in [*axis.images, *axis.lines]:
                    old.remove()
                _frame(axis, frames[t], None if where is None else where[t])
            canvas.draw()
            shots.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("P"))
    file = io.BytesIO()
    milliseconds = round(1000 * seconds_per_frame)
    shots[0].save(
        file, "GIF", save_all=True, append_images=shots[1:], duration=milliseconds, loop=0
    )
    return file.getvalue()
