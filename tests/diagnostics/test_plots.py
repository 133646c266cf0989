"""Pictures show what they should, and can be drawn."""

import io

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pyro_ext.diagnostics import (
    PredictiveCheck,
    calibration_of_ranks,
    central_coverage,
    plot_coverage,
    plot_predictive_check,
    plot_ranks,
)


def draw(figure: Figure) -> None:
    figure.savefig(io.BytesIO(), format="png")


def outside(figure: Figure, panel: int = 0) -> list[bool]:
    """Whether each line of a panel leaves its band."""
    ax = figure.axes[panel]
    vertices = ax.collections[0].get_paths()[0].vertices
    lower, upper = {}, {}
    for x, y in np.asarray(vertices).round(9):
        lower[x] = min(y, lower.get(x, y))
        upper[x] = max(y, upper.get(x, y))
    result = []
    for line in ax.lines[1:]:
        points = [
            (x, y) for x, y in np.asarray(line.get_xydata()).round(9) if x in lower and 0 < x < 1
        ]
        assert len(points) > 50
        result.append(any(not lower[x] - 1e-6 <= y <= upper[x] + 1e-6 for x, y in points))
    return result


def test_ranks_that_are_not_uniform_leave_the_band() -> None:
    uniform, heaped = torch.randint(100, (300, 2)), 99 * torch.randint(2, (300, 1))
    ranks = {"right": uniform, "mixed": torch.cat([uniform[:, :1], heaped], 1)}
    figure = plot_ranks(calibration_of_ranks(ranks, 99))
    assert [ax.get_title("left") for ax in figure.axes] == ["right", "mixed"]
    assert outside(figure, 0) == [False, False]
    assert outside(figure, 1) == [False, True]
    draw(figure)


def test_some_sites() -> None:
    ranks = calibration_of_ranks({name: torch.randint(10, (50,)) for name in "abcdef"}, 9)
    assert len(plot_ranks(ranks).axes) == 6
    assert [ax.get_title("left") for ax in plot_ranks(ranks, sites=["c"]).axes] == ["c"]
    with pytest.raises(ValueError, match=r"sites: .*'g'"):
        plot_ranks(ranks, sites=["g"])


def test_coverage() -> None:
    right = central_coverage(calibration_of_ranks({"z": torch.randint(100, (300, 2))}, 99))
    heaped = 99 * torch.randint(2, (300,))
    narrow = central_coverage(calibration_of_ranks({"z": heaped}, 99))
    figure = plot_coverage({"right": right, "narrow": narrow})
    assert outside(figure, 0) == [False, False]
    assert outside(figure, 1) == [True]
    draw(figure)
    assert len(plot_coverage(narrow).axes) == 1
    with pytest.raises(ValueError, match="at least one"):
        plot_coverage({})


def test_predictive_checks() -> None:
    new = torch.randn(200)
    check = PredictiveCheck(
        {"fixed": new, "realized": new, "two": torch.stack([new, new], 1)},
        {"fixed": torch.ones(200), "realized": torch.randn(200), "two": torch.ones(200, 2)},
        {"fixed": torch.tensor(0.16), "realized": torch.tensor(0.5), "two": torch.rand(2)},
    )
    figure = plot_predictive_check(check)
    titles = [ax.get_title("left").split(":")[0] for ax in figure.axes]
    assert titles == ["fixed", "realized", "two[0]", "two[1]"]
    assert "0.16" in figure.axes[0].get_title("left")
    assert len(figure.axes[0].patches) > 5
    assert not figure.axes[1].patches
    draw(figure)


def test_without_matplotlib_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for module in ("matplotlib", "matplotlib.style"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"plot_ranks needs matplotlib: pip install matplotlib"):
        plot_ranks(calibration_of_ranks({"z": torch.randint(10, (50,))}, 9))
