"""What the splines share: bounded positive parameters, and checks of their settings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "bounded_positive",
    "bounded_positive_log_slope",
    "check_min_ratio",
    "check_spline_settings",
    "working_dtype",
]


def bounded_positive(parameters: Tensor, min_ratio: float) -> Tensor:
    r"""
    Positive numbers of which no two differ by more than a given ratio.

    .. math:: f(\theta) = \frac{t + \theta}{t - \theta}, \qquad t = 2 + |\theta| / b, \qquad
        b = \frac{1 - \sqrt{r}}{1 + \sqrt{r}}.

    Near zero this is an exponential, and like one it satisfies :math:`f(-\theta) = 1/f(\theta)`;
    far away it tends to :math:`r^{\mp 1/2}`. Its gradient falls with the square of
    :math:`\theta`, not exponentially, so that parameters that have wandered off can return.

    :param Tensor parameters: any real numbers.
    :param float min_ratio: the smallest ratio r of two results, in (0, 1).
    :returns: positive numbers of the same shape.
    """
    b = _limit(min_ratio)
    theta = parameters * (
        0.5 * b
    )  # half of everything: the largest finite number does not overflow
    t = theta.abs().div_(b).add_(b)
    return (t + theta).div_(t - theta)


def bounded_positive_log_slope(parameters: Tensor, min_ratio: float) -> Tensor:
    r"""
    The derivative of the logarithm of :func:`bounded_positive`, :math:`4 / (t^2 - \theta^2)`.

    :param Tensor parameters: any real numbers.
    :param float min_ratio: r there, in (0, 1).
    :returns: numbers in (0, 1], of the same shape.
    """
    b = _limit(min_ratio)
    size = parameters.abs()
    # (t^2 - theta^2) / 4 as a polynomial, which may overflow to infinity, but never to NaN
    return (size * (0.25 / b**2 - 0.25)).add_(1.0 / b).mul_(size).add_(1.0).reciprocal_()


def _limit(min_ratio: float) -> float:
    root = math.sqrt(min_ratio)
    return (1.0 - root) / (1.0 + root)


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
