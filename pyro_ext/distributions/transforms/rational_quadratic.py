"""Monotonic rational-quadratic splines."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .elementwise import ElementwiseMap
from .knots import bounded_exp, check_spline_settings, working_dtype

__all__ = ["RationalQuadraticSpline"]


class _Bin(NamedTuple):
    """The piece of a spline that an input falls into."""

    left: Tensor
    """Position of the left knot, x_k in the paper."""
    bottom: Tensor
    """Value of the left knot, y_k in the paper."""
    width: Tensor
    height: Tensor
    slope: Tensor
    """Height over width, s_k in the paper."""
    left_ratio: Tensor
    """Derivative at the left knot over the slope of the bin."""
    right_ratio: Tensor
    """Derivative at the right knot over the slope of the bin."""


class RationalQuadraticSpline(ElementwiseMap):
    r"""
    A monotonic spline of rational-quadratic pieces on an interval.

    With knots :math:`(x_k, y_k)`, derivatives :math:`\delta_k` at the knots,
    :math:`s_k = (y_{k+1} - y_k) / (x_{k+1} - x_k)` and :math:`\xi = (x - x_k)/(x_{k+1} - x_k)`,

    .. math:: g(x) = y_k + \frac{(y_{k+1} - y_k)[s_k\xi^2 + \delta_k\xi(1-\xi)]}
        {s_k + [\delta_{k+1} + \delta_k - 2 s_k]\xi(1-\xi)}.

    Outside the interval :math:`[-B, B]` the function is the identity, and the derivatives at both
    ends are 1. With ``tails=False`` the interval is :math:`[0, 1]`, the ends have derivatives of
    their own, and inputs outside it are an error of the caller (they are clamped).

    The parameters of one function are ``bins`` log widths, ``bins`` log heights, and a log
    derivative for each inner knot (for every knot with ``tails=False``). They differ from the
    paper's in three ways, because with a softmax and a softplus one large parameter is enough to
    make the inverse useless in single precision:

    * all of them are bounded smoothly, :math:`\theta / (1 + |\theta| / c)` with
      :math:`c = -\tfrac12 \log` ``min_ratio``, so that no width, height or relative derivative
      is less than ``min_ratio`` of the largest possible one;
    * a derivative is given relative to the harmonic mean of the slopes of the two bins it joins
      (Fritsch and Butland 1984 choose derivatives of monotone interpolants so), which keeps both
      pieces well conditioned however much the bins differ;
    * zeros give the identity.

    :param int bins: number of pieces K, at least 2.
    :param float bound: half the length B of the interval.
    :param float min_ratio: smallest ratio between two widths, two heights or two relative
        derivatives, in (0, 1).
    :param bool tails: whether the function continues as the identity outside :math:`[-B, B]`.
    :raises ValueError: if a setting is out of its range.

    Reference: Durkan, Bekasov, Murray and Papamakarios 2019, "Neural Spline Flows", eq. 4-8 and
    appendix A; Gregory and Delbourgo 1982.

    >>> spline = RationalQuadraticSpline(bins=4, bound=3.0)
    >>> x = torch.linspace(-4.0, 4.0, 5)
    >>> y, log_slope = spline.forward(x, torch.randn(5, spline.num_parameters))
    >>> spline.inverse(y, torch.zeros(spline.num_parameters))[0].allclose(y)
    True
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
        self.num_parameters = 3 * bins - 1 if tails else 3 * bins + 1

    def __repr__(self) -> str:
        return (
            f"RationalQuadraticSpline(bins={self.bins}, bound={self.bound}, "
            f"min_ratio={self.min_ratio}, tails={self.tails})"
        )

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate eq. 4 and the logarithm of eq. 5; see :meth:`ElementwiseMap.forward`."""
        dtype = working_dtype(x)
        # Clamped first, so that no branch that is not selected sees a value it cannot take.
        inside = x.to(dtype).clamp(self.low, self.high)
        piece = self._find_bin(inside, parameters.to(dtype), search_values=False)
        xi = ((inside - piece.left) / piece.width).clamp(0.0, 1.0)
        curve = xi * (1.0 - xi)
        denominator = 1.0 + (piece.left_ratio + piece.right_ratio - 2.0) * curve
        value = piece.bottom + piece.height * (xi * xi + piece.left_ratio * curve) / denominator
        return self._with_tails(x, value, self._log_slope(piece, xi, curve, denominator))

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Solve eq. 4 for x by eq. 6-8 and 29; see :meth:`ElementwiseMap.inverse`."""
        dtype = working_dtype(y)
        inside = y.to(dtype).clamp(self.low, self.high)
        piece = self._find_bin(inside, parameters.to(dtype), search_values=True)
        eta = ((inside - piece.bottom) / piece.height).clamp(0.0, 1.0)
        # Equations 6-8, divided by the height and the slope of the bin.
        bend = piece.left_ratio + piece.right_ratio - 2.0
        b = piece.left_ratio - eta * bend
        a = 1.0 - b
        # Positive in exact arithmetic, because the derivative is; rounding must not spoil that.
        discriminant = (b * b + 4.0 * a * eta).clamp_min(torch.finfo(dtype).tiny)
        xi = (2.0 * eta / (b + discriminant.sqrt())).clamp(0.0, 1.0)
        curve = xi * (1.0 - xi)
        log_slope = self._log_slope(piece, xi, curve, 1.0 + bend * curve)
        return self._with_tails(y, piece.left + piece.width * xi, -log_slope)

    def _with_tails(self, x: Tensor, value: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
        if self.tails:
            is_inside = (x >= self.low) & (x <= self.high)
            value = torch.where(is_inside, value, x.to(value.dtype))
            log_slope = torch.where(is_inside, log_slope, torch.zeros_like(log_slope))
        return value.to(x.dtype), log_slope.to(x.dtype)

    @staticmethod
    def _log_slope(piece: _Bin, xi: Tensor, curve: Tensor, denominator: Tensor) -> Tensor:
        left = piece.left_ratio * (1.0 - xi).square()
        numerator = piece.right_ratio * xi.square() + 2.0 * curve + left
        return torch.log(piece.slope * numerator / denominator.square())

    def _find_bin(self, x: Tensor, parameters: Tensor, *, search_values: bool) -> _Bin:
        """Find the bin of every input by binary search, and what describes the spline there."""
        K = self.bins
        relative = bounded_exp(parameters, self.min_ratio)
        ends = relative[..., : 2 * K].unflatten(-1, (2, K)).cumsum(-1)
        # The search needs no gradient, and scales the inputs instead of all the knots.
        searched = ends.detach()[..., int(search_values), :]
        u = (x.detach() - self.low) * (searched[..., -1] / (self.high - self.low))
        searched = searched.expand(*u.shape, K).contiguous()
        k = torch.searchsorted(searched, u[..., None], right=True).clamp_(max=K - 1)
        return self._describe_bin(relative, ends, k)

    def _describe_bin(self, relative: Tensor, ends: Tensor, k: Tensor) -> _Bin:
        K = self.bins
        batch_shape = k.shape[:-1]
        first = 2 * K - 1 if self.tails else 2 * K
        # Widths and heights of the bin before, this one and the one after; derivatives left and
        # right. Beyond the ends something else is read, always positive, and replaced below.
        offsets = torch.tensor([-1, 0, 1, K - 1, K, K + 1, first, first + 1], device=k.device)
        index = (k + offsets).clamp_(0, self.num_parameters - 1)
        picked = relative.expand(*batch_shape, -1).gather(-1, index)
        w_before, w, w_after, h_before, h, h_after, rho_left, rho_right = picked.unbind(-1)
        length, rise = ends[..., -1].unbind(-1)
        index = torch.stack([k, k + K], -1).flatten(-2)
        right, top = ends.flatten(-2).expand(*batch_shape, -1).gather(-1, index).unbind(-1)

        x_unit, y_unit = (self.high - self.low) / length, (self.high - self.low) / rise
        width, height = w * x_unit, h * y_unit
        left, bottom = (right - w) * x_unit + self.low, (top - h) * y_unit + self.low
        slope = height / width
        left_ratio = 2.0 * rho_left / (1.0 + (h * w_before) / (w * h_before))
        right_ratio = 2.0 * rho_right / (1.0 + (h * w_after) / (w * h_after))
        at_left, at_right = (slope.reciprocal(),) * 2 if self.tails else (rho_left, rho_right)
        k = k.squeeze(-1)
        left_ratio = torch.where(k == 0, at_left, left_ratio)
        right_ratio = torch.where(k == K - 1, at_right, right_ratio)
        return _Bin(left, bottom, width, height, slope, left_ratio, right_ratio)
