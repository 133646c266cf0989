"""Weights of particles: normalise, judge, and choose who goes on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "RESAMPLERS",
    "Resampler",
    "effective_sample_size",
    "log_mean_exp",
    "multinomial",
    "systematic",
    "take_particles",
]

Resampler = Callable[[Tensor, int], Tensor]
"""From log-weights ``(particles, ...)`` and a number to the indices of as many ancestors."""


def multinomial(log_weights: Tensor, num_samples: int) -> Tensor:
    """
    Draw every ancestor on its own, with probability proportional to its weight.

    Reference: Wu et al. 2020, "Amortized Population Gibbs Samplers with Neural Sufficient
    Statistics", algorithm 2.

    :param Tensor log_weights: shape ``(particles, ...)``, of any scale; in every column at least
        one is finite.
    :param int num_samples: number of ancestors.
    :returns: indices of ancestors, shape ``(num_samples, ...)``.
    """
    shape = (num_samples, *log_weights.shape[1:])
    uniform = torch.rand(shape, dtype=torch.float64, device=log_weights.device)
    return _invert(log_weights, uniform)


def systematic(log_weights: Tensor, num_samples: int) -> Tensor:
    """
    Draw ancestors by an evenly spaced comb with a random start.

    Of n ancestors, :math:`n w_l` are particle l on average, as with :func:`multinomial`, and
    never one more or one less than that.

    Reference: Carpenter, Clifford and Fearnhead 1999, "Improved particle filter for nonlinear
    problems".

    :param Tensor log_weights: shape ``(particles, ...)``, of any scale; in every column at least
        one is finite.
    :param int num_samples: number of ancestors.
    :returns: indices of ancestors, in increasing order, shape ``(num_samples, ...)``.
    """
    device = log_weights.device
    start = torch.rand(log_weights.shape[1:], dtype=torch.float64, device=device)
    teeth = torch.arange(num_samples, dtype=torch.float64, device=device)
    teeth = teeth.reshape((num_samples,) + (1,) * start.dim())
    return _invert(log_weights, (teeth + start) / num_samples)


RESAMPLERS: dict[str, Resampler] = {"multinomial": multinomial, "systematic": systematic}


def _invert(log_weights: Tensor, uniform: Tensor) -> Tensor:
    """The inverse of the cumulative weights, which never takes a particle of weight zero."""
    weights = torch.softmax(log_weights.detach().to(torch.float64), 0)
    cumulative = weights.movedim(0, -1).cumsum(-1)
    cumulative = (cumulative / cumulative[..., -1:]).contiguous()
    below_one = 1.0 - torch.finfo(torch.float64).eps
    points = uniform.clamp(max=below_one).movedim(0, -1).contiguous()
    ancestors = torch.searchsorted(cumulative, points, right=True)
    return ancestors.movedim(-1, 0)


def take_particles(ancestors: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """
    Give every particle the values of its ancestor.

    :param Tensor ancestors: shape ``(new particles, *batch)``.
    :param values: each of shape ``(particles, *batch, ...)``.
    :returns: the values of the new particles, each of shape ``(new particles, *batch, ...)``.
    """
    batch_shape = ancestors.shape[1:]
    num_columns = math.prod(batch_shape)
    columns = torch.arange(num_columns, device=ancestors.device).reshape(batch_shape)
    rows = (ancestors * num_columns + columns).reshape(-1)

    def take(value: Tensor) -> Tensor:
        own_shape = value.shape[ancestors.dim() :]
        return (
            value.reshape(-1, *own_shape)
            .index_select(0, rows)
            .reshape(ancestors.shape + own_shape)
        )

    return tuple(take(value) for value in values)


def log_mean_exp(log_weights: Tensor, dim: int = 0) -> Tensor:
    """
    Logarithm of the mean of the weights.

    :param Tensor log_weights: any shape.
    :param int dim: dimension of the particles.
    :returns: without this dimension.
    """
    return torch.logsumexp(log_weights, dim) - math.log(log_weights.shape[dim])


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""
    Effective sample size :math:`1 / \sum_l \bar w_l^2` of normalised weights.

    :param Tensor log_weights: shape ``(particles, ...)``.
    :returns: shape ``(...)``, between 1 and the number of particles.
    """
    return torch.softmax(log_weights, 0).square().sum(0).reciprocal()
