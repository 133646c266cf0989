"""Expected coverage against closed forms."""

from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from pyro_ext.diagnostics import (
    ExpectedCoverage,
    calibration_of_ranks,
    central_coverage,
    expected_coverage,
    highest_density_coverage,
    simulation_based_calibration,
)
from tests.diagnostics.problems import SCALES, gaussian_model, gaussian_posterior, sampler

NUM_SIMULATIONS = 400


def coverage_of(kind: str, **settings: Any) -> ExpectedCoverage:
    def log_prob(latents: dict[str, Tensor], observation: dict[str, Tensor]) -> Tensor:
        return gaussian_posterior(observation["x"], *SCALES[kind]).log_prob(latents["z"])

    return expected_coverage(
        gaussian_model,
        sampler(*SCALES[kind]),
        log_prob,
        observed="x",
        num_simulations=NUM_SIMULATIONS,
        disable_progbar=True,
        **settings,
    )


def exact(kind: str, levels: Tensor) -> Tensor:
    """
    Coverage of the regions of two dimensions.

    The squared distance of the truth, in standard deviations of the posterior, has a noncentral
    chi-square distribution, divided by the square of the relative scale.
    """
    scale, shift = SCALES[kind]
    radius = scipy.stats.chi2.ppf(levels.numpy(), 2) * scale**2
    return torch.from_numpy(scipy.stats.ncx2.cdf(radius, 2, 2 * shift**2))


@pytest.mark.parametrize("batch_size", [None, 64], ids=["single", "batches"])
@pytest.mark.parametrize("kind", SCALES)
def test_highest_density_regions(kind: str, batch_size: int | None) -> None:
    result = coverage_of(kind, batch_size=batch_size)
    curve = result.coverage["highest density"]
    assert curve[0] == 0
    assert curve[-1] == 1
    # draws estimate levels with an error of their own, which averages out to order 1 / 64
    truth = exact(kind, result.levels[5:-5])
    error = (truth * (1 - truth) / NUM_SIMULATIONS).sqrt()
    assert ((curve[5:-5] - truth).abs() < 5 * error + 1 / 64).all()
    excess = float(result.excess["highest density"])
    assert abs(excess - float((curve - result.levels).mean())) < 0.01
    p_value = float(result.p_value["highest density"])
    if kind == "right":
        assert p_value > 1e-3
    else:
        assert p_value < 1e-6
        assert (excess > 0.1) if kind == "wide" else (excess < -0.05)


@pytest.mark.parametrize("kind", ["right", "narrow", "wide"])
def test_central_intervals(kind: str) -> None:
    scale, _ = SCALES[kind]
    ranks = simulation_based_calibration(
        gaussian_model,
        sampler(scale),
        observed="x",
        num_simulations=NUM_SIMULATIONS,
        batch_size=NUM_SIMULATIONS,
        disable_progbar=True,
    )
    result = central_coverage(ranks)
    curves = result.coverage["z"]
    assert curves.shape == (101, 2)
    radius = scipy.stats.chi2.ppf(result.levels[5:-5].numpy(), 1) * scale**2
    truth = torch.from_numpy(scipy.stats.chi2.cdf(radius, 1))[:, None]
    error = (truth * (1 - truth) / NUM_SIMULATIONS).sqrt()
    assert ((curves[5:-5] - truth).abs() < 5 * error + 2 / 64).all()
    assert (result.p_value["z"] > 1e-3).all() == (kind == "right")


def test_p_values_are_uniform_under_the_null() -> None:
    ranks = calibration_of_ranks({"z": torch.randint(64, (200, 200))}, 63)
    p_values = central_coverage(ranks).p_value["z"]
    assert scipy.stats.kstest(p_values.numpy(), "uniform").pvalue > 1e-3
    p_values = highest_density_coverage(ranks, "z").p_value["highest density"]
    assert scipy.stats.kstest(p_values.numpy(), "uniform").pvalue > 1e-3


def test_the_density_must_have_been_ranked() -> None:
    ranks = calibration_of_ranks({"z": torch.randint(64, (100,))}, 63)
    with pytest.raises(ValueError, match=r"log_prob: .*no site 'density'; there are \['z'\]"):
        highest_density_coverage(ranks, "density")
