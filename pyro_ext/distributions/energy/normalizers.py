"""Normalisers of one-dimensional densities: estimates from draws, and quadrature."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...errors import NormalizerWarning
from ...ops.quadrature import LogIntegral, halve, log_integral, log_trapezoid
from .conditionals import Conditionals
from .proposals import stratified_positions

__all__ = [
    "Estimate",
    "data_estimate",
    "estimate",
    "exact_log_normalizer",
    "quadrature",
    "systematic_resampling",
]

_NODES_AT_ONCE = 2**18
_GRIDS_AT_ONCE = 64
_INTERVALS_AT_ONCE = 2**14
_GRIDS_WITH_GRADIENT = 32


class Estimate(NamedTuple):
    """Estimates of log Z, shape ``(n,)`` each."""

    log_normalizer: Tensor
    effective_sample_size: Tensor  # (sum w)^2 / sum w^2 of the importance weights


def estimate(conditionals: Conditionals, num_samples: int) -> Estimate:
    r"""
    Estimate log Z from draws of the proposal, one in each of S strata.

    .. math:: \hat Z = \frac1S \sum_{s=1}^S \frac{r(x_s) \, e^{u(x_s)}}{q(x_s)}

    (Nash and Durkan 2019, eq. 8). :math:`\hat Z` has no bias, so that by Jensen's inequality
    :math:`\log\hat Z` is too small on average and :math:`\log p` too large, both by about
    :math:`\operatorname{var}(\hat Z / Z) / 2`. Where there are no gradients, memory does not grow
    with S.

    :param Conditionals conditionals: n densities.
    :param int num_samples: S.
    """
    if torch.is_grad_enabled():
        positions = stratified_positions((len(conditionals), num_samples), conditionals.context)
        return _summary(conditionals.log_weights(conditionals.proposal.place(positions)))
    size = max(1, _NODES_AT_ONCE // num_samples)
    index = torch.arange(len(conditionals), device=conditionals.context.device)
    parts = [_streamed(conditionals.select(part), num_samples) for part in index.split(size)]
    return Estimate(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _summary(log_weights: Tensor) -> Estimate:
    log_sum = log_weights.logsumexp(-1)
    log_normalizer = log_sum - math.log(log_weights.shape[-1])
    size = (2.0 * log_sum - (2.0 * log_weights).logsumexp(-1)).exp()
    return Estimate(log_normalizer, size.detach())


def _streamed(conditionals: Conditionals, num_samples: int) -> Estimate:
    """The estimate, some strata after others."""
    log_sums, log_squares = [], []
    for first in range(0, num_samples, _NODES_AT_ONCE):
        last = min(num_samples, first + _NODES_AT_ONCE)
        shape = (len(conditionals), num_samples)
        positions = stratified_positions(shape, conditionals.context, first, last)
        log_weights = conditionals.log_weights(conditionals.proposal.place(positions))
        log_sums.append(log_weights.logsumexp(-1))
        log_squares.append((2.0 * log_weights).logsumexp(-1))
    log_sum, log_square = torch.stack(log_sums).logsumexp(0), torch.stack(log_squares).logsumexp(0)
    return Estimate(log_sum - math.log(num_samples), (2.0 * log_sum - log_square).exp())


def data_estimate(
    conditionals: Conditionals,
    x: Tensor,
    num_samples: int,
    num_gradient_samples: int | None = None,
) -> tuple[Tensor, Estimate]:
    r"""
    Negative energies of data, and an estimate of log Z in which the data take part.

    The datum takes the place of the draw in its own stratum. Then

    .. math:: \log\hat p(x) = \log q(x) + \log \frac{w(x)}{\frac1S \sum_s w(x_s)}
        \le \log q(x) + \log S

    whatever the energy: it cannot run away. Given the S points, the fraction is the probability
    with which the datum is the one of them that it is, so that maximising its mean is maximising
    a conditional likelihood: in the limit of many data the energy becomes the right one for any
    S from three on (ranking estimator, Ma and Collins 2018). On data that come from the model
    itself the estimate of log Z is too *large* on average, and log p too small.

    The gradient of :math:`\log\hat Z` is a mean of :math:`\nabla u(x_s)` with the weights
    w. Of the S points, M are drawn with these, for an unbiased estimate of the gradient that
    needs M backward passes instead of S. As the datum's own :math:`\nabla u(x)` is a single
    draw, this makes the variance of the gradient larger by a part of about 1/M only.

    :param Conditionals conditionals: n densities, whose proposal is without gradients if M is
        given.
    :param Tensor x: a datum of each, shape ``(n,)``.
    :param int num_samples: S, at least three.
    :param num_gradient_samples: M; ``None`` for the gradient of all.
    :returns: u at the data, shape ``(n,)``, and the estimate.
    """
    proposal, x = conditionals.proposal, x.unsqueeze(-1)
    nodes = proposal.place(stratified_positions((len(x), num_samples), x))
    stratum = (proposal.position(x.detach()) * num_samples).long().clamp(0, num_samples - 1)
    nodes = nodes.scatter(-1, stratum, x)
    if num_gradient_samples is None or not torch.is_grad_enabled():
        negative_energy = conditionals.negative_energy(nodes)
        log_weights = conditionals.log_weights(nodes, negative_energy)
        return negative_energy.gather(-1, stratum).squeeze(-1), _summary(log_weights)
    with torch.no_grad():
        log_weights = conditionals.log_weights(nodes)
        found = _summary(log_weights)
        chosen = systematic_resampling(log_weights, num_gradient_samples)
    few = conditionals.negative_energy(torch.cat([x, nodes.gather(-1, chosen)], -1))
    gradient = few[:, 1:].mean(-1)
    log_normalizer = found.log_normalizer + (gradient - gradient.detach())
    return few[:, 0], found._replace(log_normalizer=log_normalizer)


def systematic_resampling(log_weights: Tensor, number: int) -> Tensor:
    """
    Draw indices by their weights, from equally spaced places of one random offset.

    :param Tensor log_weights: shape ``(n, m)``.
    :param int number: how many.
    :returns: shape ``(n, number)``.
    """
    cumulative = log_weights.softmax(-1).cumsum(-1)
    offset = torch.rand_like(cumulative[:, :1])
    spaced = torch.arange(number, dtype=offset.dtype, device=offset.device)
    places = (spaced + offset) / number * cumulative[:, -1:]
    last: int = log_weights.shape[-1] - 1
    return torch.searchsorted(cumulative, places, right=True).clamp_max(last)


@torch.no_grad()
def quadrature(
    conditionals: Conditionals, *, tolerance: float = 1e-6, max_halvings: int = 10
) -> LogIntegral:
    """
    Compute log Z by quadrature on a grid that starts from the shape of the proposal.

    :param Conditionals conditionals: n densities.
    :param float tolerance: relative error of Z to stop at.
    :param int max_halvings: halvings of the grid at most.
    :returns: log Z, its error and whether it is within the tolerance, shape ``(n,)`` each.
    """
    index = torch.arange(len(conditionals), device=conditionals.context.device)
    parts = []
    for part in index.split(_GRIDS_AT_ONCE):
        chosen = conditionals.select(part)

        def log_f(rows: Tensor, points: Tensor, chosen: Conditionals = chosen) -> Tensor:
            size = max(1, 2 * _INTERVALS_AT_ONCE // points.shape[1])
            parts = zip(rows.split(size), points.split(size), strict=True)
            return torch.cat([chosen.select(i).log_unnormalized(x) for i, x in parts])

        parts.append(
            log_integral(
                log_f, chosen.proposal.grid(), tolerance=tolerance, max_halvings=max_halvings
            )
        )
    return LogIntegral(*(torch.cat(values) for values in zip(*parts, strict=True)))


def exact_log_normalizer(conditionals: Conditionals, before: Tensor, tolerance: float) -> Tensor:
    """
    Log Z by quadrature; gradients, where they are on, by trapezoids on a fixed grid.

    :param Conditionals conditionals: those of rows, one after the other.
    :param Tensor before: context and features of the rows. Where those before a feature are the
        same in two rows, as on a grid, the normaliser is computed once.
    :param float tolerance: of the quadrature.
    """
    if not len(before):
        return before.new_zeros(0)
    features = len(conditionals) // len(before)
    value = torch.empty(len(before), features, dtype=before.dtype, device=before.device)
    rows, errors = torch.arange(len(before), device=before.device), []
    size = before.shape[1] - features
    for feature in range(features):
        which = torch.zeros_like(rows)
        if size + feature:
            which = before[:, : size + feature].unique(dim=0, return_inverse=True)[1]
        one_of_each = rows.new_zeros(int(which.max()) + 1)
        one_of_each[which] = rows
        chosen = conditionals.select(one_of_each * features + feature)
        found = quadrature(chosen, tolerance=tolerance)
        value[:, feature] = found.value[which]
        errors.append(found.error[found.value.isfinite()])
    value, error = value.flatten(), torch.cat(errors)
    if bool((error > tolerance).any()):
        warnings.warn(
            f"Quadrature did not reach its tolerance {tolerance:.1g} for "
            f"{int((error > tolerance).sum())} of {len(error)} normalisers; the largest relative "
            f"error is about {float(error.max()):.1g}. Some conditional has a feature that is "
            "too narrow: is a feature constant, or min_scale very small?",
            NormalizerWarning,
            stacklevel=6,
        )
    if not torch.is_grad_enabled():
        return value
    parts = [
        # computed again for the gradient, so that memory does not grow with the grid
        checkpoint(_trapezoids, conditionals.select(part), use_reentrant=False)
        for part in torch.arange(len(value), device=value.device).split(_GRIDS_WITH_GRADIENT)
    ]
    approximate = torch.cat(parts)
    return value + (approximate - approximate.detach())


def _trapezoids(conditionals: Conditionals) -> Tensor:
    grid = conditionals.proposal.grid()
    for _ in range(3):
        grid = halve(grid, 0.5 * (grid[:, 1:] + grid[:, :-1]))
    return log_trapezoid(grid, conditionals.log_unnormalized(grid))
