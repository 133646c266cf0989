"""A conjugate model: with its exact conditionals the sampler is a Gibbs sampler."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext.diagnostics import simulation_based_calibration
from pyro_ext.infer import APG
from tests.statistics import Quadrature, assert_same_mean

DATA = torch.tensor([0.2, 1.7, 0.9, 2.4, -0.3], dtype=torch.float64)
PRIOR_PRECISION, ALPHA, BETA = 0.25, 2.0, 1.5
NUM_SETS, NUM_PARTICLES = 10, 400


def _mean(precision: Tensor, x: Tensor) -> dist.Normal:
    total = PRIOR_PRECISION + x.shape[-1] * precision
    return dist.Normal(precision * x.sum(-1, keepdim=True) / total, total.rsqrt())


def _precision(mean: Tensor, x: Tensor) -> dist.Gamma:
    squares = (x - mean).square().sum(-1, keepdim=True)
    return dist.Gamma(ALPHA + 0.5 * x.shape[-1], BETA + 0.5 * squares)


def _model(x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-2):
        mean = pyro.sample("mean", dist.Normal(0.0, PRIOR_PRECISION**-0.5))
        precision = pyro.sample("precision", dist.Gamma(ALPHA, BETA))
        with pyro.plate("points", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(mean, precision.rsqrt()), obs=x)


def _encoder(x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-2):
        pyro.sample("mean", dist.Normal(0.0, 3.0))
        pyro.sample("precision", dist.Gamma(1.0, 1.0))


def _update_mean(latents: Mapping[str, Tensor], x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-2):
        pyro.sample("mean", _mean(latents["precision"], x))


def _update_precision(latents: Mapping[str, Tensor], x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-2):
        pyro.sample("precision", _precision(latents["mean"], x))


def _long_run(num_chains: int, num_sweeps: int) -> dict[str, Tensor]:
    """Gibbs sampling without the engine."""
    x, mean = DATA.expand(1, -1), torch.zeros(num_chains, 1)
    draws: dict[str, list[Tensor]] = {"mean": [], "precision": []}
    for sweep in range(num_sweeps):
        precision = _precision(mean, x).sample()
        mean = _mean(precision, x).sample()
        if sweep >= 20:
            draws["mean"].append(mean.squeeze(-1))
            draws["precision"].append(precision.squeeze(-1))
    return {name: torch.stack(values, -1) for name, values in draws.items()}


@pytest.mark.parametrize("resampler", ["systematic", "multinomial"])
def test_moments_are_those_of_gibbs_sampling(resampler: str) -> None:
    kernels = [_update_mean, _update_precision]
    apg = APG(_model, _encoder, kernels, batch_plate="data_sets", resampler=resampler)
    result = apg.sample(DATA.expand(NUM_SETS, -1), num_particles=NUM_PARTICLES, num_sweeps=20)
    for name in ("mean", "precision"):
        torch.testing.assert_close(result.history.ess[name], torch.ones(19, NUM_SETS))
    expected = _long_run(100, 120)
    for name, value in result.samples.items():
        # weights are even, and exact updates have made copies of a particle forget each other
        draws = value.squeeze(-1).T
        for power in (1, 2):
            assert_same_mean(
                draws**power, expected[name] ** power, name=f"moment {power} of {name}"
            )


def test_evidence_is_that_of_the_model() -> None:
    """Against a sum on a grid, from an encoder that is far off."""

    def log_joint(mean: Tensor, precision: Tensor) -> Tensor:
        prior = dist.Normal(0.0, PRIOR_PRECISION**-0.5).log_prob(mean)
        prior = prior + dist.Gamma(ALPHA, BETA).log_prob(precision)
        likelihood = dist.Normal(mean.unsqueeze(-1), precision.unsqueeze(-1).rsqrt())
        return prior + likelihood.log_prob(DATA).sum(-1)

    grid = Quadrature(log_joint, (-8.0, 8.0, 400), (1e-6, 12.0, 400))
    cell = (16.0 / 400) * (12.0 / 400)
    truth = log_joint(*grid.points).exp().sum() * cell
    apg = APG(_model, _encoder, [_update_mean, _update_precision], batch_plate="data_sets")
    result = apg.sample(DATA.expand(200, -1), num_particles=100, num_sweeps=3)
    ratio = (result.log_evidence - truth.log()).exp()
    error = ratio.std() / len(ratio) ** 0.5
    assert error < 0.02, f"the estimates scatter too much: {error:.2g}"
    assert abs(ratio.mean() - 1) < 5 * error, f"{ratio.mean():.4f} +- {error:.4f}"


def test_posteriors_of_many_data_sets_are_calibrated() -> None:
    """Data sets are rows of one run, and the encoder is far off."""
    apg = APG(_model, _encoder, [_update_mean, _update_precision], batch_plate="data_sets")

    def posterior(observation: dict[str, Tensor]) -> dict[str, Tensor]:
        result = apg.sample(observation["x"].squeeze(1), num_particles=63, num_sweeps=15)
        # a data set has a plate of its own in the simulation
        return {name: value.unsqueeze(-2) for name, value in result.samples.items()}

    result = simulation_based_calibration(
        _model,
        posterior,
        observed="x",
        num_simulations=400,
        batch_size=400,
        quantities={"product": lambda z, x: (z["mean"] * z["precision"])[..., 0, 0]},
        args=(torch.zeros(1, 5),),
        disable_progbar=True,
    )
    assert result.p_value > 0.01, result.summary()
