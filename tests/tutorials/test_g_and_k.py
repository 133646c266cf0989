"""The tutorial on the g-and-k distribution: the simulator, the inverted density, the figure."""

import io
import math
from types import ModuleType
from typing import Any

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_ext import MCMC, ConstrainedHMC
from tests.statistics import Quadrature, assert_moments
from tests.tutorials.conftest import load_siblings


def load(name: str) -> ModuleType:
    return load_siblings("g_and_k", name)[0]


@pytest.fixture(scope="module")
def gk() -> ModuleType:
    return load("g_and_k")


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    pytest.importorskip("matplotlib")
    return load("figures")


def parameters(*values: float) -> tuple[Tensor, ...]:
    return torch.tensor(values).unbind()


THETAS = st.tuples(
    st.floats(-5, 5), st.floats(0.01, 10), st.floats(0, 10), st.floats(0, 3)
)  # A, B, g, k


@settings(max_examples=60, deadline=None)
@given(theta=THETAS, z=st.floats(-8, 8))
def test_scores_are_found_again(theta: tuple[float, ...], z: float) -> None:
    gk = load("g_and_k")
    values, score = parameters(*theta), torch.tensor([z])
    found = gk.invert(gk.quantile(score, values), values)
    # what rounding of x leaves of z: eps |x| / Q'(z)
    x = gk.quantile(score, values).abs()
    floor = 8 * torch.finfo(torch.float64).eps * (1 + x / gk.slope(score, values))
    assert (found - score).abs() <= floor * (1 + score.abs())


@settings(max_examples=60, deadline=None)
@given(theta=THETAS, z=st.floats(-5, 5))
def test_slope_is_the_derivative_and_positive(theta: tuple[float, ...], z: float) -> None:
    gk = load("g_and_k")
    score = torch.tensor(z, requires_grad=True)
    values = parameters(*theta)
    (derivative,) = torch.autograd.grad(gk.quantile(score, values), score)
    torch.testing.assert_close(gk.slope(score.detach(), values), derivative)
    assert derivative > 0


def test_special_case_without_skewness_and_tails_is_normal(gk: ModuleType) -> None:
    x = torch.linspace(-4, 8, 50)
    found = gk.GAndK(*parameters(2.0, 1.5, 0.0, 0.0)).log_prob(x)
    torch.testing.assert_close(found, pyro.distributions.Normal(2.0, 1.5).log_prob(x))


def test_density_is_that_of_the_draws(gk: ModuleType) -> None:
    """By another route: the chance of an interval, from the scores of its ends."""
    density = gk.GAndK(*parameters(*gk.THETA_TRUE))
    edges = torch.tensor([0.5, 1.5, 3.0, 6.0, 20.0])
    chance = torch.special.ndtr(gk.invert(edges, parameters(*gk.THETA_TRUE))).diff()
    for i, expected in enumerate(chance):
        axis = torch.linspace(float(edges[i]), float(edges[i + 1]), 20_001)
        integral = torch.trapezoid(density.log_prob(axis).exp(), axis)
        torch.testing.assert_close(integral, expected, rtol=1e-6, atol=0)
    draws = density.sample((40_000,))
    shares = torch.histogram(draws, edges).hist / len(draws)
    assert ((shares - chance).abs() < 5 * (chance / len(draws)).sqrt()).all()


def test_gradients_of_the_density_are_right(gk: ModuleType) -> None:
    x = gk.observed_data(5)
    theta = [value.clone().requires_grad_() for value in parameters(*gk.THETA_TRUE)]
    assert torch.autograd.gradcheck(lambda *t: gk.GAndK(*t).log_prob(x), theta)
    assert torch.autograd.gradcheck(
        lambda y: gk.GAndK(*parameters(*gk.THETA_TRUE)).log_prob(y), x.requires_grad_()
    )


def test_distribution_broadcasts_and_expands(gk: ModuleType) -> None:
    many = gk.GAndK(torch.zeros(3, 1), torch.ones(2), torch.tensor(1.0), torch.tensor(0.2))
    assert many.sample((4,)).shape == (4, 3, 2)
    wide = many.expand([5, 3, 2])
    x = torch.randn(5, 3, 2)
    torch.testing.assert_close(wide.log_prob(x), many.log_prob(x))
    with pytest.raises(ValueError, match="scale"):
        gk.GAndK(*parameters(0.0, -1.0, 0.0, 0.0), validate_args=True)


def test_both_models_have_the_same_posterior(gk: ModuleType) -> None:
    """Of one unknown, the location, from three observations; the truth is a sum on a grid."""
    x = gk.observed_data(3)
    rest = parameters(*gk.THETA_TRUE)[1:]

    def located() -> None:
        location = pyro.sample("A", pyro.distributions.Normal(2.0, 2.0))
        z = pyro.sample("z", pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.deterministic("x", gk.quantile(z, (location, *rest)))

    def log_density(a: Tensor) -> Tensor:
        prior = -0.5 * ((a - 2) / 2).square()
        return prior + gk.GAndK(a[..., None], *rest).log_prob(x).sum(-1)

    truth = Quadrature(log_density, (-12.0, 16.0, 4000))
    mcmc = MCMC(
        ConstrainedHMC(pyro.condition(located, {"x": x})),
        num_samples=100,
        warmup_steps=60,
        num_chains=8,
        disable_progbar=True,
    )
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)["A"]
    assert_moments(draws, truth.mean(), truth.sd(), min_ess=200, name="A")


def test_models_agree_on_what_they_simulate(gk: ModuleType) -> None:
    pyro.set_rng_seed(0)
    nodes = pyro.poutine.trace(gk.simulator_model).get_trace(7).nodes
    theta = nodes["theta"]["value"]
    assert ((theta > 0) & (theta < gk.PRIOR_HIGH)).all()
    x = nodes["x"]["value"]
    torch.testing.assert_close(x, gk.quantile(nodes["z"]["value"], theta.unbind()))
    scored = pyro.condition(gk.density_model, {"theta": theta})
    trace = pyro.poutine.trace(scored).get_trace(x)
    z = nodes["z"]["value"]
    expected = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
    expected = (expected - gk.slope(z, theta.unbind()).log()).sum() - 4 * math.log(10)
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_figure_has_a_panel_for_every_parameter_of_every_method(figures: ModuleType) -> None:
    draws: dict[str, Any] = {"a": torch.randn(100, 3), "b": torch.randn(50, 3)}
    names = ["p", "q", "r"]
    figure = figures.marginals_figure(draws, torch.randn(500, 3), names, (0.0, 0.1, 0.2))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    assert file.getvalue().startswith(b"\x89PNG")
    assert len(figure.axes) == 6
    with pytest.raises(ValueError, match="at least one method"):
        figures.marginals_figure({}, torch.randn(500, 3), names, (0.0, 0.1, 0.2))
    with pytest.raises(ValueError, match=r"draws of 'a' must have shape \(n, 2\)"):
        figures.marginals_figure(draws, torch.randn(9, 2), names[:2], (0.0, 0.1))
