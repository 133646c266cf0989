"""Figures of the Lotka-Volterra tutorial.

The functions take plain tensors or arrays and return a :class:`matplotlib.figure.Figure`; nothing
goes through ``pyplot``, so no backend is chosen and no global state is left behind. Colours are
those of Okabe & Ito, which colour-blind readers can tell apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

__all__ = [
    "PARAMETER_AXES",
    "ParameterAxis",
    "marginals_figure",
    "overview_figure",
    "trajectories_figure",
]

Array = NDArray[np.float64]
ArrayLike = torch.Tensor | Array | Sequence[Any]

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
SHADE = 0.08
SPECIES = (("prey", BLUE), ("predators", VERMILION))
METHODS = (GREEN, ORANGE, PURPLE, SKY, VERMILION)


class ParameterAxis(NamedTuple):
    """What one horizontal axis shows: a name, a unit, and the size of the unit."""

    name: str
    unit: str
    size: float = 1.0


PARAMETER_AXES = (
    ParameterAxis(r"prey birth $\theta_1$", "1 / step"),
    ParameterAxis(r"predation $\theta_2$", r"$10^{-3}$ / predator / step", 1e-3),
    ParameterAxis(r"predator death $\theta_3$", r"$10^{-2}$ / step", 1e-2),
    ParameterAxis(r"predator growth $\theta_4$", r"$10^{-3}$ / prey / step", 1e-3),
)
STYLE: Any = ["pyro_ext.figures", {"figure.dpi": 150, "savefig.dpi": 200}]


def _array(values: ArrayLike) -> Array:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


# ---------------------------------------------------------------------------------- trajectories


def trajectories_figure(
    observed: ArrayLike, simulated: Mapping[str, ArrayLike], *, max_lines: int = 15
) -> Figure:
    """
    Draw simulations of several methods over the data, and below each what separates the two.

    :param observed: populations (prey, predators) after every step, shape ``(num_steps, 2)``.
    :param simulated: for each method, under the name its panel is to have, simulations that go
        with its draws, shape ``(num_draws, num_steps, 2)``.
    :param int max_lines: number of simulations to draw of each method, evenly spread over those
        given. The largest residual written in the panel is that of all of them.
    :returns: a figure with one column per method.
    :raises ValueError: if there is nothing to draw, or the shapes do not match.
    """
    data, panels = _check_simulations(observed, simulated)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(1.2 + 2.6 * len(panels), 4.4), layout="constrained")
        _fill_trajectories(figure, data, panels, max_lines)
    return figure


def _check_simulations(
    observed: ArrayLike, simulated: Mapping[str, ArrayLike]
) -> tuple[Array, dict[str, Array]]:
    data = _array(observed)
    panels = {name: _array(values) for name, values in simulated.items()}
    if data.ndim != 2 or data.shape[1] != 2:
        raise ValueError(f"observed must have shape (num_steps, 2), got {data.shape}")
    if not panels:
        raise ValueError("simulated must hold at least one method")
    for name, values in panels.items():
        if values.shape[1:] != data.shape or len(values) == 0:
            raise ValueError(
                f"simulations of {name!r} must have shape (num_draws, {len(data)}, 2) with at "
                f"least one draw, got {values.shape}"
            )
    return data, panels


def _fill_trajectories(
    figure: Figure | SubFigure, data: Array, panels: Mapping[str, Array], max_lines: int
) -> None:
    axes = figure.subplots(
        2, len(panels), sharex=True, sharey="row", squeeze=False, height_ratios=(1.7, 1)
    )
    for (top, bottom), (name, values) in zip(axes.T, panels.items(), strict=True):
        chosen = np.linspace(0, len(values) - 1, min(max_lines, len(values))).astype(int)
        top.set_title(name)
        _draw_populations(top, data, values[chosen])
        _draw_residuals(bottom, values[chosen] - data, np.abs(values - data).max())
    axes[0, 0].set_ylabel("population [animals]")
    axes[1, 0].set_ylabel("simulation - data\n[animals]")
    _trajectories_legend(figure)


def _draw_populations(axes: Axes, data: Array, simulations: Array) -> None:
    steps = np.arange(1, len(data) + 1)
    for k, (_, colour) in enumerate(SPECIES):
        axes.plot(steps, simulations[..., k].T, color=colour, linewidth=0.7, alpha=0.6)
        axes.plot(
            steps,
            data[:, k],
            linestyle="none",
            marker="os"[k],
            markersize=2.1,
            markerfacecolor="white",
            markeredgecolor=BLACK,
            markeredgewidth=0.6,
            zorder=3,
        )


def _draw_residuals(axes: Axes, residuals: Array, largest: float) -> None:
    steps = np.arange(1, residuals.shape[1] + 1)
    axes.axhline(0, color=BLACK, linewidth=0.5)
    for k, (_, colour) in enumerate(SPECIES):
        axes.plot(steps, residuals[..., k].T, color=colour, linewidth=0.7, alpha=0.6)
    axes.text(
        0.03,
        0.97,
        f"largest: {_scientific(largest)}",
        transform=axes.transAxes,
        verticalalignment="top",
    )
    axes.margins(y=0.35)
    axes.set_xlabel("time [steps]")


def _scientific(number: float) -> str:
    if number == 0 or 1e-2 <= number < 1e4:
        return f"{number:.2g}" if number < 100 else f"{number:.0f}"
    mantissa, exponent = f"{number:.0e}".split("e")
    return rf"${mantissa}\times 10^{{{int(exponent)}}}$"


def _trajectories_legend(figure: Figure | SubFigure) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=colour,
            linewidth=1.2,
            marker="os"[k],
            markersize=4,
            markerfacecolor="white",
            markeredgecolor=BLACK,
            markeredgewidth=0.6,
            label=f"{species}: simulated (line), observed (marker)",
        )
        for k, (species, colour) in enumerate(SPECIES)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)


# ------------------------------------------------------------------------------------- marginals


def marginals_figure(
    exact: Sequence[tuple[ArrayLike, ArrayLike]],
    rows: Mapping[str, ArrayLike],
    *,
    reference: ArrayLike | None = None,
    reference_name: str = "NUTS on the likelihood",
    true_values: Sequence[float] | None = None,
    parameters: Sequence[ParameterAxis] = PARAMETER_AXES,
) -> Figure:
    """
    Draw the marginals of every method over the exact posterior density.

    Each row is a method and each column a parameter. A row spans what its own draws need, but at
    least the bulk of the exact posterior, which is shaded in rows that are much wider.

    :param exact: for each parameter a grid and the posterior density on it, each of shape
        ``(num_points,)``.
    :param rows: for each method, under the name its row is to have, draws of shape
        ``(num_draws, num_parameters)``.
    :param reference: draws of a method that uses the likelihood, shape
        ``(num_draws, num_parameters)``; their histogram is outlined in the first row.
    :param str reference_name: name of that method.
    :param true_values: parameters the data were simulated from.
    :param parameters: name and unit of each parameter.
    :returns: a figure with one row per method and one column per parameter.
    :raises ValueError: if there is nothing to draw, or the shapes do not match.
    """
    draws = {name: _array(values) for name, values in rows.items()}
    outline = None if reference is None else _array(reference)
    curves = _curves(exact, parameters)
    _check_draws(draws, outline, len(curves))
    with matplotlib.style.context(STYLE):
        figure = Figure(
            figsize=(0.6 + 2.2 * len(curves), 0.9 + 1.45 * len(draws)), layout="constrained"
        )
        axes = figure.subplots(len(draws), len(curves), squeeze=False)
        for i, (name, values) in enumerate(draws.items()):
            axes[i, 0].set_title(name)
            for k, (curve, parameter) in enumerate(zip(curves, parameters, strict=True)):
                size = parameter.size
                _draw_marginal(axes[i, k], curve, values[:, k] / size, METHODS[i % len(METHODS)])
                if i == 0 and outline is not None:
                    _draw_outline(axes[i, k], outline[:, k] / size, BLUE)
                if true_values is not None:
                    _mark(axes[i, k], true_values[k] / size)
        for column, parameter in zip(axes.T, parameters, strict=True):
            column[-1].set_xlabel(f"{parameter.name}\n[{parameter.unit}]")
        for row in axes:
            row[0].set_ylabel("density")
        _marginals_legend(figure, None if outline is None else reference_name, true_values)
    return figure


def _curves(
    exact: Sequence[tuple[ArrayLike, ArrayLike]], parameters: Sequence[ParameterAxis]
) -> list[tuple[Array, Array]]:
    """Bring the exact densities to the units of the axes, without their empty tails."""
    if len(parameters) != len(exact):
        raise ValueError(f"got {len(exact)} exact densities for {len(parameters)} parameters")
    curves = []
    for (grid, density), parameter in zip(exact, parameters, strict=True):
        theta, height = _array(grid) / parameter.size, _array(density) * parameter.size
        inside = height > 1e-3 * height.max()
        curves.append((theta[inside], height[inside]))
    return curves


def _check_draws(draws: Mapping[str, Array], outline: Array | None, num_parameters: int) -> None:
    if not draws:
        raise ValueError("rows must hold the draws of at least one method")
    given = dict(draws) if outline is None else {**draws, "reference": outline}
    for name, values in given.items():
        if values.ndim != 2 or values.shape[1] != num_parameters or len(values) == 0:
            raise ValueError(
                f"draws of {name!r} must have shape (num_draws, {num_parameters}) with at least "
                f"one draw, got {values.shape}"
            )


def _draw_marginal(axes: Axes, curve: tuple[Array, Array], draws: Array, colour: str) -> None:
    grid, density = curve
    low, high = float(grid[0]), float(grid[-1])
    first, last = np.quantile(draws, [0.002, 0.998])
    span = min(low, first), max(high, last)
    bins = np.linspace(*span, 41).tolist()
    # Normalised by all draws, not only by those inside the panel.
    weights = np.full(len(draws), 1 / (len(draws) * (bins[1] - bins[0])))
    axes.hist(draws, bins=bins, weights=weights, color=colour, alpha=0.55, edgecolor="none")
    axes.plot(grid, density, color=BLACK, linewidth=1.1)
    if span[1] - span[0] > 2 * (high - low):
        axes.axvspan(low, high, color=BLACK, alpha=SHADE, linewidth=0)
    axes.set_xlim(*span)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", nbins=4)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _draw_outline(axes: Axes, draws: Array, colour: str, num_bins: int = 20) -> None:
    bins = np.linspace(*axes.get_xlim(), num_bins + 1)
    heights = np.histogram(draws, bins)[0] / (len(draws) * (bins[1] - bins[0]))
    axes.stairs(heights, bins, baseline=None, color=colour, linewidth=1.1)
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.05 * heights.max()))


def _mark(axes: Axes, value: float) -> None:
    axes.axvline(value, color=BLACK, linewidth=0.9, linestyle=(0, (4, 2)))


def _marginals_legend(
    figure: Figure, reference_name: str | None, true_values: Sequence[float] | None
) -> None:
    handles = [_exact_handle()]
    if reference_name is not None:
        handles.append(Line2D([], [], color=BLUE, linewidth=1.1, label=reference_name))
    if true_values is not None:
        handles.append(_truth_handle())
    handles.append(
        Patch(color=BLACK, alpha=SHADE, linewidth=0, label="bulk of the exact posterior")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _exact_handle() -> Artist:
    return Line2D([], [], color=BLACK, linewidth=1.1, label="exact posterior (quadrature)")


def _truth_handle() -> Artist:
    return Line2D([], [], color=BLACK, linewidth=0.9, linestyle=(0, (4, 2)), label="true value")


# -------------------------------------------------------------------------------------- overview


def overview_figure(
    observed: ArrayLike,
    simulated: Mapping[str, ArrayLike],
    exact: Sequence[tuple[ArrayLike, ArrayLike]],
    draws: Mapping[str, ArrayLike],
    *,
    true_values: Sequence[float] | None = None,
    parameters: Sequence[ParameterAxis] = PARAMETER_AXES,
    max_lines: int = 15,
) -> Figure:
    """
    Draw both in one picture: trajectories above, and below them the marginals over each other.

    :param observed: as in :func:`trajectories_figure`.
    :param simulated: as in :func:`trajectories_figure`.
    :param exact: as in :func:`marginals_figure`.
    :param draws: the ``rows`` of :func:`marginals_figure`. The first is filled, the others are
        outlines; the panels show what the exact posterior needs and somewhat more, so that the
        tails of much wider ones lie outside.
    :param true_values: parameters the data were simulated from.
    :param parameters: name and unit of each parameter.
    :param int max_lines: number of simulations to draw of each method.
    :returns: the figure.
    :raises ValueError: if there is nothing to draw, or the shapes do not match.
    """
    data, panels = _check_simulations(observed, simulated)
    curves = _curves(exact, parameters)
    values = {name: _array(theta) for name, theta in draws.items()}
    _check_draws(values, None, len(curves))
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(9.0, 6.3), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.85, 1), hspace=0.04)
        _fill_trajectories(top, data, panels, max_lines)
        row = bottom.subplots(1, len(curves), squeeze=False)[0]
        for k, (curve, parameter) in enumerate(zip(curves, parameters, strict=True)):
            columns = {name: theta[:, k] / parameter.size for name, theta in values.items()}
            _draw_overlay(row[k], curve, columns)
            if true_values is not None:
                _mark(row[k], true_values[k] / parameter.size)
            row[k].set_xlabel(f"{parameter.name}\n[{parameter.unit}]")
        row[0].set_ylabel("posterior density")
        _overview_legend(bottom, list(values), true_values)
    return figure


def _draw_overlay(axes: Axes, curve: tuple[Array, Array], draws: Mapping[str, Array]) -> None:
    grid, density = curve
    margin = 0.4 * (grid[-1] - grid[0])
    axes.set_xlim(grid[0] - margin, grid[-1] + margin)
    for i, values in enumerate(draws.values()):
        if i > 0:
            _draw_outline(axes, values, METHODS[i % len(METHODS)], num_bins=36)
            continue
        bins = np.linspace(*axes.get_xlim(), 61)
        weights = np.full(len(values), 1 / (len(values) * (bins[1] - bins[0])))
        axes.hist(values, bins=bins.tolist(), weights=weights, color=METHODS[0], alpha=0.55)
    axes.plot(grid, density, color=BLACK, linewidth=1.1)
    axes.locator_params(axis="x", nbins=4)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _overview_legend(
    figure: SubFigure, names: Sequence[str], true_values: Sequence[float] | None
) -> None:
    handles: list[Artist] = [Patch(color=METHODS[0], alpha=0.55, linewidth=0, label=names[0])]
    handles += [
        Line2D([], [], color=METHODS[i % len(METHODS)], linewidth=1.1, label=name)
        for i, name in enumerate(names)
        if i > 0
    ]
    handles.append(_exact_handle())
    if true_values is not None:
        handles.append(_truth_handle())
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
