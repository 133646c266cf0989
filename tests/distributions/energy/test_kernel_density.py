"""The normalised approximation by kernels: integral, fit, draws, bad input."""

import math

import pytest
import torch
from scipy import stats

from pyro_ext.distributions import KernelDensityAEM
from tests.distributions.energy.problems import (
    FixedEnergy,
    log_mixture,
    machine,
    mixture_cdf,
    random_machine,
)


def _known(num_nodes: int = 800) -> KernelDensityAEM:
    """Of the mixture with a narrow mode, at the scale of the data 3."""
    aem = machine(2, reference="broad").eval()
    aem.energy = FixedEnergy(log_mixture)
    aem.initialize(torch.tensor([[-3.0, 2.0], [3.0, 4.0]]))
    return KernelDensityAEM(aem, num_nodes=num_nodes)


def _draws(number: int) -> torch.Tensor:
    narrow = torch.rand(number, 2) < 0.3
    normal = torch.randn(number, 2)
    z = torch.where(narrow, 1.5 + 0.02 * normal, -1.0 + 0.5 * normal)
    return z * torch.tensor([3.0, 1.0]) + torch.tensor([0.0, 3.0])


@pytest.mark.parametrize("context_features", [0, 2], ids=["alone", "context"])
def test_densities_integrate_to_one(context_features: int) -> None:
    aem = random_machine(1, context_features)
    density = KernelDensityAEM(aem, num_nodes=30)
    context = torch.randn(context_features) if context_features else None
    t = torch.linspace(-5.0, 5.0, 20_001)
    log_p = density(context).log_prob(t.sinh()[:, None])
    assert float((log_p.exp() * t.cosh()).sum() * (t[1] - t[0])) == pytest.approx(1.0, abs=1e-4)


def test_densities_are_fixed_functions() -> None:
    density, x = KernelDensityAEM(random_machine(2), num_nodes=20), torch.randn(5, 2)
    assert (density().log_prob(x) == density().log_prob(x)).all()


def test_a_fit_comes_close_to_the_truth_and_beats_the_proposal() -> None:
    density = _known()
    validation, test = _draws(300), _draws(300)
    result = density.fit(validation)
    z = density.machine.standardize.to_noise(test)[0]
    truth = float(log_mixture(z).sum(-1).mean()) - math.log(3.0)
    found = float(density().log_prob(test).mean())
    proposal = float(density().proposal_log_prob(test).mean().detach())
    assert proposal + 0.5 < found < truth + 0.05
    assert found > truth - 0.15
    of_validation = float(density().log_prob(validation).mean())
    assert result.log_likelihood == pytest.approx(of_validation, rel=1e-9)
    torch.testing.assert_close(result.bandwidth, density.bandwidth * torch.tensor([3.0, 1.0]))


def test_a_fit_chooses_the_best_of_each_feature() -> None:
    density, validation = _known(200), _draws(200)
    density.fit(validation)
    best = density().log_prob(validation).mean()
    for name in ("bandwidth", "proposal_weight"):
        for feature in range(2):
            for factor in (0.8, 1.25):
                buffer = getattr(density, name)
                before = buffer.clone()
                buffer[feature] *= factor
                assert density().log_prob(validation).mean() < best + 1e-3
                buffer.copy_(before)


def test_draws_have_the_distribution_of_the_machine() -> None:
    density = _known()
    density.bandwidth.fill_(0.003)
    density.proposal_weight.fill_(1e-4)
    z = density.machine.standardize.to_noise(density().sample((500,)))[0]
    for feature in range(2):
        assert stats.kstest(mixture_cdf(z[:, feature]).numpy(), "uniform").pvalue > 1e-3


def test_draws_of_the_proposal_are_mixed_in() -> None:
    density = KernelDensityAEM(random_machine(1), num_nodes=50)
    density.proposal_weight.fill_(1.0 - 1e-9)
    x = density().sample((2000,))
    known = density.machine._conditionals(torch.zeros(1, 1), None)
    with torch.no_grad():
        grid = torch.linspace(-60, 60, 200_001)
        cdf = torch.cumulative_trapezoid(known.proposal.log_prob(grid[None])[0].exp(), grid)
    uniform = cdf[torch.searchsorted(grid, x[:, 0]).clamp(1, len(cdf)) - 1]
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3


def test_bad_input() -> None:
    aem = random_machine(2)
    with pytest.raises(ValueError, match="num_nodes=1"):
        KernelDensityAEM(aem, num_nodes=1)
    density = KernelDensityAEM(aem)
    with pytest.raises(ValueError, match="context_features=0"):
        density(torch.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(4, 3\)"):
        density.fit(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="not finite"):
        density.fit(torch.full((4, 2), math.nan))
