"""Monotonic rational-quadratic splines."""

from __future__ import annotations

import torch
from torch import Tensor

from .elementwise import ElementwiseMap
from .knots import check_spline_settings, working_dtype
from .rational_quadratic_gradient import SplineWithGradient
from .rational_quadratic_pieces import SplineSettings, spline

__all__ = ["RationalQuadraticSpline"]


class RationalQuadraticSpline(ElementwiseMap):
    r"""
    A monotonic spline of rational-quadratic pieces on an interval.

    With knots :math:`(x_k, y_k)`, derivatives :math:`\delta_k` at the knots,
    :math:`s_k = (y_{k+1} - y_k) / (x_{k+1} - x_k)` and :math:`\xi = (x - x_k)/(x_{k+1} - x_k)`,

    .. math:: g(x) = y_k + \frac{(y_{k+1} - y_k)[s_k\xi^2 + \delta_k\xi(1-\xi)]}
        {s_k + [\delta_{k+1} + \delta_k - 2 s_k]\xi(1-\xi)}.

    Outside the interval :math:`[-B, B]` the function is the identity, and the derivatives at both
    ends are 1. With ``tails=False`` the interval is :math:`[0, 1]`, the ends have derivatives of
    their own, and what lies outside is moved to the nearer end.

    The parameters of one function are ``bins`` log widths, ``bins`` log heights, and a log
    derivative for each inner knot (for every knot with ``tails=False``). They differ from the
    paper's in three ways, because with a softmax and a softplus one large parameter is enough to
    make the inverse useless in single precision:

    * all of them are bounded smoothly, :math:`(t + \theta) / (t - \theta)` with
      :math:`t = 2 + |\theta| / b` in the place of an exponential, where
      :math:`b = (1 - \sqrt r) / (1 + \sqrt r)` and r is ``min_ratio``: no width, height or
      relative derivative is less than ``min_ratio`` of the largest possible one;
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

    >>> from pyro_ext.distributions.transforms import RationalQuadraticSpline
    >>> spline = RationalQuadraticSpline(bins=4, bound=3.0)
    >>> x = torch.linspace(-4.0, 4.0, 5)
    >>> parameters = torch.randn(5, spline.num_parameters)
    >>> y, log_slope = spline.forward(x, parameters)
    >>> torch.testing.assert_close(spline.inverse(y, parameters)[0], x)
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
        self.num_parameters = 3 * bins - 1 if tails else 3 * bins + 1

    def __repr__(self) -> str:
        return (
            f"RationalQuadraticSpline(bins={self.bins}, bound={self.bound}, "
            f"min_ratio={self.min_ratio}, tails={self.tails})"
        )

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate eq. 4 and the logarithm of eq. 5; see :meth:`ElementwiseMap.forward`."""
        return self._evaluate(x, parameters, is_inverse=False)

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Solve eq. 4 for x by eq. 6-8 and 29; see :meth:`ElementwiseMap.inverse`."""
        return self._evaluate(y, parameters, is_inverse=True)

    def _evaluate(
        self, x: Tensor, parameters: Tensor, *, is_inverse: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = working_dtype(x)
        low, high = (-self.bound, self.bound) if self.tails else (0.0, 1.0)
        settings = SplineSettings(self.bins, low, high, self.min_ratio, self.tails, is_inverse)
        x_working, parameters = x.to(dtype), parameters.to(dtype)
        if _profits_from_gradient_in_closed_form(x, parameters):
            value, log_slope, *_ = SplineWithGradient.apply(x_working, parameters, settings)
        else:
            value, log_slope, _ = spline(x_working, parameters, settings)
        if not self.tails:  # rounding must not leave the interval, where nothing is defined
            value = value.clamp(low, high)
        return value.to(x.dtype), log_slope.to(x.dtype)


def _profits_from_gradient_in_closed_form(x: Tensor, parameters: Tensor) -> bool:
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or parameters.requires_grad)
    # The compiler fuses the plain formulas, and functional transforms may be nested to any depth,
    # which they differentiate better than a function with a gradient of its own. torch has no
    # public name for the second question, which its own autograd functions ask in the same way.
    is_transformed = torch._C._are_functorch_transforms_active()
    return needs_gradient and not (is_transformed or torch.compiler.is_compiling())
