"""Autoregressive energy machines: densities, draws, known energies, copies, contexts."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Normal, Uniform

from pyro_ext.distributions import AutoregressiveEnergyMachine
from pyro_ext.nn import EnergyNetwork
from tests.distributions.energy.problems import (
    SMALL,
    FixedEnergy,
    log_mixture,
    log_normal,
    machine,
    mixture_cdf,
    random_machine,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "mixture": {},
    "broad reference": {"reference": "broad"},
    "box": {"proposal": Uniform(-2.0, 3.0)},
    "box of two sides": {"proposal": Uniform(torch.tensor([-2.0, 0.0]), torch.tensor([3.0, 1.0]))},
    "fixed normal": {"proposal": Normal(0.5, 2.0)},
}
settings = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


def _known(log_density: Any, features: int = 1) -> Any:
    aem = machine(features, reference="broad").eval()
    aem.energy = FixedEnergy(log_density, constant=-2.0)
    return aem


# --- densities ----------------------------------------------------------------------------------


def _axis(setting: dict[str, Any], feature: int) -> tuple[Tensor, Tensor]:
    """Points over the support of a feature, and weights to integrate with."""
    if isinstance(box := setting.get("proposal"), Uniform):
        ends = [side.expand(2)[feature] for side in (box.low, box.high)]
        x = torch.linspace(*ends, 301)
        weights = torch.full((301,), float(x[1] - x[0]))
        weights[[0, -1]] *= 0.5
        return x, weights
    # equal steps on a scale on which the tails are short
    t = torch.linspace(-5.0, 5.0, 301)
    return t.sinh(), t.cosh() / 30


@settings
def test_densities_of_two_numbers_integrate_to_one(setting: dict[str, Any]) -> None:
    aem = random_machine(2, amount=0.15, **setting)
    (x, x_weights), (y, y_weights) = _axis(setting, 0), _axis(setting, 1)
    with torch.no_grad():
        density = aem().log_prob(torch.cartesian_prod(x, y), exact=True).exp()
    mass = x_weights @ density.reshape(301, 301) @ y_weights
    assert float(mass) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("context", [-1.0, 2.0])
def test_densities_of_one_number_integrate_to_one(context: float) -> None:
    aem = random_machine(1, 1, amount=0.15)
    x, weights = _axis({}, 0)
    with torch.no_grad():
        density = aem(torch.tensor([context])).log_prob(x[:, None], exact=True).exp()
    assert float(weights @ density) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("log_density", [log_normal, log_mixture], ids=["normal", "mixture"])
def test_with_a_known_energy_the_density_is_known(log_density: Any) -> None:
    aem = _known(log_density, features=3)
    x = torch.randn(50, 3)
    truth = log_density(x).sum(-1)
    with torch.no_grad():
        with aem.evaluation(exact=True, tolerance=1e-7):
            torch.testing.assert_close(aem().log_prob(x), truth, atol=1e-6, rtol=0)
        estimated = aem().log_prob(x, num_importance_samples=20_000)
        torch.testing.assert_close(estimated, truth, atol=0.05, rtol=0)


def test_scale_of_the_data_is_taken_into_account() -> None:
    aem = _known(log_normal, features=2)
    loc, scale = torch.tensor([100.0, -3.0]), torch.tensor([1e-4, 1e3])
    aem.initialize(loc + scale * torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    x = loc + scale * torch.randn(20, 2)
    with torch.no_grad():
        found = aem().log_prob(x, exact=True)
    torch.testing.assert_close(found, Normal(loc, scale).log_prob(x).sum(-1), atol=1e-5, rtol=0)


@settings
def test_estimates_approach_quadrature(setting: dict[str, Any]) -> None:
    aem = random_machine(2, amount=0.25, **setting)
    with torch.no_grad():
        x = aem().sample((100,))
        exact = aem().log_prob(x, exact=True)
        errors = []
        for number in (5, 20, 1000):
            found = aem().log_prob(x, num_importance_samples=number)
            errors.append(float((found - exact).abs().mean()))
    assert errors[2] < 0.02
    assert errors[2] < 0.2 * errors[0]
    assert errors[1] < errors[0]


@settings
def test_exact_gradients_are_those_of_finite_differences(setting: dict[str, Any]) -> None:
    aem = random_machine(2, amount=0.25, **setting)
    # on a fixed grid, integrals of the jumps that rectifiers put into gradients are less exact
    smooth = EnergyNetwork(8, 16, residual_blocks=1, frequencies=1, activation=torch.tanh)
    smooth.load_state_dict(aem.energy.state_dict())
    aem.energy = smooth
    x = torch.tensor([0.4, 0.3], requires_grad=True)
    with aem.evaluation(exact=True, tolerance=1e-8):
        log_p = aem().log_prob(x)
    parameters = [aem.energy.output.weight, aem.network.output.bias, x]
    gradients = torch.autograd.grad(log_p, parameters)
    step = 1e-4
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        with torch.no_grad(), aem.evaluation(exact=True, tolerance=1e-8):
            for sign in (1, -1):
                parameter.add_(sign * step * direction)
                values.append(float(aem().log_prob(x)))
                parameter.sub_(sign * step * direction)
        slope = (values[0] - values[1]) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("context_features", [0, 2], ids=["alone", "context"])
def test_each_conditional_sees_only_what_comes_before(context_features: int) -> None:
    features = 4
    aem = random_machine(features, context_features)
    x = torch.randn(1, features, requires_grad=True)
    context = torch.randn(1, context_features) if context_features else None
    parameters = aem.network(x, context)[0]
    for feature in range(features):
        gradient = torch.autograd.grad(parameters[feature].sum(), x, retain_graph=True)[0][0]
        assert (gradient[feature:] == 0).all()
        assert (gradient[:feature] != 0).all()


# --- draws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "resampling"])
def test_draws_have_the_known_distribution(method: str) -> None:
    aem = _known(log_mixture, features=1)
    how = {"exact": True} if method == "exact" else {"num_proposals": 1000}
    draws = aem().sample((3000,), **how)[:, 0]
    uniform = mixture_cdf(draws)
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    counts = torch.histc(uniform, 20, 0.0, 1.0)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_of_one_proposal_each_draws_are_those_of_the_proposal() -> None:
    aem = _known(log_mixture, features=1)
    draws = aem().sample((3000,), num_proposals=1)
    grid = torch.linspace(-60.0, 60.0, 100_001)
    with torch.no_grad():
        density = aem().proposal_log_prob(grid[:, None]).exp()
    cdf = torch.cumulative_trapezoid(density, grid)
    uniform = cdf[torch.searchsorted(grid, draws[:, 0]).clamp(1, len(cdf)) - 1]
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3


@settings
def test_draws_follow_the_density_by_quadrature(setting: dict[str, Any]) -> None:
    """Counts of draws in cells of the plane against the mass that quadrature finds there."""
    aem = random_machine(2, amount=0.25, **setting)
    with torch.no_grad():
        draws = aem().sample((3000,), exact=True)
        low, high = draws.quantile(0.02, 0), draws.quantile(0.98, 0)
        cells, fine = 5, 8
        centres = [
            torch.linspace(0, 1, 2 * cells * fine + 1)[1::2] * (high[i] - low[i]) + low[i]
            for i in range(2)
        ]
        density = aem().log_prob(torch.cartesian_prod(*centres), exact=True).exp()
    area = (high - low).prod() / (cells * fine) ** 2
    mass = density.reshape(cells, fine, cells, fine).sum((1, 3)) * area
    index = ((draws - low) / (high - low) * cells).floor().long()
    inside = ((index >= 0) & (index < cells)).all(-1)
    counts = torch.bincount((index[:, 0] * cells + index[:, 1])[inside], minlength=cells**2)
    observed = torch.cat([counts.double(), (~inside).sum().double()[None]])
    expected = torch.cat([mass.flatten(), 1.0 - mass.sum()[None]]).clamp_min(0.0) * len(draws)
    enough = expected > 8
    statistic = ((observed - expected).square() / expected)[enough].sum()
    # midpoints in cells err by a part of the tolerance of the test at most
    assert float(statistic) < stats.chi2.ppf(0.9999, int(enough.sum())) + 5


def test_draws_stay_in_the_box() -> None:
    low, high = torch.tensor([-2.0, 0.0]), torch.tensor([3.0, 1.0])
    aem = random_machine(2, proposal=Uniform(low, high))
    for draws in (aem().sample((500,)), aem().sample((500,), exact=True)):
        assert ((draws >= low) & (draws <= high)).all()


@pytest.mark.parametrize("batch", [(), (3,), (2, 1)], ids=str)
@pytest.mark.parametrize("sample_shape", [(), (4,), (0,)], ids=str)
def test_shapes(batch: tuple[int, ...], sample_shape: tuple[int, ...]) -> None:
    aem = random_machine(2, 3)
    distribution = aem(torch.randn(*batch, 3))
    assert distribution.batch_shape == batch
    x = distribution.sample(sample_shape, num_proposals=5)
    assert x.shape == (*sample_shape, *batch, 2)
    for how in ({"num_importance_samples": 5}, {"exact": True}):
        assert distribution.log_prob(x, **how).shape == (*sample_shape, *batch)
    assert distribution.proposal_log_prob(x).shape == (*sample_shape, *batch)
    larger = distribution.expand((5, *batch))
    assert larger.sample(sample_shape, num_proposals=5).shape == (*sample_shape, 5, *batch, 2)
    assert not distribution.has_rsample


def test_a_context_changes_the_density_of_the_first_feature_too() -> None:
    aem = random_machine(1, 2)
    with torch.no_grad():
        values = aem(torch.randn(5, 2)).log_prob(torch.zeros(1), exact=True)
    assert len(values.unique()) == 5


def test_rows_in_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    aem, x, context = random_machine(2, 1, amount=0.2), torch.randn(6, 2), torch.randn(6, 1)
    with torch.no_grad():
        together = aem(context).log_prob(x, exact=True)
        for name, number in {
            "machine._ROWS_AT_ONCE": 4,
            "conditionals._ROWS_AT_ONCE": 111,
            "normalizers._GRIDS_AT_ONCE": 3,
            "normalizers._NODES_AT_ONCE": 160,
        }.items():
            monkeypatch.setattr(f"pyro_ext.distributions.energy.{name}", number)
        apart = aem(context).log_prob(x, exact=True)
        drawn = aem(context).log_prob(x, num_importance_samples=4000)
    torch.testing.assert_close(apart, together, atol=1e-6, rtol=0)
    torch.testing.assert_close(drawn, together, atol=0.05, rtol=0)


# --- evaluation, copies -------------------------------------------------------------------------


def test_evaluation_is_changed_inside_of_a_block_only() -> None:
    aem, x = random_machine(2), torch.randn(20, 2)
    with torch.no_grad(), aem.evaluation(exact=True):
        first, second = aem().log_prob(x), aem().log_prob(x)
        assert (first == second).all()
        with aem.evaluation(exact=False, num_importance_samples=3):
            rough = aem().log_prob(x)
        assert (aem().log_prob(x) == first).all()
    with torch.no_grad():
        default = aem().log_prob(x)
    assert (default != first).any()
    assert (rough - first).abs().mean() > 3 * (default - first).abs().mean()


def test_settings_are_put_back_after_an_error() -> None:
    aem = machine()
    with pytest.raises(RuntimeError), aem.evaluation(exact=True):
        raise RuntimeError
    assert not aem._evaluation.exact


@settings
def test_weights_are_saved_and_loaded(setting: dict[str, Any]) -> None:
    aem = random_machine(2, **setting)
    aem.initialize(5 + 3 * torch.randn(50, 2))
    file = io.BytesIO()
    torch.save(aem.state_dict(), file)
    file.seek(0)
    other = AutoregressiveEnergyMachine(2, **{**SMALL, **setting}).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.rand(10, 2)
    with torch.no_grad():
        expected = aem().log_prob(x, exact=True)
        assert (other().log_prob(x, exact=True) == expected).all()
        assert (copy.deepcopy(aem)().log_prob(x, exact=True) == expected).all()


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("features", [1, 2])
def test_single_precision_agrees_with_double(features: int) -> None:
    aem = random_machine(features, amount=0.25)
    x = 3 * torch.randn(50, features)
    with torch.no_grad():
        single = aem().log_prob(x, exact=True)
        double = aem.double()().log_prob(x.double(), exact=True)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, atol=1e-3, rtol=0)


def test_importance_sampling_in_one_dimension_each_does_not_deteriorate() -> None:
    """
    Nash and Durkan 2019, figure 2: one estimate for all dimensions gets useless, ours do not.

    The standard normal is normalised with a proposal of standard deviation 1.5.
    """
    proposal, target = Normal(0.0, 1.5), Normal(0.0, 1.0)
    joint, by_feature = {}, {}
    for features in (1, 4, 16, 64):
        draws = proposal.sample((100, 20 * features, features))
        log_weights = (target.log_prob(draws) - proposal.log_prob(draws)).sum(-1)
        log_z = log_weights.logsumexp(1) - math.log(20 * features)
        joint[features] = float(log_z.square().mean().sqrt())
        aem = machine(features, proposal=proposal, hidden_features=64).eval()
        aem.energy = _Ratio()
        with torch.no_grad():
            x = torch.zeros(200, features)
            found = aem().log_prob(x, num_importance_samples=20)
        truth = target.log_prob(x).sum(-1)
        by_feature[features] = float((found - truth).square().mean().sqrt())
    assert joint[64] > 10 * joint[1]
    assert by_feature[64] < 1.5 * math.sqrt(64) * by_feature[1]
    assert joint[64] > 10 * by_feature[64]


class _Ratio(torch.nn.Module):
    """With it, a normal proposal of scale 1.5 becomes the standard normal distribution."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return -0.5 * x.square() * (1.5**2 - 1.0)
