"""Every family's standardised coordinates against its own ``log_prob``, by autograd."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from torch import Tensor

from pyro_ext.infer.constrained_hmc.model.constrained_model import ConstrainedModel
from pyro_ext.infer.constrained_hmc.model.standardize import (
    calibrate,
    is_continuous,
    is_standard_normal,
    pull,
    push,
)

_TRIL = torch.tensor([[1.5, 0.0, 0.0], [0.3, 0.8, 0.0], [-0.4, 0.2, 2.0]], dtype=torch.float64)
_ONE = torch.ones((), dtype=torch.float64)


def _t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# inputs are exactly standard normal
NORMAL: dict[str, Callable[[], Any]] = {
    "cauchy": lambda: dist.Cauchy(_ONE, _t(0.5, 3.0)),
    "normal": lambda: dist.Normal(3 * _ONE, 2 * _ONE),
    "normal-batch": lambda: dist.Normal(_t(0.0, 1.0, -5.0), _t(1.0, 0.1, 30.0)),
    "normal-event": lambda: dist.Normal(_t(0.0, 1.0), _t(1.0, 0.1)).to_event(1),
    "normal-expanded": lambda: dist.Normal(_ONE, 2 * _ONE).expand([2, 3]).to_event(1),
    "multivariate": lambda: dist.MultivariateNormal(_t(1.0, 2.0, 3.0), scale_tril=_TRIL),
    "multivariate-expanded": lambda: dist.MultivariateNormal(
        _t(1.0, 2.0, 3.0), scale_tril=_TRIL
    ).expand([2]),
    "multivariate-batch": lambda: dist.MultivariateNormal(
        torch.zeros(2, 3, dtype=torch.float64), torch.stack([_TRIL @ _TRIL.T, _TRIL.T @ _TRIL])
    ).to_event(1),
    "log-normal": lambda: dist.LogNormal(-2 * _ONE, _t(1.0, 0.3)),
    "log-normal-event": lambda: dist.LogNormal(_t(0.0, 1.0), _ONE).to_event(1),
    "uniform": lambda: dist.Uniform(_t(-1.0, 10.0), _t(2.0, 11.0)),
    "exponential": lambda: dist.Exponential(_t(0.1, 7.0)),
    "weibull": lambda: dist.Weibull(2 * _ONE, 1.5 * _ONE),
    "pareto": lambda: dist.Pareto(2 * _ONE, 3 * _ONE),
    "masked": lambda: dist.Normal(_t(0.0, 1.0), _ONE).mask(_t(1.0, 0.0).bool()),
}  # fmt: skip
# inputs keep another shape
OTHER: dict[str, Callable[[], Any]] = {
    "student-t": lambda: dist.StudentT(4 * _ONE, -1 * _ONE, _t(0.5, 3.0)),
    "laplace": lambda: dist.Laplace(_t(0.0, 3.0), _ONE).to_event(1),
    "gumbel": lambda: dist.Gumbel(_t(0.0, 3.0), _t(1.0, 5.0)),
    "gamma": lambda: dist.Gamma(_t(0.7, 5.0), _t(1.0, 100.0)),
    "gamma-expanded": lambda: dist.Gamma(2 * _ONE, _ONE).expand([3]).to_event(1),
    "inverse-gamma": lambda: dist.InverseGamma(3 * _ONE, 2 * _ONE),
    "beta": lambda: dist.Beta(_t(2.0, 0.8), _t(3.0, 0.9)),
    "dirichlet": lambda: dist.Dirichlet(_t(1.0, 2.0, 3.0)),
    "dirichlet-batch": lambda: dist.Dirichlet(_t(1.0, 2.0, 3.0)).expand([2]).to_event(1),
    "lkj": lambda: dist.LKJCholesky(3, 2 * _ONE),
    "logistic": lambda: dist.Logistic(_ONE, 2 * _ONE),
    "half-normal": lambda: dist.HalfNormal(3 * _ONE),
    "half-cauchy": lambda: dist.HalfCauchy(_t(0.5, 2.0)),
}
ALL = {**NORMAL, **OTHER}


def _random_input(fn: Any, seed: int, scale: float = 1.0) -> tuple[Tensor, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        calibration = calibrate(fn)
        shape = pull(fn, fn.sample(), calibration).shape
        return scale * torch.randn(shape), calibration


def _free_elements(fn: Any, value: Tensor) -> Tensor:
    """Elements of a value that its density is a density of."""
    support = str(fn.support)
    if "Simplex" in support:
        return value[..., :-1].reshape(-1)
    if "CorrCholesky" in support:
        rows, columns = torch.tril_indices(3, 3, -1)
        return value[..., rows, columns].reshape(-1)
    return value.reshape(-1)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_pulling_undoes_pushing(name: str, seed: int) -> None:
    fn = ALL[name]()
    u, calibration = _random_input(fn, seed)
    value, _ = push(fn, u, calibration)
    assert value.shape == fn.shape()
    assert fn.support.check(value).all()
    torch.testing.assert_close(pull(fn, value, calibration), u, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_pushing_undoes_pulling(name: str) -> None:
    fn = ALL[name]()
    calibration = calibrate(fn)
    value = fn.sample()
    again, _ = push(fn, pull(fn, value, calibration), calibration)
    torch.testing.assert_close(again, value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_density_of_the_input_is_the_density_of_the_value(name: str, seed: int) -> None:
    """With the log determinant of the map's Jacobian, by automatic differentiation."""
    fn = ALL[name]()
    u, calibration = _random_input(fn, seed)

    def values(flat: Tensor) -> Tensor:
        return _free_elements(fn, push(fn, flat.reshape(u.shape), calibration)[0])

    value, log_density = push(fn, u, calibration)
    jacobian = torch.func.jacrev(values)(u.reshape(-1))
    bare = ALL[name]() if name != "masked" else dist.Normal(_t(0.0, 1.0), _ONE)
    expected = bare.log_prob(value).sum() + torch.linalg.slogdet(jacobian)[1]
    assert log_density.shape == ()
    torch.testing.assert_close(log_density, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NORMAL)
