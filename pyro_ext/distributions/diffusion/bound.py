r"""Denoising errors, their weights over time, and the bound on the likelihood they give.

With :math:`x_t = a x + \sigma z` the score of the transition is :math:`-z / \sigma`, and

.. math:: \tfrac12 \int_\epsilon^T g^2 \| s(x_t, t) - \nabla \log p_{0t}(x_t | x) \|^2 dt
    = \tfrac Z2 \int_0^1 \| \sigma s(x_t, t) + z \|^2 du

on the natural scale of the diffusion. Everything else in theorem 6 of Song, Durkan, Murray and
Ermon (2021) is known in closed form for diffusions with linear drift.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .score import Score, column, row_numbers
from .sde import SDE

__all__ = ["Elbo", "denoising_error", "elbo", "time_weights", "training_errors"]


class Elbo(NamedTuple):
    """An estimate of a lower bound on log-densities."""

    value: Tensor
    """The estimate, in nats."""

    standard_error: Tensor
    """Its standard error, of the draws of times and noise."""


def denoising_error(
    score: Score, sde: SDE, x: Tensor, t: Tensor, noise: Tensor, rows: Tensor
) -> Tensor:
    r"""
    Squared error of the score in units of the noise, :math:`\|\sigma s(x_t, t) + z\|^2`.

    :param Score score: the score.
    :param SDE sde: the diffusion.
    :param Tensor x: data, shape ``(n,) + event_shape``.
    :param Tensor t: times, shape ``(n,)``.
    :param Tensor noise: z, shape ``(n,) + event_shape``.
    :param Tensor rows: numbers of the rows.
    :returns: shape ``(n,)``.
    """
    std = column(sde.std(t), x)
    noisy = column(sde.mean_factor(t), x) * x + std * noise
    return (std * score(noisy, t, rows) + noise).square().flatten(1).sum(-1)


def time_weights(
    sde: SDE, u: Tensor, weighting: str, importance_sampling: bool
) -> tuple[Tensor, Tensor]:
    r"""
    Times, and the weights that make mean denoising errors estimates of the integral.

    :math:`\tfrac12 \int \lambda(t) \, \mathbb E \|s - \nabla \log p_{0t}\|^2 dt` with
    :math:`\lambda = g^2` for ``"likelihood"`` and :math:`\lambda = \sigma^2` for ``"original"``
    (table 1); from uniform times, or from the density of eq. 12, under which the likelihood
    weighting is the constant :math:`Z / 2`.

    :param SDE sde: the diffusion.
    :param Tensor u: uniform numbers, shape ``(n,)``.
    :param str weighting: "likelihood" or "original".
    :param bool importance_sampling: whether to draw from the density of eq. 12.
    :returns: times and weights, each of shape ``(n,)``.
    """
    if importance_sampling:
        t = sde.time(u)
        if weighting == "likelihood":
            return t, torch.full_like(t, 0.5 * sde.natural_length)
        return t, 0.5 / sde.importance_density(t)
    length = sde.end - sde.start
    t = sde.start + length * u
    if weighting == "likelihood":
        return t, 0.5 * length * (sde.diffusion(t) / sde.std(t)).square()
    return t, torch.full_like(t, 0.5 * length)


def training_errors(
    score: Score, sde: SDE, x: Tensor, weighting: str, importance_sampling: bool
) -> Tensor:
    r"""
    A weighted denoising error of each row, at times that are spread over the rows.

    The mean of two, with the noise z and with -z. Near the data, where :math:`\sigma s` is small,
    the error is mostly :math:`\|z\|^2 + 2 \sigma z^\top s(x_t, t)`, and the gradient of its second
    term mostly chance: for both signs together it cancels to first order in :math:`\sigma`.

    :param Score score: the score.
    :param SDE sde: the diffusion.
    :param Tensor x: data, shape ``(n,) + event_shape``.
    :param str weighting: "likelihood" or "original".
    :param bool importance_sampling: whether to draw times from the density of eq. 12.
    :returns: shape ``(n,)``, each an unbiased estimate of its row's integral.
    """
    # a uniform number from each of n strata, dealt to the rows at random
    strata = torch.randperm(len(x), device=x.device).to(x)
    u = (strata + torch.rand_like(strata)) / max(len(x), 1)
    t, weights = time_weights(sde, u, weighting, importance_sampling)
    noise, rows = torch.randn_like(x), row_numbers(x)
    errors = denoising_error(
        score,
        sde,
        torch.cat([x, x]),
        torch.cat([t, t]),
        torch.cat([noise, -noise]),
        torch.cat([rows, rows]),
    )
    return weights * errors.unflatten(0, (2, len(x))).mean(0)


def elbo(
    score: Score, sde: SDE, x: Tensor, num_samples: int, *, correction: bool, rows_at_once: int
) -> Elbo:
    r"""
    Lower bound on the log-density that the reverse diffusion gives to data.

    Theorem 6 with the correction of eq. 39, for the data and not for what is left of them at
    :math:`\epsilon`. With the integrals that are known, the bound on :math:`-\log p(x)` is

    .. math:: -\mathbb E \log \pi(x_T) + \tfrac Z2 \int_0^1 \mathbb E \|\sigma s + z\|^2 du
        + \tfrac12 \mathbb E \|\sigma_\epsilon s(x_\epsilon, \epsilon) + z\|^2
        - \tfrac D2 (Z + 1) - D \log a(T) .

    The noise is a control variate: :math:`\|z\|^2 - D` has mean zero and, where the score is
    small beside the noise, goes with the error.

    :param Score score: the score.
    :param SDE sde: the diffusion.
    :param Tensor x: data, shape ``(n,) + event_shape``.
    :param int num_samples: times for each row, an even number.
    :param bool correction: whether to add the correction; without it the bound is one on the
        mean of :math:`\log p_\epsilon(x_\epsilon)`.
    :param int rows_at_once: evaluations of the score in one call.
    :returns: bounds and standard errors, each of shape ``(n,)``.
    """
    strata = torch.arange(num_samples, dtype=x.dtype, device=x.device).unsqueeze(-1)
    u = (strata + torch.rand(num_samples, len(x), dtype=x.dtype, device=x.device)) / num_samples
    integral, its_variance = _errors(score, sde, x, sde.time(u), rows_at_once)
    num_dimensions = x[:1].numel() if len(x) else 0
    ends = x.new_tensor([sde.start, sde.end], dtype=torch.float64)
    log_a_start, log_a_end = (float(value) for value in sde.log_mean_factor(ends))
    std_end = float(sde.std(ends[1]))
    length = sde.natural_length
    spread = math.exp(2 * log_a_end) * x.square().flatten(1).sum(-1) + num_dimensions * std_end**2
    log_prior = -0.5 * spread / sde.prior_std**2 - num_dimensions * (
        math.log(sde.prior_std) + 0.5 * math.log(2 * math.pi)
    )
    value = log_prior - 0.5 * length * integral
    value = value + num_dimensions * (0.5 * length + log_a_end)
    variance = (0.5 * length) ** 2 * its_variance
    if correction:
        start = torch.full_like(u, sde.start)
        error, its_variance = _errors(score, sde, x, start, rows_at_once)
        value = value - 0.5 * error + 0.5 * num_dimensions
        variance = variance + 0.25 * its_variance
    else:
        value = value - num_dimensions * log_a_start
    return Elbo(value, variance.sqrt())


def _errors(
    score: Score, sde: SDE, x: Tensor, t: Tensor, rows_at_once: int
) -> tuple[Tensor, Tensor]:
    """Mean denoising errors at times ``(k, n)``, and the variances of these means."""
    num_rows, num_dimensions = len(x), x[:1].numel()
    rows = row_numbers(x)
    parts = []
    for some in t.split(max(1, rows_at_once // max(num_rows, 1))):
        repeated = x.repeat(len(some), *[1] * (x.dim() - 1))
        noise = torch.randn_like(repeated)
        times = some.flatten()
        error = denoising_error(score, sde, repeated, times, noise, rows.repeat(len(some)))
        signal = sde.mean_factor(times).square()
        control = (signal / (signal + sde.std(times).square())).square()
        error = error - control * (noise.square().flatten(1).sum(-1) - num_dimensions)
        parts.append(error.reshape(len(some), num_rows))
    errors = torch.cat(parts)
    # neighbouring strata in pairs: what they differ by is at least what chance makes of it
    differences = errors[0::2] - errors[1::2]
    return errors.mean(0), differences.square().sum(0) / len(errors) ** 2
