"""Monotonic quadratic splines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .elementwise import ElementwiseMap
from .knots import bounded_positive, check_spline_settings, working_dtype

__all__ = ["QuadraticSpline"]


class QuadraticSpline(ElementwiseMap):
    r"""
    A monotonic spline of quadratic pieces: its derivative is piecewise linear.

    With knots :math:`x_k`, derivatives :math:`\delta_k` there, :math:`w_k = x_{k+1} - x_k` and
    :math:`\xi = (x - x_k) / w_k`,

    .. math:: g(x) = y_k + w_k [\delta_k \xi + (\delta_{k+1} - \delta_k) \xi^2 / 2],

    where the :math:`y_k` are the areas below the derivative so far. The derivatives are scaled
    so that the spline maps the interval :math:`[-B, B]` to itself; outside it is the identity,
    and the derivatives at both ends are 1. With ``tails=False`` the interval is :math:`[0, 1]`
    and the ends have derivatives of their own.

    The parameters of one function are ``bins`` log widths and a log derivative for each inner
    knot (for every knot with ``tails=False``), bounded as in
    :class:`~pyro_ext.distributions.transforms.RationalQuadraticSpline`.

    :param int bins: number of pieces K, at least 2.
    :param float bound: half the length B of the interval.
    :param float min_ratio: smallest ratio between two widths or two derivatives, in (0, 1).
    :param bool tails: whether the function continues as the identity outside :math:`[-B, B]`.
    :raises ValueError: if a setting is out of its range.

    Reference: Müller et al. 2019, "Neural Importance Sampling", with the tails of Durkan et al.
    2019, section 5.1.

    >>> spline = QuadraticSpline(bins=4, bound=3.0)
    >>> x = torch.linspace(-4.0, 4.0, 5)
    >>> y, log_slope = spline.forward(x, torch.randn(5, spline.num_parameters))
    """

    def __init__(
        self,
        bins: int = 8,
        bound: float = 3.0,
        *,
        min_ratio: float = 0.005,
        tails: bool = True,
    ) -> None:
        check_spline_settings(bins, bound, min_ratio)
        self.bins = bins
        self.bound = float(bound)
        self.min_ratio = float(min_ratio)
        self.tails = tails
        self.low, self.high = (-self.bound, self.bound) if tails else (0.0, 1.0)
        self.num_parameters = 2 * bins - 1 if tails else 2 * bins + 1

    def __repr__(self) -> str:
        return (
            f"QuadraticSpline(bins={self.bins}, bound={self.bound}, "
            f"min_ratio={self.min_ratio}, tails={self.tails})"
        )

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the spline; see :meth:`ElementwiseMap.forward`."""
        dtype = working_dtype(x)
        inside = x.to(dtype).clamp(self.low, self.high)
        left, bottom, width, slope_left, slope_right = self._find_bin(
            inside, parameters.to(dtype), search_values=False
        )
        xi = ((inside - left) / width).clamp(0.0, 1.0)
        bend = slope_right - slope_left
        value = bottom + width * xi * (slope_left + 0.5 * bend * xi)
        return self._with_tails(x, value, torch.log(slope_left + bend * xi))

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for x; see :meth:`ElementwiseMap.inverse`."""
        dtype = working_dtype(y)
        inside = y.to(dtype).clamp(self.low, self.high)
        left, bottom, width, slope_left, slope_right = self._find_bin(
            inside, parameters.to(dtype), search_values=True
        )
        bend = slope_right - slope_left
        rise = ((inside - bottom) / width).clamp_min(0.0)
        # The root that stays accurate when the bend vanishes. The square root is the slope at
        # the solution: it cannot be less than that at both knots.
        floor = torch.minimum(slope_left, slope_right).square()
        squared = slope_left.square() + 2.0 * bend * rise
        # Not `maximum`, which halves the gradient where both are equal, as in the identity.
        slope = torch.where(squared >= floor, squared, floor).sqrt()
        xi = (2.0 * rise / (slope_left + slope)).clamp(0.0, 1.0)
        log_slope = torch.log(slope_left + bend * xi)
        return self._with_tails(y, left + width * xi, -log_slope)

    def _with_tails(self, x: Tensor, value: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
        if self.tails:
            is_inside = (x >= self.low) & (x <= self.high)
            value = torch.where(is_inside, value, x.to(value.dtype))
            log_slope = torch.where(is_inside, log_slope, torch.zeros_like(log_slope))
        else:  # rounding must not leave the interval, where nothing is defined
            value = value.clamp(self.low, self.high)
        return value.to(x.dtype), log_slope.to(x.dtype)

    def _find_bin(
        self, x: Tensor, parameters: Tensor, *, search_values: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Left knot, its value, width, and derivatives at both knots, for every input."""
        K = self.bins
        length = self.high - self.low
        relative = bounded_positive(parameters, self.min_ratio)
        widths = relative[..., :K] / relative[..., :K].sum(-1, keepdim=True)
        slopes = self._scaled_slopes(widths, relative[..., K:])
        areas = 0.5 * widths * (slopes[..., 1:] + slopes[..., :-1])
        pieces = torch.stack([widths, areas], -2)
        ends = pieces.cumsum(-1)
        ends = ends / ends[..., -1:]
        searched = ends.detach()[..., int(search_values), :]
        u = ((x.detach() - self.low) / length).unsqueeze(-1).contiguous()
        searched = searched.expand(*x.shape, K).contiguous()
        k = torch.searchsorted(searched, u, right=True).clamp(max=K - 1)

        index = k[..., None, :].expand(*x.shape, 2, 1)
        width, area = pieces.expand(*x.shape, 2, K).gather(-1, index).squeeze(-1).unbind(-1)
        right, top = ends.expand(*x.shape, 2, K).gather(-1, index).squeeze(-1).unbind(-1)
        both = torch.cat([k, k + 1], -1)
        slope_left, slope_right = slopes.expand(*x.shape, K + 1).gather(-1, both).unbind(-1)
        left = (right - width) * length + self.low
        bottom = (top - area) * length + self.low
        return left, bottom, width * length, slope_left, slope_right

    def _scaled_slopes(self, widths: Tensor, slopes: Tensor) -> Tensor:
        """Scale the derivatives at the knots to an area of 1 below them, the outer ones to 1."""
        if not self.tails:
            area = (0.5 * widths * (slopes[..., 1:] + slopes[..., :-1])).sum(-1, keepdim=True)
            return slopes / area
        # The inner derivatives have to fill what ends of height 1 leave of the area.
        joined = widths[..., 1:] + widths[..., :-1]
        inner = 0.5 * (joined * slopes).sum(-1, keepdim=True)
        outer = 0.5 * (widths[..., :1] + widths[..., -1:])
        return F.pad(slopes * ((1.0 - outer) / inner), (1, 1), value=1.0)
