"""Splines written down from their papers, one formula after the other, in double precision.

Nothing is shared with the package but the function that bounds parameters: knots and derivatives
come from the documented parameterisation, values from the equations in the papers. Everything is
differentiable, so that automatic differentiation of it is a reference for gradients too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ext.distributions.transforms import QuadraticSpline, RationalQuadraticSpline
from pyro_ext.distributions.transforms.knots import bounded_positive

__all__ = ["Knots", "Spline", "interval", "knots_of", "reference_forward", "reference_inverse"]

Spline = RationalQuadraticSpline | QuadraticSpline


class Knots(NamedTuple):
    """Knots of splines, each of shape ``(..., bins + 1)``."""

    x: Tensor
    y: Tensor
    delta: Tensor


def interval(spline: Spline) -> tuple[float, float]:
    """Ends of the interval that a spline acts on."""
    return (-spline.bound, spline.bound) if spline.tails else (0.0, 1.0)


def knots_of(spline: Spline, parameters: Tensor) -> Knots:
    """
    Knots and derivatives that unconstrained parameters stand for.

    :param Tensor parameters: shape ``(..., num_parameters)``.
    """
    relative = bounded_positive(parameters, spline.min_ratio)
    if isinstance(spline, RationalQuadraticSpline):
        return _rational_quadratic_knots(spline, relative)
    return _quadratic_knots(spline, relative)


def _rational_quadratic_knots(spline: Spline, relative: Tensor) -> Knots:
    K = spline.bins
    low, high = interval(spline)
    widths, heights, rho = relative.split([K, K, relative.shape[-1] - 2 * K], -1)
    widths = (high - low) * widths / widths.sum(-1, keepdim=True)
    heights = (high - low) * heights / heights.sum(-1, keepdim=True)
    slopes = heights / widths
    harmonic = 2.0 / (1.0 / slopes[..., 1:] + 1.0 / slopes[..., :-1])
    if spline.tails:
        ends = torch.ones_like(slopes[..., :1])
        delta = torch.cat([ends, rho * harmonic, ends], -1)
    else:  # the slope of the one piece takes the place of the mean
        delta = rho * torch.cat([slopes[..., :1], harmonic, slopes[..., -1:]], -1)
    return Knots(_running_sum(widths, low), _running_sum(heights, low), delta)


def _quadratic_knots(spline: Spline, relative: Tensor) -> Knots:
    K = spline.bins
    low, high = interval(spline)
    widths = relative[..., :K] / relative[..., :K].sum(-1, keepdim=True)
    inner = relative[..., K:]
    if spline.tails:
        # with the inner derivatives times c the area is c * area(inner) + area(ends)
        zero, one = torch.zeros_like(inner[..., :1]), torch.ones_like(inner[..., :1])
        of_inner = torch.cat([zero, inner, zero], -1)
        of_ends = torch.cat([one, torch.zeros_like(inner), one], -1)
        scale = (1.0 - _areas(widths, of_ends).sum(-1, keepdim=True)) / _areas(
            widths, of_inner
        ).sum(-1, keepdim=True)
        delta = scale * of_inner + of_ends
    else:
        delta = inner / _areas(widths, inner).sum(-1, keepdim=True)
    areas = _areas(widths, delta)
    return Knots(
        _running_sum(widths * (high - low), low), _running_sum(areas * (high - low), low), delta
    )


def _areas(widths: Tensor, heights: Tensor) -> Tensor:
    """Areas of trapezoids."""
    return widths * (heights[..., 1:] + heights[..., :-1]) / 2.0


def _running_sum(lengths: Tensor, start: float) -> Tensor:
    zero = torch.zeros_like(lengths[..., :1])
    return start + torch.cat([zero, lengths.cumsum(-1)], -1)


class _Piece(NamedTuple):
    """The pieces that points fall into, in the letters of the paper."""

    x: Tensor
    y: Tensor
    w: Tensor
    s: Tensor
    d0: Tensor
    d1: Tensor


def _piece(knots: Knots, ends: Tensor, at: Tensor) -> _Piece:
    """Count the inner knots on the left: slow and simple."""
    k = (at.unsqueeze(-1) >= ends[..., 1:-1]).sum(-1, keepdim=True)

    def pick(values: Tensor, index: Tensor) -> Tensor:
        return values.expand(*at.shape, values.shape[-1]).gather(-1, index).squeeze(-1)

    x0, x1 = pick(knots.x, k), pick(knots.x, k + 1)
    y0, y1 = pick(knots.y, k), pick(knots.y, k + 1)
    d0, d1 = pick(knots.delta, k), pick(knots.delta, k + 1)
    return _Piece(x0, y0, x1 - x0, (y1 - y0) / (x1 - x0), d0, d1)


def _outside(spline: Spline, at: Tensor, value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    low, high = interval(spline)
    if not spline.tails:
        return value, slope.log()
    is_outside = (at < low) | (at > high)
    return torch.where(is_outside, at, value), torch.where(is_outside, 0.0, slope.log())


def reference_forward(spline: Spline, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Values and log slopes."""
    inside = x.clamp(*interval(spline))
    knots = knots_of(spline, parameters)
    p = _piece(knots, knots.x, inside)
    xi = (inside - p.x) / p.w
    if isinstance(spline, QuadraticSpline):  # the integral of a derivative that is a line
        value = p.y + p.w * (p.d0 * xi + (p.d1 - p.d0) * xi**2 / 2)
        return _outside(spline, x, value, p.d0 + (p.d1 - p.d0) * xi)
    # Durkan et al. 2019: eq. 4, whose fraction is alpha / beta, and eq. 22
    alpha = p.w * p.s * (p.s * xi**2 + p.d0 * xi * (1 - xi))
    beta = p.s + (p.d1 + p.d0 - 2 * p.s) * xi * (1 - xi)
    slope = p.s**2 * (p.d1 * xi**2 + 2 * p.s * xi * (1 - xi) + p.d0 * (1 - xi) ** 2) / beta**2
    return _outside(spline, x, p.y + alpha / beta, slope)


def reference_inverse(spline: Spline, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse values and log slopes of the inverse."""
    inside = y.clamp(*interval(spline))
    knots = knots_of(spline, parameters)
    p = _piece(knots, knots.y, inside)
    rise = inside - p.y
    if isinstance(spline, QuadraticSpline):
        a, b, c = p.w * (p.d1 - p.d0) / 2, p.w * p.d0, -rise
    else:  # eq. 25-27
        bend = p.d1 + p.d0 - 2 * p.s
        a = p.w * p.s * (p.s - p.d0) + rise * bend
        b = p.w * p.s * p.d0 - rise * bend
        c = -p.s * rise
    xi = -2 * c / (b + (b**2 - 4 * a * c).sqrt())  # eq. 29, the root that is stable
    x = p.x + xi * p.w
    _, log_slope = reference_forward(spline, x, parameters)
    value, _ = _outside(spline, y, x, torch.ones_like(x))
    outside = (y < interval(spline)[0]) | (y > interval(spline)[1])
    return value, -torch.where(outside & spline.tails, 0.0, log_slope)
