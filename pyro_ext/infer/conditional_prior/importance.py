"""How far a fitted guide is from the posterior, by its importance weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pyro.distributions import Normal
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from .density import ConditionalPrior

__all__ = ["ImportanceBound", "defensive_draws", "importance_bound", "pareto_k"]

_FEWEST_IN_TAIL = 5


class ImportanceBound(NamedTuple):
    """What importance weights say. Tensors have the shape of the rows, ``()`` if there is one."""

    log_evidence: Tensor
    r"""The importance-weighted bound :math:`\log \frac1K \sum_k p(z_k, x) / q(z_k)`, which is
    above the C-ELBO and, in expectation, below :math:`\log p(x)`."""
    c_elbo: Tensor
    """The C-ELBO from the same draws."""
    pareto_k: Tensor
    """Shape of the tail of the weights: below 0.5 the guide is close to the posterior, above 0.7
    neither it nor the bound are to be trusted, unless :attr:`effective_sample_size` is nearly the
    number of draws: of weights that are almost equal the tail says nothing."""
    effective_sample_size: Tensor
    """Of the weights, at most the number of draws."""


def importance_bound(log_weights: Tensor, row_shape: torch.Size) -> ImportanceBound:
    """
    Summarise the importance weights of the rows.

    :param Tensor log_weights: shape ``(draws, rows)``.
    :param torch.Size row_shape: shape of the results.

    Reference: Burda, Grosse and Salakhutdinov 2016, "Importance weighted autoencoders"; Yao,
    Vehtari, Simpson and Gelman 2018, "Yes, but did it work?".
    """
    weights = log_weights.softmax(0)
    return ImportanceBound(
        log_evidence=(log_weights.logsumexp(0) - math.log(len(log_weights))).reshape(row_shape),
        c_elbo=log_weights.mean(0).reshape(row_shape),
        pareto_k=pareto_k(log_weights).reshape(row_shape),
        effective_sample_size=weights.square().sum(0).reciprocal().reshape(row_shape),
    )


def pareto_k(log_weights: Tensor) -> Tensor:
    """
    Shape of a generalised Pareto distribution fitted to the largest weights.

    :param Tensor log_weights: shape ``(draws, rows)``.
    :returns: shape ``(rows,)``; infinite where weights are NaN or nearly all of them vanish,
        minus infinity where all are equal.

    Reference: Vehtari, Simpson, Gelman, Yao and Gabry 2024, "Pareto smoothed importance sampling".
    """
    num = len(log_weights)
    size = math.ceil(min(0.2 * num, 3 * math.sqrt(num)))
    if size < _FEWEST_IN_TAIL:
        raise ValueError(
            f"{num} draws are too few to see the tail of their weights: give at least 25."
        )
    ks = [_of_row(column, size) for column in log_weights.detach().double().unbind(-1)]
    return log_weights.new_tensor(ks)


def _of_row(log_weights: Tensor, size: int) -> float:
    if not bool((log_weights < math.inf).all()):
        return math.inf
    ordered = (log_weights - log_weights.max()).sort().values
    cutoff = max(float(ordered[-size - 1]), math.log(torch.finfo(torch.float64).tiny))
    tail = ordered[ordered > cutoff]
    if float(ordered[0]) == 0.0:
        return -math.inf
    if len(tail) < _FEWEST_IN_TAIL:
        return math.inf
    return fit_generalized_pareto(tail.exp() - math.exp(cutoff))[0]


def defensive_draws(
    density: ConditionalPrior, loc: Tensor, scale: Tensor, num: int
) -> tuple[Tensor, Tensor]:
    """
    Draws of a guide and of a wide Gaussian, half of each.

    The share of the Gaussian bounds importance weights where the guide has no draws (Hesterberg
    1995, "Weighted average importance sampling and defensive mixture distributions").

    :param ConditionalPrior density: the guide.
    :param Tensor loc: means of the Gaussian, shape ``(rows, features)``.
    :param Tensor scale: its standard deviations, of the same shape.
    :param int num: number of draws.
    :returns: draws, shape ``(num, rows, features)``, and their log-density under the mixture of
        both, shape ``(num, rows)``.
    """
    num_wide = num // 2
    wide = Normal(loc, scale).to_event(1)
    z = torch.cat(
        [
            density.rsample([num - num_wide]).reshape(-1, *loc.shape),
            wide.sample(torch.Size([num_wide])),
        ]
    )
    log_q = density.log_prob(z.reshape(num, *density.batch_shape, *density.event_shape))
    shares = loc.new_tensor([num - num_wide, num_wide]) / num
    both = torch.stack([log_q.reshape(num, -1), wide.log_prob(z)], -1)
    return z, (both + shares.log()).logsumexp(-1)