def test_inputs_of_prior_draws_are_standard_normal(name: str) -> None:
    fn = NORMAL[name]()
    assert is_standard_normal(fn)
    assert calibrate(fn) is None
    wide = dist.Normal(_t(0.0, 1.0), _ONE) if name == "masked" else fn
    inputs = pull(wide, wide.sample((400,))).reshape(400, -1)
    for column in inputs.T:
        assert scipy.stats.kstest(column.numpy(), "norm").pvalue > 1e-3
    covariance = torch.cov(inputs.T).reshape(inputs.shape[1], -1)
    assert (covariance - torch.eye(len(covariance))).abs().max() < 0.3


@pytest.mark.parametrize("name", OTHER)
def test_other_families_do_not_claim_standard_normal_inputs(name: str) -> None:
    assert not is_standard_normal(OTHER[name]())


@pytest.mark.parametrize("name", ["gamma", "inverse-gamma", "beta", "dirichlet", "lkj"])
def test_calibration_centres_and_scales_the_inputs(name: str) -> None:
    fn = OTHER[name]()
    calibration = calibrate(fn, num_draws=4000)
    draws = torch.stack([pull(fn, fn.sample(), calibration) for _ in range(1000)])
    assert draws.mean(0).abs().max() < 0.2
    assert (draws.std(0) - 1).abs().max() < 0.2


@pytest.mark.parametrize(
    "u", [-30.0, -8.0, -1.0, 0.0, 1.0, 5.0, 8.0, 30.0], ids=lambda u: f"u={u:g}"
)
def test_exponential_is_accurate_far_out(u: float) -> None:
    """The survival function at the value is the normal one at the input, in both tails."""
    fn = dist.Exponential(_ONE * 3)
    value, log_density = push(fn, _t(u).squeeze())
    assert float(value) > 0
    log_survival = float(scipy.stats.norm.logsf(u))
    assert float(-3 * value) == pytest.approx(log_survival, rel=1e-9, abs=0.0)
    assert float(log_density) == pytest.approx(scipy.stats.norm.logpdf(u), rel=1e-12)
    assert float(pull(fn, value)) == pytest.approx(u, abs=1e-9)


