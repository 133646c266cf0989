r"""Lotka-Volterra with normal noise in each of 50 steps: the simulator of the tutorial.

Both populations are seen after every step, 100 numbers. The noise is a latent site, ``x`` a
deterministic one, so that ConstrainedHMC draws from the exact posterior; the reference uses that
each equation is a linear regression with log-normal coefficients.

Under the prior of the tutorial, :math:`\log \theta_i \sim N(-2, 1)`, the populations of 9,994 of
10,000 simulations overflow: exact conditioning does not mind, but nothing can be learned from such
simulations. The second task has a prior around plausible rates; 998 of 1,000 are finite there.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from tutorials.lotka_volterra import simulator

from .task import Reference, Task, draw_on_grid, resample

__all__ = ["LOTKA_VOLTERRA_SDE", "LOTKA_VOLTERRA_SDE_PLAUSIBLE"]

PLAUSIBLE = (0.4, 0.005, 0.05, 0.001)
_CELLS = 300
_HALF_WIDTH = 8.0  # of the grid, in posterior standard deviations
_DRAWS_PER_DRAW = 20


def _task(name: str, loc: Tensor, scale: float) -> Task:
    """The simulator with independent log-normal priors."""

    def model() -> Tensor:
        prior = dist.LogNormal(loc.to(torch.get_default_dtype()), scale).to_event(1)
        theta = pyro.sample("theta", prior)
        steps = torch.zeros(simulator.NUM_STEPS, 2)
        noise = pyro.sample("noise", dist.Normal(steps, 1.0).to_event(2))
        return pyro.deterministic("x", simulator.simulate(theta, noise), event_dim=2)

    def log_posterior(theta: Tensor, x: Tensor) -> Tensor:
        is_positive = (theta > 0).all(-1)
        safe = torch.where(is_positive[..., None], theta, torch.ones_like(theta))
        errors = x - simulator.one_step_mean(safe, x)
        log_prior = dist.LogNormal(loc.to(theta), scale).log_prob(safe).sum(-1)
        result = log_prior - 0.5 * errors.square().sum((-1, -2))
        return result.where(is_positive, theta.new_tensor(-torch.inf))

    return Task(
        name,
        model,
        simulator.observed_data,
        torch.tensor(simulator.THETA_TRUE, dtype=torch.float64),
        nuisance=("noise",),
        log_posterior=log_posterior,
        reference=lambda x, num_draws: _reference(log_posterior, x, num_draws),
    )


def _reference(
    log_posterior: Callable[[Tensor, Tensor], Tensor], x: Tensor, num_draws: int
) -> Reference:
    """The two equations have parameters of their own: two problems in two dimensions."""
    # where to look; a prior that says more moves the posterior by less than the grid is wide
    around = simulator.exact_posterior(x)
    centre, spread = around.log_mean, _HALF_WIDTH * around.log_sd
    low, high = (centre - spread).tolist(), (centre + spread).tolist()
    parts = []
    for pair in ([0, 1], [2, 3]):

        def log_density(log_theta: Tensor, pair: list[int] = pair) -> Tensor:
            full = centre.repeat(len(log_theta), 1)
            full[:, pair] = log_theta
            # the density of the logarithm
            return log_posterior(full.exp(), x) + log_theta.sum(-1)

        axes = [(low[i], high[i], _CELLS) for i in pair]
        draws, weights = draw_on_grid(log_density, axes, _DRAWS_PER_DRAW * num_draws)
        parts.append(resample(draws, weights, num_draws))
    ess = min(part.ess for part in parts)
    return Reference(torch.cat([part.draws for part in parts], -1).exp(), ess)


LOTKA_VOLTERRA_SDE = _task(
    "lotka_volterra_sde",
    torch.full((4,), simulator.PRIOR_LOC, dtype=torch.float64),
    simulator.PRIOR_SCALE,
)
LOTKA_VOLTERRA_SDE_PLAUSIBLE = _task(
    "lotka_volterra_sde_plausible", torch.tensor(PLAUSIBLE, dtype=torch.float64).log(), 0.3
)
