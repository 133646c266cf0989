"""Proposals: densities, positions and their inverses, strata, grids."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Gamma, Normal

from pyro_ext.distributions.energy.proposals import (
    DefensiveMixture,
    FixedProposal,
    Proposal,
    UniformProposal,
    broad_log_prob,
    stratified_positions,
)
from pyro_ext.ops.quadrature import log_integral


def _mixture(number: int) -> DefensiveMixture:
    parameters = torch.cat(
        [torch.randn(number, 3), 2 * torch.randn(number, 3), 2 * torch.randn(number, 3) - 2], -1
    )
    return DefensiveMixture.from_network(parameters, defensive_weight=0.05, min_scale=1e-3)


PROPOSALS: dict[str, Callable[[int], Proposal]] = {
    "mixture": _mixture,
    "uniform": lambda n: UniformProposal(n, torch.zeros(())),
    "normal": lambda n: FixedProposal(n, Normal(2.0, 3.0), torch.tensor(2.5), torch.tensor(1.5)),
}
proposals = pytest.mark.parametrize("make", PROPOSALS.values(), ids=PROPOSALS)


def _cdf(proposal: Proposal, row: int) -> Callable[[Tensor], Tensor]:
    """Distribution function of one of the proposals, in closed form."""
    if isinstance(proposal, UniformProposal):
        return lambda x: 0.5 * (x + 1)
    if isinstance(proposal, FixedProposal):
        return lambda x: torch.special.ndtr((1.5 * x + 0.5) / 3.0)
    assert isinstance(proposal, DefensiveMixture)
    weights = proposal.log_weights[row].exp()
    locs, scales = proposal.locs[row], proposal.scales[row]

    def cdf(x: Tensor) -> Tensor:
        normals = torch.special.ndtr((x[:, None] - locs) / scales)
        broad = torch.sigmoid(x * math.pi / (2 * math.sqrt(3)))
        return weights[0] * broad + (weights[1:] * normals).sum(-1)

    return cdf


@proposals
def test_densities_integrate_to_one_on_their_own_grids(make: Callable[[int], Proposal]) -> None:
    proposal = make(20)
    index = torch.arange(20)
    result = log_integral(
        lambda rows, x: proposal.select(index[rows]).log_prob(x), proposal.grid(), tolerance=1e-8
    )
    assert result.is_converged.all()
    assert result.value.abs().max() < 1e-7


@proposals
def test_points_at_uniform_positions_are_draws(make: Callable[[int], Proposal]) -> None:
    proposal = make(3)
    points = proposal.place(torch.rand(3, 5000))
    for row in range(3):
        uniform = _cdf(proposal, row)(points[row]).clamp(0, 1)
        assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3


@proposals
def test_a_position_is_mapped_to_its_point(make: Callable[[int], Proposal]) -> None:
    proposal = make(50)
    points = proposal.place(torch.rand(50, 20))
    again = proposal.place(proposal.position(points))
    torch.testing.assert_close(again, points, atol=1e-6, rtol=1e-6)


@proposals
def test_positions_of_draws_are_uniform(make: Callable[[int], Proposal]) -> None:
    proposal = make(1)
    positions = proposal.position(proposal.place(torch.rand(1, 5000)))
    assert stats.kstest(positions[0].numpy(), "uniform").pvalue > 1e-3


@proposals
def test_strata_estimate_integrals_without_bias_and_with_less_variance(
    make: Callable[[int], Proposal],
) -> None:
    proposal = make(1).select(torch.zeros(4000, dtype=torch.long))
    exact = make_mean(proposal)
    stratified = proposal.place(stratified_positions((4000, 20), exact)).sin().mean(-1)
    independent = proposal.place(torch.rand(4000, 20)).sin().mean(-1)
    error = float(stratified.std()) / math.sqrt(4000)
    assert abs(float(stratified.mean() - exact)) < 5 * error
    assert stratified.std() < 0.7 * independent.std()


def make_mean(proposal: Proposal) -> Tensor:
    """Expectation of sin(x), from very many positions."""
    positions = (torch.arange(400_000) + 0.5) / 400_000
    return proposal.select(torch.tensor([0])).place(positions[None]).sin().mean()


def test_parts_of_the_strata_make_up_all() -> None:
    parts = [stratified_positions((3, 10), torch.zeros(()), a, b) for a, b in ((0, 4), (4, 10))]
    strata = (torch.cat(parts, -1) * 10).long()
    assert (strata == torch.arange(10)).all()


def test_the_broad_component_keeps_its_weight_whatever_the_network_says() -> None:
    parameters = torch.cat([torch.tensor([[50.0, -50.0]]), torch.zeros(1, 4)], -1)
    mixture = DefensiveMixture.from_network(parameters, defensive_weight=0.05, min_scale=1e-3)
    x = torch.linspace(-50, 50, 101)[None]
    floor = math.log(0.05) + broad_log_prob(x)
    assert (mixture.log_prob(x) >= floor - 1e-12).all()


def test_the_broad_component_has_standard_deviation_two() -> None:
    x = torch.linspace(-60, 60, 20_001)
    density = broad_log_prob(x).exp()
    assert float(torch.trapezoid(density, x)) == pytest.approx(1.0, abs=1e-9)
    assert float(torch.trapezoid(density * x.square(), x)) == pytest.approx(4.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
def test_all_positions_have_finite_points(dtype: torch.dtype) -> None:
    parameters = torch.zeros(2, 9, dtype=dtype)
    parameters[:, 0] = 400.0  # the other two have no weight at all
    mixture = DefensiveMixture.from_network(parameters, defensive_weight=0.01, min_scale=1e-3)
    eps = torch.finfo(dtype).eps
    positions = torch.tensor([0.0, torch.finfo(dtype).tiny, eps, 0.01, 0.5, 1 - eps], dtype=dtype)
    points = mixture.place(positions.expand(2, -1))
    assert points.isfinite().all()
    position = mixture.position(points)
    assert ((position >= 0) & (position <= 1)).all()


def test_uniform_includes_both_ends_and_excludes_the_rest() -> None:
    log_prob = UniformProposal(1, torch.zeros(())).log_prob(torch.tensor([[-1.0, 1.0, 1.01]]))
    torch.testing.assert_close(log_prob.exp(), torch.tensor([[0.5, 0.5, 0.0]]))


def test_a_fixed_proposal_is_minus_infinity_outside_its_support() -> None:
    proposal = FixedProposal(1, Gamma(2.0, 1.0), torch.tensor(1.0), torch.tensor(2.0))
    log_prob = proposal.log_prob(torch.tensor([[-3.0, 1.0]]))[0]
    assert log_prob[0] == -math.inf
    expected = Gamma(2.0, 1.0).log_prob(torch.tensor(3.0)) + math.log(2.0)
    torch.testing.assert_close(log_prob[1], expected)