@pytest.mark.parametrize("u", [-30.0, -8.0, 0.0, 5.0], ids=lambda u: f"u={u:g}")
def test_uniform_is_accurate_near_zero(u: float) -> None:
    fn = dist.Uniform(0 * _ONE, 4 * _ONE)
    value, _ = push(fn, _t(u).squeeze())
    assert float(value) == pytest.approx(4 * scipy.stats.norm.cdf(u), rel=1e-9, abs=0.0)
    assert float(pull(fn, value)) == pytest.approx(u, rel=1e-8)


def test_gumbel_is_smooth_in_its_upper_tail() -> None:
    """Through a uniform variable, values above 30 would be steps of the rounding of 1 - 1e-13."""
    fn = dist.Gumbel(0 * _ONE, _ONE)
    u = torch.linspace(30.0, 30.001, 100)
    value, _ = push(fn.expand([100]), u)
    steps = value.diff()
    torch.testing.assert_close(steps, steps.mean().expand(99), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("draws", ["constant", "heavy"])
def test_calibration_without_a_scale_falls_back_to_one(draws: str) -> None:
    """Point masses and moments that do not exist give no scale to divide by."""

    class Odd(dist.Gamma):
        def sample(self, sample_shape: Any = ()) -> Tensor:
            value = torch.ones(self.shape(sample_shape))
            return value if draws == "constant" else value / 0.0

    loc, scale = calibrate(Odd(_ONE, _ONE)) or (None, None)
    assert float(scale) == 1.0
    assert float(loc) == 0.0


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (dist.Normal(0.0, 1.0).expand([2]).to_event(1), True),
        (dist.Dirichlet(torch.ones(3)), True),
        (dist.Bernoulli(0.5).expand([2]).to_event(1), False),
        (dist.Poisson(1.0), False),
    ],
    ids=["normal", "dirichlet", "bernoulli", "poisson"],
)
def test_is_continuous(fn: Any, expected: bool) -> None:
    assert is_continuous(fn) is expected


def _hierarchical() -> None:
    mu = pyro.sample("mu", dist.Normal(1.0, 3.0))
    tau = pyro.sample("tau", dist.LogNormal(0.5, 0.4))
    theta = pyro.sample("theta", dist.Normal(mu, tau).expand([3]).to_event(1))
    pyro.deterministic("y", theta[:2] * theta[2])


def test_same_density_and_outputs_as_the_reparameterisers_of_pyro() -> None:
    config = {
        "mu": LocScaleReparam(0.0),
        "theta": LocScaleReparam(0.0),
        "tau": TransformReparam(),
    }
    reparameterised = poutine.reparam(_hierarchical, config)
    conditioned = pyro.condition(_hierarchical, {"y": torch.zeros(2)})
    model = ConstrainedModel(conditioned, (), {})
    for _ in range(5):
        u = torch.randn(5)
        # TransformReparam leaves the base Normal(0.5, 0.4) as it is: undo that by hand
        values = {
            "mu_decentered": u[0],
            "tau_base": 0.5 + 0.4 * u[1],
            "theta_decentered": u[2:],
        }
        fixed = poutine.condition(reparameterised, values)
        trace = poutine.trace(fixed).get_trace()
        names = [n for n in trace.nodes if n in values]
        assert len(names) == len(values)
        log_prob = sum(trace.nodes[n]["fn"].log_prob(values[n]).sum() for n in names)
        log_prob = log_prob + math.log(0.4)
        torch.testing.assert_close(-model.potential(u), log_prob)
        torch.testing.assert_close(model.constraint(u), trace.nodes["y"]["value"])
        torch.testing.assert_close(model.values(u)["theta"], trace.nodes["theta"]["value"])
