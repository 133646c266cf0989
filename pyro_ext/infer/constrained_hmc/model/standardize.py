"""Standardised coordinates for the distribution of a latent site.

Every latent site is written as a deterministic function of an input whose distribution is as
close to a standard normal as the family allows, so that the identity is a sensible mass matrix
whatever the scales of the model. The functions here know distributions and nothing of traces.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import biject_to, constraints

__all__ = [
    "Calibration",
    "calibrate",
    "is_continuous",
    "is_standard_normal",
    "pull",
    "push",
    "unmasked",
]

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
# The classes of torch, from which Pyro's derive: families built by transforms hold torch's.
# Families on the real line that are loc + scale * (a standard member of the family).
_LOCATION_SCALE = (td.Gumbel, td.Laplace, td.StudentT)
_NORMALIZED = (td.Normal, td.MultivariateNormal, td.Uniform, td.Exponential, td.Cauchy)
_WRAPPERS = (td.Independent, dist.MaskedDistribution)


class Calibration(NamedTuple):
    """
    Location and scale of a site's unconstrained coordinates under its prior.

    For families without a closed-form standardisation; both have the shape of the site's input.
    """

    loc: Tensor
    scale: Tensor


def push(fn: Any, u: Tensor, calibration: Calibration | None = None) -> tuple[Tensor, Tensor]:
    r"""
    Map an input to a value of a distribution.

    With :math:`x = T(u)` the log density of the input is

    .. math:: \log p_U(u) = \log p_X(T(u)) + \log |\det \partial T / \partial u|

    Normal, multivariate normal, uniform, exponential and Cauchy distributions, and everything
    built from them by invertible transforms, have exactly standard normal inputs; other
    location-scale families keep their own standard member; the rest go through ``biject_to``
    of their support, shifted and scaled by ``calibration``.

    :param fn: a distribution with a continuous support.
    :param Tensor u: input, of the shape that :func:`pull` returns.
    :param calibration: what :func:`calibrate` returned for this site.
    :returns: the value, and the log density of ``u`` summed over all its elements (a scalar).
    """
    fn = unmasked(fn)
    if _is_transformed(fn):
        value, log_density = push(fn.base_dist, u, calibration)
        for transform in fn.transforms:
            value = transform(value)
        return value, log_density
    if isinstance(fn, td.Normal):
        return fn.loc + fn.scale * u, _standard_normal(u)
    if isinstance(fn, td.MultivariateNormal):
        shift = (fn._unbroadcasted_scale_tril @ u.unsqueeze(-1)).squeeze(-1)
        return fn.loc + shift, _standard_normal(u)
    if isinstance(fn, td.Uniform):
        return fn.low + (fn.high - fn.low) * _normal_cdf(u), _standard_normal(u)
    if isinstance(fn, td.Exponential):
        # -log of the normal survival function is a unit exponential
        return _negative_log_survival(u) / fn.rate, _standard_normal(u)
    if isinstance(fn, td.Cauchy):
        return fn.loc + fn.scale * _standard_cauchy(u), _standard_normal(u)
    if isinstance(fn, _LOCATION_SCALE):
        value = fn.loc + fn.scale * u
        # p_U(u) = p_X(loc + scale u) scale
        return value, (fn.log_prob(value) + fn.scale.log()).sum()
    return _push_through_support(fn, u, calibration)


def pull(fn: Any, value: Tensor, calibration: Calibration | None = None) -> Tensor:
    """
    Map a value of a distribution to its input; the inverse of :func:`push`.

    :param fn: a distribution with a continuous support.
    :param Tensor value: a value in the support.
    :param calibration: what :func:`calibrate` returned for this site.
    :returns: the input. Its shape differs from the value's where the support has fewer
        dimensions than the value (a simplex, say).
    """
    fn = unmasked(fn)
    if _is_transformed(fn):
        for transform in reversed(fn.transforms):
            value = transform.inv(value)
        return pull(fn.base_dist, value, calibration)
    if isinstance(fn, td.MultivariateNormal):
        centred = (value - fn.loc).unsqueeze(-1)
        scale_tril = fn._unbroadcasted_scale_tril
        return torch.linalg.solve_triangular(scale_tril, centred, upper=False).squeeze(-1)
    if isinstance(fn, td.Uniform):
        return torch.special.ndtri((value - fn.low) / (fn.high - fn.low))
    if isinstance(fn, td.Exponential):
        return _inverse_log_survival(fn.rate * value)
    if isinstance(fn, td.Cauchy):
        return _inverse_standard_cauchy((value - fn.loc) / fn.scale)
    if isinstance(fn, (td.Normal, *_LOCATION_SCALE)):
        return (value - fn.loc) / fn.scale
    unconstrained = biject_to(fn.support).inv(value)
    if calibration is None:
        return unconstrained
    return (unconstrained - calibration.loc) / calibration.scale


def is_standard_normal(fn: Any) -> bool:
    """Whether the input of this distribution is exactly standard normal."""
    fn = unmasked(fn)
    if _is_transformed(fn):
        return is_standard_normal(fn.base_dist)
    return isinstance(fn, _NORMALIZED)


def calibrate(fn: Any, num_draws: int = 256) -> Calibration | None:
    """
    Measure the location and scale of a site's unconstrained coordinates under its prior.

    :param fn: the site's distribution in one run of the model.
    :param int num_draws: prior draws that the mean and standard deviation are taken from.
    :returns: ``None`` where :func:`push` has a closed form and needs no measurement.
    """
    fn = unmasked(fn)
    while _is_transformed(fn):
        fn = unmasked(fn.base_dist)
    if is_standard_normal(fn) or isinstance(fn, _LOCATION_SCALE):
        return None
    draws = biject_to(fn.support).inv(fn.sample((num_draws,)))
    loc, scale = draws.mean(0), draws.std(0)
    usable = loc.isfinite() & scale.isfinite() & (scale > 0)
    return Calibration(
        torch.where(usable, loc, torch.zeros_like(loc)),
        torch.where(usable, scale, torch.ones_like(scale)),
    )


def _push_through_support(
    fn: Any, u: Tensor, calibration: Calibration | None
) -> tuple[Tensor, Tensor]:
    unconstrained, log_scale = u, u.new_zeros(())
    if calibration is not None:
        unconstrained = calibration.loc + calibration.scale * u
        log_scale = calibration.scale.log().sum()
    transform = biject_to(fn.support)
    value = transform(unconstrained)
    log_det = transform.log_abs_det_jacobian(unconstrained, value).sum()
    return value, fn.log_prob(value).sum() + log_det + log_scale


def unmasked(fn: Any) -> Any:
    """A distribution without its masks and without its split into events."""
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn


def _is_transformed(fn: Any) -> bool:
    """Whether to follow a distribution's transforms."""
    # torch writes a Gumbel as a transformed uniform, which loses the digits of its upper tail
    if not isinstance(fn, td.TransformedDistribution) or isinstance(fn, _LOCATION_SCALE):
        return False
    # half-normal and half-Cauchy fold their base at zero, where the constraint would have a kink
    return all(transform.bijective for transform in fn.transforms)


