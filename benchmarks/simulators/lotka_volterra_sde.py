r"""Lotka-Volterra with normal noise in each of 50 steps: the simulator of the tutorial.

Both populations are seen after every step, 100 numbers. The noise is a latent site, ``x`` a
deterministic one, so that ConstrainedHMC draws from the exact posterior; the reference uses that
each equation is a linear regression with log-normal coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tutorials.lotka_volterra import simulator

from .task import Reference, Task, draw_on_grid, resample

__all__ = ["LOTKA_VOLTERRA_SDE"]

_CELLS = 300
_HALF_WIDTH = 8.0  # of the grid, in posterior standard deviations
_DRAWS_PER_DRAW = 20


def _log_posterior(theta: Tensor, x: Tensor) -> Tensor:
    is_positive = (theta > 0).all(-1)
    safe = torch.where(is_positive[..., None], theta, torch.ones_like(theta))
    mean = simulator.one_step_mean(safe, x)
    log_likelihood = -0.5 * (x - mean).square().sum((-1, -2))
    standard = (safe.log() - simulator.PRIOR_LOC) / simulator.PRIOR_SCALE
    log_prior = (-0.5 * standard.square() - safe.log()).sum(-1)
    return (log_likelihood + log_prior).where(is_positive, theta.new_tensor(-torch.inf))


def _reference(x: Tensor, num_draws: int) -> Reference:
    """The two equations have parameters of their own: two problems in two dimensions."""
    exact = simulator.exact_posterior(x)
    centre = exact.log_mean
    parts, ess = [], []
    for pair in ([0, 1], [2, 3]):

        def log_density(log_theta: Tensor, pair: list[int] = pair) -> Tensor:
            full = centre.repeat(len(log_theta), 1)
            full[:, pair] = log_theta
            # the density of the logarithm
            return _log_posterior(full.exp(), x) + log_theta.sum(-1)

        spread = _HALF_WIDTH * exact.log_sd
        axes = [(float(centre[i] - spread[i]), float(centre[i] + spread[i]), _CELLS) for i in pair]
        draws, weights = draw_on_grid(log_density, axes, _DRAWS_PER_DRAW * num_draws)
        chosen = resample(draws, weights, num_draws)
        # without repetition, the order of choice follows the weights: forget it
        parts.append(chosen.draws[torch.randperm(num_draws)])
        ess.append(chosen.ess)
    return Reference(torch.cat(parts, -1).exp(), min(ess))


LOTKA_VOLTERRA_SDE = Task(
    "lotka_volterra_sde",
    simulator.model,
    simulator.observed_data,
    torch.tensor(simulator.THETA_TRUE),
    nuisance=("noise",),
    log_posterior=_log_posterior,
    reference=_reference,
)
