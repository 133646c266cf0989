"""The tutorial on simulators: the epidemic, ABC, the figures."""

import math
from types import ModuleType

import pyro
import pytest
import torch

from tests.tutorials.conftest import load_siblings


@pytest.fixture(scope="module")
def tutorial() -> ModuleType:
    return load_siblings("simulators", "epidemic")[0]


def test_epidemic_is_the_same_alone_and_among_others(tutorial: ModuleType) -> None:
    trace = pyro.poutine.trace(tutorial.epidemic).get_trace()
    values = {n: trace.nodes[n]["value"] for n in ("beta", "gamma", "weather", "error")}
    many = {name: torch.stack([value, value * 0.5]) for name, value in values.items()}
    with pyro.plate("runs", 2):
        together = pyro.condition(tutorial.epidemic, many)()
    assert together.shape == (2, tutorial.NUM_DAYS // tutorial.EVERY)
    torch.testing.assert_close(together[0], trace.nodes["x"]["value"])


def test_without_noise_people_are_conserved(tutorial: ModuleType) -> None:
    given = {
        "beta": torch.tensor(0.4),
        "gamma": torch.tensor(0.0),
        "weather": torch.full((tutorial.NUM_DAYS,), 0.5 * tutorial.WEATHER),
        "error": torch.zeros(tutorial.NUM_DAYS // tutorial.EVERY),
    }
    x = pyro.condition(tutorial.epidemic, given)()
    # without recovery the log odds rise by log(1 + beta) a day as long as few are infectious,
    # and by beta when nearly all are
    odds = torch.logit(x.exp())
    odds = torch.cat([torch.logit(torch.tensor([tutorial.FIRST])), odds])
    rise = odds.diff() / tutorial.EVERY
    assert float(rise[0]) == pytest.approx(math.log(1.4), abs=0.003)
    assert (rise.diff() > 0).all()
    assert 0.37 < rise[-1] < 0.4


def test_data_are_the_same_every_time(tutorial: ModuleType) -> None:
    torch.manual_seed(1)
    first = tutorial.observed_data()
    torch.manual_seed(2)
    assert torch.equal(first, tutorial.observed_data())
    assert not torch.equal(first, tutorial.observed_data(seed=4))


def test_abc_keeps_the_nearest(tutorial: ModuleType) -> None:
    theta = torch.randn(1000)
    simulated = torch.stack([theta, 100.0 * torch.randn(1000)], -1)
    kept = tutorial.abc({"theta": theta}, simulated, torch.tensor([1.0, 0.0]), keep=50)["theta"]
    assert kept.shape == (50,)
    assert (kept - 1.0).abs().max() < 0.6
    with pytest.raises(ValueError, match="keep=0 of 1000"):
        tutorial.abc({"theta": theta}, simulated, torch.zeros(2), keep=0)


def test_figures(tutorial: ModuleType) -> None:
    pytest.importorskip("matplotlib")
    figures = load_siblings("simulators", "figures")[0]
    draws = {
        name: {"beta": 0.6 + 0.1 * torch.randn(300), "gamma": 0.2 + 0.1 * torch.randn(300)}
        for name in ("exact", "NPE", "ABC")
    }
    figure = figures.pairs_figure(draws, "exact", tutorial.TRUTH)
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["NPE", "ABC"]
    with pytest.raises(ValueError, match="reference='NUTS'"):
        figures.pairs_figure(draws, "NUTS", tutorial.TRUTH)
    figure = figures.epidemics_figure(tutorial.observed_data(), torch.randn(5, 12), 2)
    assert len(figure.axes[0].lines) == 6