def _standard_cauchy(u: Tensor) -> Tensor:
    """Quantile of the standard Cauchy at the normal CDF of ``u``, exact in both tails."""
    # tan(pi (Phi(u) - 1/2)) = cot(pi Phi(-u)): no probability near one is ever formed
    magnitude = 1 / torch.tan(torch.pi * _normal_cdf(-u.abs()))
    return torch.where(u < 0, -magnitude, magnitude)


def _inverse_standard_cauchy(value: Tensor) -> Tensor:
    magnitude = -torch.special.ndtri(torch.atan(1 / value.abs()) / torch.pi)
    return torch.where(value < 0, -magnitude, magnitude)


def _standard_normal(u: Tensor) -> Tensor:
    return -0.5 * u.square().sum() - u.numel() * _HALF_LOG_2PI


def _normal_cdf(u: Tensor) -> Tensor:
    """The normal distribution function; ``torch.special.ndtr`` has no correct digits below -8."""
    return 0.5 * torch.special.erfc(-math.sqrt(0.5) * u)


def _negative_log_survival(u: Tensor) -> Tensor:
    """``-log_ndtr(-u)``, accurate in both tails, from operations that ``vmap`` can batch."""
    upper = -_normal_cdf(-u.clamp(min=0.0)).log()
    lower = -torch.log1p(-_normal_cdf(u.clamp(max=0.0)))
    return torch.where(u > 0, upper, lower)


def _inverse_log_survival(energy: Tensor) -> Tensor:
    """Solve -log_ndtr(-u) = energy for u, by Newton's iteration from a tail expansion."""
    u = torch.special.ndtri(-torch.expm1(-energy.clamp(max=30.0)))
    u = torch.where(energy > 30.0, (2 * energy).sqrt(), u)
    for _ in range(8):
        log_survival = torch.special.log_ndtr(-u)
        log_hazard = -0.5 * u.square() - _HALF_LOG_2PI - log_survival
        u = u - (-log_survival - energy) * (-log_hazard).exp()
    return u


def is_continuous(fn: Any) -> bool:
    """Whether the support of a distribution is continuous."""
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return not support.is_discrete
