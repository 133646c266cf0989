"""From draws of one density to draws of another, through densities between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .resampling import effective_sample_size, log_mean_exp, systematic
from .slice_sampling import slice_sweep

__all__ = ["Tempered", "temper"]

_MIN_ESS = 0.5
_MAX_TEMPERATURES = 200
_BISECTIONS = 30


class Tempered(NamedTuple):
    """What :func:`temper` has drawn."""

    particles: Tensor
    """Draws of equal weight, shape ``(particles, features)``."""
    log_evidence: Tensor
    """Estimate of the logarithm of the mean of the likelihood over the prior, a number."""
    num_temperatures: int
    """Steps from the prior to the posterior."""


def temper(
    particles: Tensor,
    log_prior: Callable[[Tensor], Tensor],
    log_likelihood: Callable[[Tensor], Tensor],
    *,
    final_sweeps: int = 3,
) -> Tempered:
    r"""
    Draw from a posterior by sequential Monte Carlo, with slice sampling as its moves.

    Draws of the prior go through :math:`p(u) \, L(u)^{\beta}` for :math:`0 < \beta \le 1`, where
    every :math:`\beta` is chosen so that the effective sample size of the weights is half the
    number of particles. Separate modes keep their weights, as chains could not.

    Reference: Del Moral, Doucet and Jasra 2006, "Sequential Monte Carlo samplers"; 2012, "An
    adaptive sequential Monte Carlo method for approximate Bayesian computation".

    :param Tensor particles: draws of the prior, shape ``(particles, features)``.
    :param log_prior: of shape ``(n, features)`` to shape ``(n,)``, up to a constant.
    :param log_likelihood: likewise; where it is NaN there is none.
    :param int final_sweeps: updates of every coordinate at the end.
    """
    prior = log_prior(particles)
    likelihood = torch.nan_to_num(log_likelihood(particles), nan=-torch.inf)
    log_evidence = likelihood.new_zeros(())
    beta, num = 0.0, 0
    while beta < 1.0:
        num += 1
        step = 1.0 - beta if num == _MAX_TEMPERATURES else _next_step(likelihood, 1.0 - beta)
        beta = min(1.0, beta + step)
        log_evidence = log_evidence + log_mean_exp(step * likelihood)
        ancestors = systematic(step * likelihood, len(particles))
        particles, prior, likelihood = (v[ancestors] for v in (particles, prior, likelihood))
        for _ in range(final_sweeps if beta >= 1.0 else 1):
            particles, prior, likelihood = _move(
                particles, prior, likelihood, log_prior, log_likelihood, beta
            )
    return Tempered(particles, log_evidence, num)


def _next_step(likelihood: Tensor, largest: float) -> float:
    """By how much the exponent can grow before the weights become too uneven."""
    target = _MIN_ESS * len(likelihood)
    if float(effective_sample_size(largest * likelihood)) >= target:
        return largest
    low, high = 0.0, largest
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if float(effective_sample_size(middle * likelihood)) >= target:
            low = middle
        else:
            high = middle
    return high


def _move(
    particles: Tensor,
    prior: Tensor,
    likelihood: Tensor,
    log_prior: Callable[[Tensor], Tensor],
    log_likelihood: Callable[[Tensor], Tensor],
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    widths = 2.0 * particles.std(0).clamp(min=torch.finfo(particles.dtype).eps)
    particles, _ = slice_sweep(
        particles,
        prior + beta * likelihood,
        lambda x: log_prior(x) + beta * log_likelihood(x),
        widths,
    )
    # anew, since what the sweep returns is their sum
    new = torch.nan_to_num(log_likelihood(particles), nan=-torch.inf)
    return particles, log_prior(particles), new
