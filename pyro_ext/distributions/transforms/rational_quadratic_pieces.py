"""The arithmetic of rational-quadratic splines: find the piece, evaluate it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .knots import bounded_exp

__all__ = ["Pieces", "SplineSettings", "indices_of_piece", "spline"]


class SplineSettings(NamedTuple):
    """What all splines of one call have in common."""

    bins: int
    low: float
    high: float
    min_ratio: float
    tails: bool
    is_inverse: bool

    @property
    def first_derivative(self) -> int:
        """Index of the parameter that is the derivative left of the first bin, if it were."""
        return 2 * self.bins - 1 if self.tails else 2 * self.bins

    @property
    def num_parameters(self) -> int:
        """Number of parameters of one spline."""
        return 3 * self.bins - 1 if self.tails else 3 * self.bins + 1


class Pieces(NamedTuple):
    """The pieces that inputs fall into. All but ``relative`` have the shape of the inputs."""

    relative: Tensor
    """Widths, heights and relative derivatives before scaling, as the parameters are ordered."""
    k: Tensor
    """Number of the piece."""
    x_unit: Tensor
    """Length of the interval over the sum of the relative widths."""
    y_unit: Tensor
    """The same of the heights."""
    left: Tensor
    """Position of the left knot, x_k in the paper."""
    bottom: Tensor
    """Value of the left knot, y_k in the paper."""
    width: Tensor
    height: Tensor
    left_rho: Tensor
    """Derivative at the left knot over the harmonic mean of the slopes it joins."""
    right_rho: Tensor
    left_ratio: Tensor
    """Derivative at the left knot over the slope of the piece."""
    right_ratio: Tensor
    xi: Tensor
    """Position in the piece, in [0, 1]."""


def spline(
    x: Tensor, parameters: Tensor, settings: SplineSettings
) -> tuple[Tensor, Tensor, Pieces]:
    """
    Evaluate splines or their inverses.

    :param Tensor x: any shape.
    :param Tensor parameters: shape ``x.shape + (num_parameters,)``, or broadcastable to it.
    :param SplineSettings settings: bins, interval, direction.
    :returns: values, logarithms of the slopes, and the pieces the inputs fall into.
    """
    # Clamped first, so that no branch that is not selected sees a value it cannot take.
    inside = x.clamp(settings.low, settings.high)
    pieces = _find_pieces(inside, parameters, settings)
    bend = pieces.left_ratio + pieces.right_ratio - 2.0
    if settings.is_inverse:
        xi = _solve(((inside - pieces.bottom) / pieces.height).clamp(0.0, 1.0), pieces, bend)
    else:
        xi = ((inside - pieces.left) / pieces.width).clamp(0.0, 1.0)
    curve = xi * (1.0 - xi)
    denominator = 1.0 + bend * curve
    numerator = (
        pieces.right_ratio * xi.square() + 2.0 * curve + pieces.left_ratio * (1.0 - xi).square()
    )
    slope = pieces.height / pieces.width
    log_slope = torch.log(slope * numerator / denominator.square())  # eq. 5
    if settings.is_inverse:
        value, log_slope = pieces.left + pieces.width * xi, -log_slope
    else:
        rise = (xi.square() + pieces.left_ratio * curve) / denominator
        value = pieces.bottom + pieces.height * rise  # eq. 4
    if settings.tails:
        is_inside = (x >= settings.low) & (x <= settings.high)
        value = torch.where(is_inside, value, x)
        log_slope = torch.where(is_inside, log_slope, 0.0)
    return value, log_slope, pieces._replace(xi=xi)


def _solve(eta: Tensor, pieces: Pieces, bend: Tensor) -> Tensor:
    """Position where a piece has risen by ``eta`` of its height, eq. 6-8 and 29 of the paper."""
    # The coefficients divided by the height and the slope of the piece; then a + b = 1, c = -eta.
    b = pieces.left_ratio - eta * bend
    # Positive in exact arithmetic, because the derivative is; rounding must not spoil that.
    discriminant = b.square() + 4.0 * (1.0 - b) * eta
    root = discriminant.clamp_min(torch.finfo(eta.dtype).tiny).sqrt()
    return (2.0 * eta / (b + root)).clamp(0.0, 1.0)


def _find_pieces(x: Tensor, parameters: Tensor, settings: SplineSettings) -> Pieces:
    """Find the piece of every input by binary search."""
    K, length = settings.bins, settings.high - settings.low
    relative = bounded_exp(parameters, settings.min_ratio)
    ends = relative[..., : 2 * K].unflatten(-1, (2, K)).cumsum(-1)
    # The search needs no gradient, and scales the inputs instead of all the knots.
    searched = ends.detach()[..., int(settings.is_inverse), :]
    u = (x.detach() - settings.low) * (searched[..., -1] / length)
    searched = searched.expand(*u.shape, K).contiguous()
    k = torch.searchsorted(searched, u.unsqueeze(-1).contiguous(), right=True).clamp(max=K - 1)
    return _describe_pieces(relative, ends, k, settings)


def indices_of_piece(k: Tensor, settings: SplineSettings) -> Tensor:
    """
    Where the parameters stand that describe a piece.

    :param Tensor k: number of the piece, with a last dimension of size 1.
    :param SplineSettings settings: bins, interval, direction.
    :returns: indices of the widths of the piece before, of this one and of the one after, of
        their heights, and of the derivatives at the left and the right knot, in the last
        dimension. Beyond the ends of the spline something else stands there.
    """
    K, first = settings.bins, settings.first_derivative
    offsets = torch.tensor([-1, 0, 1, K - 1, K, K + 1, first, first + 1], device=k.device)
    return (k + offsets).clamp(0, settings.num_parameters - 1)


def _describe_pieces(
    relative: Tensor, ends: Tensor, k: Tensor, settings: SplineSettings
) -> Pieces:
    K, length = settings.bins, settings.high - settings.low
    batch_shape = k.shape[:-1]
    index = indices_of_piece(k, settings)
    picked = relative.expand(*batch_shape, -1).gather(-1, index)
    w_before, w, w_after, h_before, h, h_after, left_rho, right_rho = picked.unbind(-1)
    x_sum, y_sum = ends[..., -1].unbind(-1)
    index = torch.cat([k, k + K], -1)
    right, top = ends.flatten(-2).expand(*batch_shape, -1).gather(-1, index).unbind(-1)

    x_unit, y_unit = (length / x_sum).expand(batch_shape), (length / y_sum).expand(batch_shape)
    width, height = w * x_unit, h * y_unit
    left_ratio = 2.0 * left_rho / (1.0 + (h * w_before) / (w * h_before))
    right_ratio = 2.0 * right_rho / (1.0 + (h * w_after) / (w * h_after))
    at_left, at_right = (width / height,) * 2 if settings.tails else (left_rho, right_rho)
    k = k.squeeze(-1)
    return Pieces(
        relative=relative,
        k=k,
        x_unit=x_unit,
        y_unit=y_unit,
        left=(right - w) * x_unit + settings.low,
        bottom=(top - h) * y_unit + settings.low,
        width=width,
        height=height,
        left_rho=left_rho,
        right_rho=right_rho,
        left_ratio=torch.where(k == 0, at_left, left_ratio),
        right_ratio=torch.where(k == K - 1, at_right, right_ratio),
        xi=x_unit,
    )
