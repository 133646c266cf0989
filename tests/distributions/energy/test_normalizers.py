"""Normalisers: estimates against quadrature, how errors fall, which sign their bias has."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pyro_ext.distributions.energy.conditionals import Conditionals
from pyro_ext.distributions.energy.normalizers import (
    data_estimate,
    estimate,
    quadrature,
    systematic_resampling,
)
from tests.distributions.energy.problems import (
    FixedEnergy,
    conditionals,
    log_mixture,
    log_normal,
    random_machine,
)

LOG_DENSITIES = {"normal": log_normal, "mixture": log_mixture}
LOG_Z = -3.0  # of `conditionals`
densities = pytest.mark.parametrize("log_density", LOG_DENSITIES.values(), ids=LOG_DENSITIES)


def _five_errors(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), 5 * float(values.std()) / math.sqrt(len(values))


@densities
def test_quadrature_of_known_densities(log_density: Callable[[Tensor], Tensor]) -> None:
    result = quadrature(conditionals(5, log_density))
    assert result.is_converged.all()
    torch.testing.assert_close(result.value, torch.full((5,), LOG_Z), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("log_density", "num_samples"), [(log_normal, 4), (log_mixture, 80)], ids=LOG_DENSITIES
)
def test_the_estimate_of_z_has_no_bias_and_log_z_is_too_small(
    log_density: Callable[[Tensor], Tensor], num_samples: int
) -> None:
    with torch.no_grad():
        found = estimate(conditionals(20_000, log_density), num_samples).log_normalizer - LOG_Z
    mean, error = _five_errors(found.exp())
    assert abs(mean - 1.0) < error
    bias, error = _five_errors(found)
    assert bias < -error
    assert bias == pytest.approx(-0.5 * float(found.exp().var()), rel=0.4)


@densities
def test_with_the_datum_log_z_is_too_large_on_data_of_the_model(
    log_density: Callable[[Tensor], Tensor],
) -> None:
    known = conditionals(20_000, log_density)
    data = torch.randn(20_000)
    if log_density is log_mixture:
        narrow = torch.rand(20_000) < 0.3
        data = torch.where(narrow, 1.5 + 0.02 * data, -1.0 + 0.5 * data)
    with torch.no_grad():
        u, found = data_estimate(known, data, 4)
    bias, error = _five_errors(found.log_normalizer - LOG_Z)
    assert bias > error
    expected = log_density(data) - known.log_reference(data[:, None])[:, 0] + LOG_Z
    torch.testing.assert_close(u, expected)


@densities
def test_relative_variance_falls_at_least_as_one_over_the_number_of_draws(
    log_density: Callable[[Tensor], Tensor],
) -> None:
    numbers = [20, 80, 320]
    with torch.no_grad():
        known = conditionals(3000, log_density)
        variances = [
            float((estimate(known, number).log_normalizer - LOG_Z).exp().var())
            for number in numbers
        ]
    for before, after in pairwise(variances):
        assert after < before / 4 * 1.25


@pytest.mark.parametrize("num_samples", [3, 20, 400_000])
def test_estimates_without_and_with_gradients_agree(num_samples: int) -> None:
    known = conditionals(2, log_normal)
    if num_samples < 1000:
        with torch.enable_grad():
            found = estimate(known, num_samples)
        assert found.log_normalizer.shape == (2,)
    with torch.no_grad():
        streamed = estimate(known, num_samples)
    assert (streamed.effective_sample_size <= num_samples * (1 + 1e-9)).all()
    assert (streamed.effective_sample_size >= 1 - 1e-9).all()
    tolerance = 10.0 / math.sqrt(num_samples)
    torch.testing.assert_close(
        streamed.log_normalizer, torch.full((2,), LOG_Z), atol=tolerance, rtol=0
    )


def test_perfect_weights_have_full_effective_size_and_no_error() -> None:
    known = conditionals(4, log_normal)
    energy = FixedEnergy(lambda x: known.proposal.select(torch.arange(len(x))).log_prob(x))
    with torch.no_grad():
        found = estimate(Conditionals(energy, known.context, known.proposal, True), 20)
    torch.testing.assert_close(found.effective_sample_size, torch.full((4,), 20.0))
    torch.testing.assert_close(found.log_normalizer, torch.zeros(4), atol=1e-12, rtol=0)


def test_the_training_estimate_cannot_run_away() -> None:
    """An energy that is high at the data alone gains no more than log S."""
    known = conditionals(200, log_normal)
    data = 3 * torch.randn(200)

    def spikes(x: Tensor) -> Tensor:
        is_datum = ((x.unsqueeze(-1) - data).abs() < 1e-9).any(-1)
        return torch.where(is_datum, 1e3, -1e3) + log_normal(x)

    spiked = Conditionals(FixedEnergy(spikes), known.context, known.proposal, True)
    with torch.no_grad():
        u, found = data_estimate(spiked, data, 20)
        log_p = spiked.log_reference(data[:, None])[:, 0] + u - found.log_normalizer
        unsafe = estimate(spiked, 20).log_normalizer
        log_q = known.proposal.log_prob(data[:, None])[:, 0]
    torch.testing.assert_close(log_p, log_q + math.log(20))
    assert (u - unsafe > 1000).all()  # the estimate without the datum is fooled


def test_weights_that_all_vanish_are_a_value_not_an_error() -> None:
    known = conditionals(3, lambda x: torch.full_like(x, -math.inf))
    with torch.no_grad():
        found = estimate(known, 20)
    assert (found.log_normalizer == -math.inf).all()
    assert (quadrature(known).value == -math.inf).all()


@pytest.mark.parametrize("reference", ["proposal", "broad"])
def test_weights_of_any_energy_are_bounded(reference: str) -> None:
    aem = random_machine(2, reference=reference, amount=1.0)
    with torch.no_grad():
        known = aem._conditionals(3 * torch.randn(20, 2), None)
        nodes = known.proposal.place(torch.rand(40, 500))
        log_weights = known.log_weights(nodes)
    largest = 0.0 if reference == "proposal" else -math.log(aem.defensive_weight)
    assert log_weights.max() <= largest + 1e-9
    result = quadrature(known, tolerance=1e-4)
    assert (result.value <= 1e-4).all()
    assert (result.value >= -aem.energy.bound - 1e-4).all()


def test_systematic_resampling_draws_in_proportion_to_weights() -> None:
    weights = torch.tensor([0.05, 0.5, 0.0, 0.3, 0.15])
    chosen = systematic_resampling(weights.log().expand(5000, 5), 4)
    counts = (chosen.unsqueeze(-1) == torch.arange(5)).double().sum(1)
    assert (counts >= (4 * weights).floor()).all()
    assert (counts <= (4 * weights).ceil()).all()
    frequencies = counts.mean(0) / 4
    error = 5 * counts.std(0) / 4 / math.sqrt(5000)
    assert ((frequencies - weights).abs() <= error + 1e-12).all()


def test_the_gradient_of_few_draws_has_the_mean_of_that_of_all() -> None:
    aem = random_machine(1)
    known = aem._conditionals(torch.zeros(200, 1), None).detach_proposal()
    data = 0.3 * torch.randn(200) + 1.0
    parameter = aem.energy.blocks[0].first.weight

    def gradient(seed: int, num_gradient_samples: int | None) -> Tensor:
        """Of the mean over data; the same nodes for the same seed."""
        torch.manual_seed(seed)
        u, found = data_estimate(known, data, 20, num_gradient_samples)
        loss = (u - found.log_normalizer).mean()
        return torch.autograd.grad(loss, parameter, retain_graph=True)[0].flatten()

    full = torch.stack([gradient(seed, None) for seed in range(60)])
    few = torch.stack([gradient(seed, 4) for seed in range(60)])
    difference = few - full
    # in ten directions, as single weights of units that are rarely on are far from normal
    directions = torch.cat([full.mean(0, keepdim=True), torch.randn(10, full.shape[1])])
    along = difference @ directions.mT
    error = along.std(0) / math.sqrt(60)
    assert (along.mean(0).abs() <= 5 * error).all()
    assert difference.mean(0).norm() < 0.1 * full.mean(0).norm()
