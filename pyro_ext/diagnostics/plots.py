"""Pictures of calibration. They need matplotlib, and nothing goes through ``pyplot``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops.uniform_band import uniform_band
from ..optional import import_optional
from .coverage import ExpectedCoverage
from .predictive import PredictiveCheck
from .ranks import RankCalibration
from .simulation import check_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_coverage", "plot_predictive_check", "plot_ranks"]

_BLACK, _GREY = "#000000", "#BBBBBB"
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MAX_POINTS = 100
_MAX_LABELS = 6
_COLUMNS = 4


def plot_ranks(
    calibration: RankCalibration, *, sites: Sequence[str] | None = None, level: float = 0.95
) -> Figure:
    """
    Show how the distribution of ranks differs from the uniform one, a panel for each site.

    The lines are empirical distribution functions of the ranks minus the diagonal, one for each
    element of the site; the band holds a whole line of a right posterior with the probability
    ``level``. Above zero on the left and below on the right, the posterior is too narrow; below
    and above, too wide; all above, draws are too high, all below, too low.

    :param RankCalibration calibration: what :func:`simulation_based_calibration` returned.
    :param sites: which sites, and quantities, to show; all by default.
    :param float level: probability that one line stays in the band.
    :returns: a ``matplotlib`` figure.
    :raises ImportError: without matplotlib.
    :raises ValueError: for an unknown site.

    Reference: Säilynoja, Bürkner and Vehtari 2022, section 2 and figure 3.
    """
    names = list(calibration.ranks) if sites is None else list(sites)
    check_names(names, calibration.ranks, "sites")
    number = len(next(iter(calibration.ranks.values())))
    num_ranks = calibration.num_draws + 1
    # thresholds k: ranks below k have the probability k / num_ranks
    thresholds = torch.linspace(1, num_ranks - 1, min(num_ranks - 1, _MAX_POINTS)).round()
    points = thresholds.unique().double() / num_ranks
    band = uniform_band(number, points, level=level)
    with _panels("plot_ranks", len(names)) as (figure, axes):
        for ax, name in zip(axes, names, strict=True):
            _fill(ax, points, band.lower - points, band.upper - points)
            ax.axhline(0.0, color=_BLACK, lw=0.6)
            for i, ranks in enumerate(_columns(calibration.ranks[name])):
                below = (ranks[:, None] < (points * num_ranks).round()).double().mean(0)
                ax.plot(_array(points), _array(below - points), **_line(i))
            _legend(ax, name, calibration.ranks[name].shape[1:])
            ax.set(title=name, xlabel="rank / number of ranks", xlim=(0, 1))
        axes[0].set_ylabel("distribution function − uniform")
    return figure


def plot_coverage(
    coverage: ExpectedCoverage | Mapping[str, ExpectedCoverage], *, level: float = 0.95
) -> Figure:
    """
    Show coverage against level, a panel for each posterior.

    The diagonal is right, below it the posterior is over-confident. The band holds a whole curve
    of a right posterior with the probability ``level``.

    :param coverage: what :func:`expected_coverage` or :func:`central_coverage` returned, or
        several of them by title.
    :param float level: probability that one curve stays in the band.
    :returns: a ``matplotlib`` figure.
    :raises ImportError: without matplotlib.
    :raises ValueError: if there is nothing to show.
    """
    panels = {"": coverage} if isinstance(coverage, ExpectedCoverage) else dict(coverage)
    if not panels:
        raise ValueError("coverage must hold at least one result.")
    with _panels("plot_coverage", len(panels), height=2.9) as (figure, axes):
        for ax, (title, each) in zip(axes, panels.items(), strict=True):
            levels = each.levels
            band = uniform_band(each.num_simulations, levels[1:-1], level=level)
            _fill(ax, band.points, band.lower, band.upper)
            ax.plot([0, 1], [0, 1], color=_BLACK, lw=0.6)
            curves = [
                (name if len(curves.shape) == 1 else f"{name}[{i}]", curve)
                for name, curves in each.coverage.items()
                for i, curve in enumerate(_columns(curves))
            ]
            for i, (name, curve) in enumerate(curves):
                ax.plot(_array(levels), _array(curve), **_line(i), label=name)
            if 1 < len(curves) <= _MAX_LABELS:
                ax.legend(loc="upper left")
            ax.set(
                title=title, xlabel="level of the region", xlim=(0, 1), ylim=(0, 1), aspect="equal"
            )
        axes[0].set_ylabel("regions that hold the truth")
    return figure


def plot_predictive_check(check: PredictiveCheck) -> Figure:
    """
    Show each test quantity of replicated data beside that of the data.

    A histogram with a line where the quantity depends on the data alone, else the two against each
    other, above the diagonal where the replicated one is larger. Of a quantity with several
    elements each has its panel.

    :param PredictiveCheck check: what :func:`posterior_predictive_check` returned.
    :returns: a ``matplotlib`` figure.
    :raises ImportError: without matplotlib.
    """
    panels = [
        (name if check.tail_probability[name].dim() == 0 else f"{name}[{i}]", *columns)
        for name, new in check.replicated.items()
        for i, columns in enumerate(
            zip(
                _columns(new),
                _columns(check.realized[name]),
                check.tail_probability[name].reshape(-1).tolist(),
                strict=True,
            )
        )
    ]
    with _panels("plot_predictive_check", len(panels)) as (figure, axes):
        for ax, (name, new, old, tail) in zip(axes, panels, strict=True):
            ax.set_title(f"{name}: tail probability {tail:.2f}")
            if bool((old == old[0]).all()):
                ax.hist(_array(new), bins="auto", color=_COLOURS[0], alpha=0.7)
                ax.axvline(float(old[0]), color=_BLACK, lw=1.5)
                ax.set(xlabel="replicated; line: data", yticks=[])
            else:
                ax.plot(_array(old), _array(new), ".", ms=2.5, color=_COLOURS[0])
                ax.axline((float(old[0]), float(old[0])), slope=1.0, color=_BLACK, lw=0.6)
                ax.set(xlabel="data", ylabel="replicated")
    return figure


@contextmanager
def _panels(
    purpose: str, number: int, *, height: float = 2.3
) -> Iterator[tuple[Figure, list[Any]]]:
    """A figure with so many axes, at most four in a row, to draw on in the style of all."""
    style = import_optional("matplotlib.style", "matplotlib", purpose)
    module = import_optional("matplotlib.figure", "matplotlib", purpose)
    columns = min(number, _COLUMNS)
    rows = math.ceil(number / columns)
    with style.context("pyro_ext.figures"):
        size = (0.4 + 2.9 * columns, height * rows)
        figure = module.Figure(figsize=size, dpi=110, layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax in axes[number:]:
            ax.remove()
        yield figure, axes[:number]


def _columns(values: Tensor) -> list[Tensor]:
    """The elements along all dimensions but the first."""
    return list(values.reshape(len(values), -1).T)


def _fill(ax: Any, points: Tensor, lower: Tensor, upper: Tensor) -> None:
    ax.fill_between(*(_array(each) for each in (points, lower, upper)), color=_GREY, alpha=0.5)


def _line(index: int) -> dict[str, Any]:
    return {"color": _COLOURS[index % len(_COLOURS)], "lw": 1.3, "drawstyle": "steps-mid"}


def _legend(ax: Any, name: str, shape: torch.Size) -> None:
    """Name the lines, where that helps."""
    if 1 < math.prod(shape) <= _MAX_LABELS:
        ax.legend(ax.lines[1:], [f"{name}[{i}]" for i in range(math.prod(shape))])


def _array(values: Tensor) -> Any:
    return values.detach().cpu().numpy()
