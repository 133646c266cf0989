"""The arithmetic of rational-quadratic splines: find the piece, evaluate it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .knots import bounded_positive

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
    def num_parameters(self) -> int:
        """Number of parameters of one spline."""
        return 3 * self.bins - 1 if self.tails else 3 * self.bins + 1


class Pieces(NamedTuple):
    """The pieces that inputs fall into, each field of the shape of the inputs."""

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
    """Derivative at the left knot over the slope of the piece, r below."""
    right_ratio: Tensor
    """Derivative at the right knot over the slope of the piece, r' below."""
    xi: Tensor
    """Position in the piece, in [0, 1]."""


def spline(
    x: Tensor, parameters: Tensor, settings: SplineSettings
) -> tuple[Tensor, Tensor, Pieces]:
    r"""
    Evaluate splines or their inverses.

    In units of the piece, with :math:`\bar\xi = 1 - \xi`, eq. 4 and 5 of the paper are

    .. math:: \frac{y - y_k}{y_{k+1} - y_k} = \frac{\xi^2 + r \xi\bar\xi}{D}, \qquad
        \frac{g'(x)}{s_k} = \frac{r'\xi^2 + 2\xi\bar\xi + r\bar\xi^2}{D^2}, \qquad
        D = \xi^2 + \bar\xi^2 + (r + r')\xi\bar\xi.

    :param Tensor x: any shape.
    :param Tensor parameters: shape ``x.shape + (num_parameters,)``, or broadcastable to it.
    :param SplineSettings settings: bins, interval, direction.
    :returns: values, logarithms of the slopes, and the pieces the inputs fall into.
    """
    # Clamped first, so that no branch that is not selected sees a value it cannot take.
    inside = x.clamp(settings.low, settings.high)
    pieces = _find_pieces(inside, parameters, settings)
    r_left, r_right = pieces.left_ratio, pieces.right_ratio
    if settings.is_inverse:
        xi = _solve(((inside - pieces.bottom) / pieces.height).clamp(0.0, 1.0), r_left, r_right)
    else:
        xi = ((inside - pieces.left) / pieces.width).clamp(0.0, 1.0)
    rest = 1.0 - xi
    xi_squared, rest_squared, both = xi * xi, rest * rest, xi * rest
    denominator = torch.addcmul(xi_squared + rest_squared, r_left + r_right, both)
    numerator = torch.addcmul(both + both, r_right, xi_squared)
    numerator = torch.addcmul(numerator, r_left, rest_squared)
    scale = pieces.width * denominator * denominator
    if settings.is_inverse:
        value = torch.addcmul(pieces.left, pieces.width, xi)
        log_slope = torch.log(scale / (pieces.height * numerator))
    else:
        rise = torch.addcmul(xi_squared, r_left, both) / denominator
        value = torch.addcmul(pieces.bottom, pieces.height, rise)
        log_slope = torch.log(pieces.height * numerator / scale)
    if settings.tails:
        is_inside = inside == x
        value = torch.where(is_inside, value, x)
        log_slope = log_slope * is_inside
    return value, log_slope, pieces._replace(xi=xi)


def _solve(eta: Tensor, r_left: Tensor, r_right: Tensor) -> Tensor:
    """Position where a piece has risen by ``eta`` of its height, eq. 6-8 and 29 of the paper."""
    # The coefficients divided by the height and the slope of the piece; then a + b = 1, c = -eta,
    # and the discriminant is a sum of two terms that cannot be negative.
    twice = eta + eta
    shifted = r_left - eta * (r_left + r_right)
    b = shifted + twice
    root = torch.addcmul(shifted * shifted, twice + twice, 1.0 - eta).sqrt()
    # Of the two forms of the root the one in which nothing cancels.
    is_positive = b > 0
    numerator = torch.where(is_positive, twice, root - b)
    denominator = torch.where(is_positive, root + b, 2.0 - b - b)
    return (numerator / denominator).clamp(0.0, 1.0)


def _find_pieces(x: Tensor, parameters: Tensor, settings: SplineSettings) -> Pieces:
    """Find the piece of every input by binary search."""
    K, length = settings.bins, settings.high - settings.low
    relative = bounded_positive(parameters, settings.min_ratio)
    ends = relative[..., : 2 * K].unflatten(-1, (2, K)).cumsum(-1)
    # The search needs no gradient, and scales the inputs instead of all the knots.
    searched = ends.detach()[..., int(settings.is_inverse), :]
    u = (x.detach() - settings.low) * (searched[..., -1] / length)
    searched = searched.expand(*u.shape, K).contiguous()
    k = torch.searchsorted(searched, u.unsqueeze(-1).contiguous(), right=True)
    return _describe_pieces(relative, ends, k.squeeze(-1).clamp(max=K - 1), settings)


def indices_of_piece(k: Tensor, settings: SplineSettings) -> Tensor:
    """
    Where the parameters stand that describe a piece.

    :param Tensor k: number of the piece.
    :param SplineSettings settings: bins, interval, direction.
    :returns: indices of the widths of the piece before, of this one and of the one after, of
        their heights, and of the derivatives at the left and the right knot, in a new last
        dimension. Beyond the ends of the spline something else stands there.
    """
    K = settings.bins
    first = 2 * K - 1 if settings.tails else 2 * K
    offsets = torch.tensor([-1, 0, 1, K - 1, K, K + 1, first, first + 1], device=k.device)
    of_all = torch.arange(K, device=k.device)[:, None] + offsets
    # A table of all pieces is looked up faster than indices are computed for all inputs.
    of_all = of_all.clamp(0, settings.num_parameters - 1)
    return of_all.index_select(0, k.flatten()).reshape(*k.shape, of_all.shape[-1])


def _describe_pieces(
    relative: Tensor, ends: Tensor, k: Tensor, settings: SplineSettings
) -> Pieces:
    K, length = settings.bins, settings.high - settings.low
    picked = relative.expand(*k.shape, -1).gather(-1, indices_of_piece(k, settings))
    # Side by side in memory, because much is computed from them.
    picked = picked.movedim(-1, 0).contiguous()
    w_before, w, w_after, h_before, h, h_after, left_rho, right_rho = picked.unbind(0)
    index = torch.stack([k, k + K], -1)
    right, top = ends.flatten(-2).expand(*k.shape, -1).gather(-1, index).unbind(-1)
    x_unit, y_unit = (length / ends[..., -1]).expand(*k.shape, 2).unbind(-1)

    width, height = w * x_unit, h * y_unit
    left_ratio = _ratio(left_rho, h * w_before, w * h_before)
    right_ratio = _ratio(right_rho, h * w_after, w * h_after)
    at_left, at_right = (width / height,) * 2 if settings.tails else (left_rho, right_rho)
    return Pieces(
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


def _ratio(rho: Tensor, rise: Tensor, rise_of_neighbour: Tensor) -> Tensor:
    """Derivative at a knot over the slope of a piece: the harmonic mean, times rho."""
    return (rho + rho) * rise_of_neighbour / (rise + rise_of_neighbour)
