"""Diffusions against their definition, and their natural time."""

import math

import pytest
import torch
from torch import Tensor

from pyro_ext.distributions.diffusion import SDE, VESDE, VPSDE, SubVPSDE
from pyro_ext.distributions.diffusion.sde import make_sde
from tests.distributions.diffusion.problems import SDES


def _derivative(function: object, t: Tensor) -> Tensor:
    t = t.clone().requires_grad_()
    value = function(t)  # type: ignore[operator]
    if not value.requires_grad:
        return torch.zeros_like(t)
    return torch.autograd.grad(value.sum(), t)[0]


@pytest.mark.parametrize("name", SDES)
def test_moments_solve_the_equation(name: str) -> None:
    """d log a / dt = f, and d (sigma^2) / dt = 2 f sigma^2 + g^2."""
    sde = SDES[name]
    t = torch.linspace(sde.start, sde.end, 50)
    torch.testing.assert_close(_derivative(sde.log_mean_factor, t), sde.drift_rate(t))
    growth = 2 * sde.drift_rate(t) * sde.std(t).square() + sde.likelihood_weight(t)
    change = _derivative(lambda t: sde.std(t).square(), t)
    torch.testing.assert_close(change, growth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SDES)
def test_natural_time_is_the_distribution_function_of_the_weights(name: str) -> None:
    sde = SDES[name]
    t = torch.linspace(sde.start, sde.end, 50)
    torch.testing.assert_close(_derivative(sde.fraction, t), sde.importance_density(t))
    weights = sde.likelihood_weight(t) / sde.original_weight(t)
    torch.testing.assert_close(sde.importance_density(t) * sde.natural_length, weights)
    ends = sde.fraction(torch.tensor([sde.start, sde.end]))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SDES)
def test_the_inverse_distribution_function(name: str, dtype: torch.dtype) -> None:
    sde, eps = SDES[name], torch.finfo(dtype).eps
    u = torch.linspace(0, 1, 1001, dtype=dtype)
    t = sde.time(u)
    assert t.dtype == dtype
    assert bool((t.diff() > 0).all())
    assert float((sde.fraction(t) - u).abs().max()) < 4 * eps
    exact = sde.time(u.double())
    # the scale is logarithmic: relative errors of times are those of logarithms, about 20 eps
    assert float((t.double() / exact - 1).abs().max()) < 40 * eps


@pytest.mark.parametrize("name", SDES)
def test_moments_are_exact_in_single_precision(name: str) -> None:
    sde = SDES[name]
    t = sde.time(torch.linspace(0, 1, 1001, dtype=torch.float32))
    for function in (sde.std, sde.mean_factor, sde.diffusion):
        single, double = function(t).double(), function(t.double())
        assert float((single / double - 1).abs().max()) < 2e-6, function


@pytest.mark.parametrize(
    ("sde", "expected"),
    [(VPSDE(), 23.864), (SubVPSDE(), 22.484), (SubVPSDE(start=1e-5), 37.679)],
    ids=["vp", "subvp", "subvp early"],
)
def test_lengths_are_those_of_quadrature(sde: SDE, expected: float) -> None:
    assert sde.natural_length == pytest.approx(expected, abs=6e-4)
    log_t = torch.linspace(math.log(sde.start), math.log(sde.end), 200_001)
    t = log_t.exp()
    weights = sde.likelihood_weight(t) / sde.original_weight(t)
    assert float(torch.trapezoid(weights * t, log_t)) == pytest.approx(expected, abs=1e-3)


def test_weightings_of_the_exploding_diffusion_are_the_same_up_to_a_factor() -> None:
    sde = VESDE(0.01, 50.0)
    t = torch.linspace(0.1, 1.0, 10)
    ratio = sde.likelihood_weight(t) / sde.original_weight(t)
    torch.testing.assert_close(ratio, torch.full_like(t, 2 * math.log(5000.0)))
    uniform = torch.full_like(t, 1 / (sde.end - sde.start))
    torch.testing.assert_close(sde.importance_density(t), uniform)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VPSDE(start=0.0), "start must be a time after 0"),
        (lambda: VPSDE(start=2.0), "before end=1"),
        (lambda: VPSDE(beta_min=0.0), "beta_min"),
        (lambda: SubVPSDE(beta_min=3.0, beta_max=2.0), "beta_max"),
        (lambda: VESDE(1.0, 0.5), "sigma_min"),
        (lambda: make_sde("vpp"), "'vp', 'subvp', 've'"),
        (lambda: VPSDE().check_times(torch.tensor([0.5, 1.5])), r"between .* got 1\.5"),
        (lambda: VPSDE().check_times(torch.tensor([0.0])), r"between .* got 0\.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_diffusion_of_another_type() -> None:
    with pytest.raises(TypeError, match="got a int"):
        make_sde(3)  # type: ignore[arg-type]
