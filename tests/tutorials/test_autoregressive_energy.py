"""The tutorial on autoregressive energy machines: its figures, its machine and the weights."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.tutorials.conftest import TUTORIALS, load_module

FOLDER = Path(TUTORIALS) / "autoregressive_energy"


@pytest.fixture(scope="module")
def energy_figures() -> ModuleType:
    pytest.importorskip("matplotlib")
    return load_module("autoregressive_energy", "figures")


def test_counts_of_points_are_a_density(energy_figures: ModuleType) -> None:
    points = torch.rand(1000, 2)
    density = energy_figures.counted(points, 1.0, 10)
    assert density.shape == (10, 10)
    assert float(density.sum()) * 0.2**2 == pytest.approx(1.0)
    assert (density[:5] == 0).all()


def test_planes_are_drawn_with_the_first_number_to_the_right(energy_figures: ModuleType) -> None:
    density = torch.arange(6.0).reshape(2, 3)
    figure = energy_figures.plane_figure({"a": density, "b": density + 1}, 2.0)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["a", "b"]
    assert figure.axes[0].images[0].get_array().tolist() == density.T.tolist()
    with pytest.raises(ValueError, match="at least one"):
        energy_figures.plane_figure({}, 2.0)


def test_lines_show_what_they_were_given(energy_figures: ModuleType) -> None:
    x = torch.linspace(0, 1, 5)
    figure = energy_figures.conditional_figure(x, {"truth": x, "proposal": 2 * x, "machine": x})
    assert figure.axes[0].lines[1].get_ydata().tolist() == (2 * x).tolist()
    figure = energy_figures.error_figure([3, 10], {"diamond": torch.rand(2, 50)})
    assert figure.axes[0].lines[0].get_xdata().tolist() == [3, 10]
    run = {"step": [0, 10], "estimate": [1.0, 2.0], "quadrature": [0.5, -3.0]}
    safe = {**run, "quadrature": [0.5, 0.6]}
    figure = energy_figures.trap_figure({"unsafe": run, "safe": safe})
    assert len(figure.axes) == 2
    assert figure.axes[0].lines[1].get_ydata().tolist() == [0.5, -3.0]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


@pytest.mark.usefixtures("float32")
def test_shipped_weights_are_better_than_their_own_proposal() -> None:
    training = load_module("autoregressive_energy", "train")
    machine = training.build()
    machine.load_state_dict(torch.load(FOLDER / "diamond.pt", weights_only=True))
    machine.eval()
    test = training.diamond().sample((200,))
    with torch.no_grad():
        exact = machine().log_prob(test, exact=True).mean()
        proposal = machine().proposal_log_prob(test).mean()
        estimate = machine().log_prob(test, num_importance_samples=1000).mean()
    assert exact > proposal + 0.2
    assert float(estimate) == pytest.approx(float(exact), abs=0.02)
