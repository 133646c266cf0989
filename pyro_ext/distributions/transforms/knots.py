"""What the splines share: bounded parameters, and checks of their settings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "bounded",
    "bounded_exp",
    "bounded_slope",
    "check_min_ratio",
    "check_spline_settings",
    "working_dtype",
]


def bounded(parameters: Tensor, min_ratio: float) -> Tensor:
    """
    The logarithm of :func:`bounded_exp`.

    :param Tensor parameters: any real numbers.
    :param float min_ratio: r there, in (0, 1).
    :returns: numbers of the same shape, of absolute value below ``-log(min_ratio) / 2``.
    """
    return parameters / (1.0 + parameters.abs() / _limit(min_ratio))


def _limit(min_ratio: float) -> float:
    return -0.5 * math.log(min_ratio)


def bounded_exp(parameters: Tensor, min_ratio: float) -> Tensor:
    r"""
    Positive numbers of which no two differ by more than a given ratio.

    :math:`\exp(\theta / (1 + |\theta| / c))` with :math:`c = -\tfrac12\log r`: near zero an
    exponential, in the limit :math:`r^{\pm 1/2}`. The gradient falls with the square of
    :math:`\theta`, not exponentially, so that parameters that have wandered off can return.

    :param Tensor parameters: any real numbers.
    :param float min_ratio: the smallest ratio r of two results, in (0, 1).
    :returns: positive numbers of the same shape.
    """
    return torch.exp(bounded(parameters, min_ratio))


def bounded_slope(parameters: Tensor, min_ratio: float) -> Tensor:
    """
    The derivative of :func:`bounded`.

    :param Tensor parameters: any real numbers.
    :param float min_ratio: r there, in (0, 1).
    :returns: numbers in (0, 1], of the same shape.
    """
    return (1.0 + parameters.abs() / _limit(min_ratio)).pow(-2)


def working_dtype(x: Tensor) -> torch.dtype:
    """Precision to compute splines in: at least float32, where half precision has no room."""
    return torch.promote_types(x.dtype, torch.float32)


def check_spline_settings(bins: int, bound: float, min_ratio: float) -> None:
    """
    Check the settings of a spline.

    :raises ValueError: if there are fewer than two bins, or a number is out of its range.
    """
    if not isinstance(bins, int) or bins < 2:
        raise ValueError(
            f"bins={bins!r}: a spline needs at least 2 bins (with one it is the identity)."
        )
    if not (math.isfinite(bound) and bound > 0):
        raise ValueError(f"bound={bound!r}: the spline acts on [-bound, bound]; give bound > 0.")
    check_min_ratio(min_ratio)


def check_min_ratio(min_ratio: float) -> None:
    """
    Check the bound on the parameters.

    :raises ValueError: if it is not in (0, 1).
    """
    if not 0 < min_ratio < 1:
        raise ValueError(
            f"min_ratio={min_ratio!r} is the smallest ratio of two widths, heights or scales; "
            "give one in (0, 1)."
        )
