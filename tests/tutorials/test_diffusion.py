"""The tutorial on diffusion: its figures, its walks, its flow and the weights."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

from pyro_ext.distributions import ScoreFlow
from tests.tutorials.conftest import TUTORIALS, load_module

FOLDER = Path(TUTORIALS) / "diffusion"


@pytest.fixture(scope="module")
def diffusion_figures() -> ModuleType:
    pytest.importorskip("matplotlib")
    return load_module("diffusion", "figures")


def test_fields_have_a_panel_each(diffusion_figures: ModuleType) -> None:
    points, grid, arrows = torch.randn(20, 2), torch.randn(9, 2), torch.randn(9, 2)
    figure = diffusion_figures.fields_figure(
        {"a": (points, grid, arrows), "b": (points, grid, 5 * arrows)}, 2.0
    )
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["a", "b"]
    first, second = (ax.collections[0].U for ax in figure.axes)
    # arrows show directions and relative lengths, whatever their scale
    assert first == pytest.approx(second)
    with pytest.raises(ValueError, match="at least one"):
        diffusion_figures.fields_figure({}, 2.0)


def test_points_paths_and_lines_show_what_they_were_given(diffusion_figures: ModuleType) -> None:
    points = torch.randn(7, 2)
    figure = diffusion_figures.points_figure({"a": points}, 2.0)
    assert figure.axes[0].lines[0].get_xdata().tolist() == pytest.approx(points[:, 0].tolist())
    paths = torch.randn(5, 3, 2)
    figure = diffusion_figures.paths_figure({"a": paths}, 2.0)
    assert len(figure.axes[0].lines) == 5
    assert figure.axes[0].lines[1].get_ydata().tolist() == pytest.approx(paths[:, 1, 1].tolist())
    figure = diffusion_figures.lines_figure({"a": ([1, 2], [3.0, 4.0])}, "x", "y", 3.5)
    assert figure.axes[0].lines[0].get_ydata().tolist() == [3.0, 4.0]
    with pytest.raises(ValueError, match="at least one"):
        diffusion_figures.lines_figure({}, "x", "y")


@pytest.mark.parametrize("is_random", [False, True])
def test_walks_end_at_the_data(is_random: bool) -> None:
    """Standard normal data, which the untrained flow stands for, stay what they are."""
    walks = load_module("diffusion", "walks")
    flow = ScoreFlow(2, hidden_features=8)
    path = walks.walks(flow, torch.randn(2000, 2), 200, is_random=is_random)
    assert path.shape == (201, 2000, 2)
    assert float((path[-1].std(0) - 1).abs().max()) < 0.1
    moved = float((path[-1] - path[0]).abs().mean())
    assert moved > 0.5 if is_random else moved < 0.05


@pytest.mark.usefixtures("float32")
def test_shipped_weights_are_close_to_the_truth() -> None:
    training = load_module("diffusion", "train")
    flow = training.build()
    flow.load_state_dict(torch.load(FOLDER / "weights" / "spirals.pt", weights_only=True))
    flow.eval()
    test = training.spirals().sample((300,))
    with torch.no_grad():
        log_prob = flow().log_prob(test, rtol=1e-3, atol=1e-3)
    gap = training.spirals().log_prob(test) - log_prob
    assert float(gap.std()) / len(gap) ** 0.5 < 0.05, "too few test points"
    assert float(gap.mean()) < 0.3
