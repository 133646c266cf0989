"""Affine and additive maps of one variable: what coupling layers did before splines."""

from __future__ import annotations

import torch
from torch import Tensor

from .elementwise import ElementwiseMap
from .knots import bounded_positive, check_min_ratio

__all__ = ["Additive", "Affine"]


class Affine(ElementwiseMap):
    r"""
    :math:`g(x) = \alpha x + \beta` with :math:`\alpha > 0`.

    The two parameters are the bounded logarithm of :math:`\alpha` and :math:`\beta`; zeros give
    the identity.

    :param float min_ratio: smallest ratio between two scales, in (0, 1): the scale lies between
        its square root and the inverse of that.
    :raises ValueError: if the ratio is out of its range.

    Reference: Dinh, Sohl-Dickstein and Bengio 2017, "Density estimation using Real NVP".

    >>> y, log_slope = Affine().forward(torch.ones(3), torch.zeros(3, 2))
    """

    num_parameters = 2

    def __init__(self, min_ratio: float = 1e-6) -> None:
        check_min_ratio(min_ratio)
        self.min_ratio = float(min_ratio)

    def __repr__(self) -> str:
        return f"Affine(min_ratio={self.min_ratio})"

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the line; see :meth:`ElementwiseMap.forward`."""
        scale = bounded_positive(parameters[..., 0], self.min_ratio)
        return scale * x + parameters[..., 1], scale.log().expand(x.shape)

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for x; see :meth:`ElementwiseMap.inverse`."""
        scale = bounded_positive(parameters[..., 0], self.min_ratio)
        return (y - parameters[..., 1]) / scale, -scale.log().expand(y.shape)


class Additive(ElementwiseMap):
    r"""
    :math:`g(x) = x + \beta`, which keeps volumes.

    Reference: Dinh, Krueger and Bengio 2015, "NICE".

    >>> y, log_slope = Additive().forward(torch.ones(3), torch.zeros(3, 1))
    """

    num_parameters = 1

    def __repr__(self) -> str:
        return "Additive()"

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Add the shift; see :meth:`ElementwiseMap.forward`."""
        return x + parameters[..., 0], torch.zeros_like(x)

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Subtract the shift; see :meth:`ElementwiseMap.inverse`."""
        return y - parameters[..., 0], torch.zeros_like(y)
