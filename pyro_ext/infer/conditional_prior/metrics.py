"""Measures of completed data."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["average_ssim", "average_standard_deviation", "log_mean_exp", "ssim"]


def log_mean_exp(values: Tensor, dim: int = 0) -> Tensor:
    r"""
    :math:`\log \frac1M \sum_m e^{v_m}`, with which a query is scored from M draws of the latents.

    :param Tensor values: log-densities :math:`\log p(y \mid z_m)`.
    :param int dim: the dimension of the draws.

    Reference: Wu, Domke and Sanner 2022, section 4.3, "Query Marginal Likelihood".
    """
    return values.logsumexp(dim) - math.log(values.shape[dim])


def ssim(image: Tensor, other: Tensor, *, data_range: float = 1.0, window: int = 7) -> Tensor:
    r"""
    Structural similarity of images, the mean over all places of a square window.

    .. math:: \frac{(2 \mu_x \mu_y + C_1)(2 \sigma_{xy} + C_2)}
        {(\mu_x^2 + \mu_y^2 + C_1)(\sigma_x^2 + \sigma_y^2 + C_2)}, \qquad
        C_1 = (0.01 L)^2, \quad C_2 = (0.03 L)^2.

    The same as ``skimage.metrics.structural_similarity`` with its defaults (uniform window,
    sample covariances, only places where the whole window is in the image), for whole batches.

    :param Tensor image: shape ``batch_shape + (height, width)``.
    :param Tensor other: the same, or broadcastable to it.
    :param float data_range: difference L of the largest and the smallest possible value.
    :param int window: odd width of the window.
    :returns: shape ``batch_shape``.
    :raises ValueError: if the window is even or larger than the image.

    Reference: Wang, Bovik, Sheikh and Simoncelli 2004, eq. 13.

    >>> from pyro_ext.infer.conditional_prior.metrics import ssim
    >>> image = torch.rand(8, 8)
    >>> float(ssim(image, image))
    1.0
    """
    image, other = torch.broadcast_tensors(image, other)
    height, width = image.shape[-2:]
    if window % 2 == 0 or window < 3 or window > min(height, width):
        raise ValueError(
            f"window={window} does not fit images of {height} x {width}: give an odd number of at "
            f"least 3 and at most {min(height, width)}."
        )
    batch_shape = image.shape[:-2]
    x, y = (v.reshape(-1, 1, height, width) for v in (image, other))

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, window, stride=1)

    n = window**2
    mean_x, mean_y = mean(x), mean(y)
    unbiased = n / (n - 1)
    var_x = unbiased * (mean(x * x) - mean_x * mean_x)
    var_y = unbiased * (mean(y * y) - mean_y * mean_y)
    cov = unbiased * (mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    denominator = (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    return (numerator / denominator).mean((-3, -2, -1)).reshape(batch_shape)


def average_ssim(
    completed: Tensor, original: Tensor, *, data_range: float = 1.0, window: int = 7
) -> Tensor:
    r"""
    :math:`\frac1N \sum_i \mathrm{SSIM}(s_i, o)` of completed images and the original.

    :param Tensor completed: draws, shape ``(num_draws,) + batch_shape + (height, width)``.
    :param Tensor original: shape ``batch_shape + (height, width)``.
    :param float data_range: as for :func:`ssim`.
    :param int window: as for :func:`ssim`.
    :returns: shape ``batch_shape``.

    Reference: Wu, Domke and Sanner 2022, section 4.3.
    """
    return ssim(completed, original, data_range=data_range, window=window).mean(0)


def average_standard_deviation(completed: Tensor, event_dim: int = 1) -> Tensor:
    """
    Standard deviation over draws, averaged over the elements of an event.

    :param Tensor completed: draws, shape ``(num_draws,) + batch_shape + event_shape``.
    :param int event_dim: dimensions of an event: 1 for vectors, 2 for images.
    :returns: shape ``batch_shape``.

    Reference: Wu, Domke and Sanner 2022, section 4.3.
    """
    deviation = completed.to(torch.get_default_dtype()).std(0)
    return deviation.flatten(deviation.dim() - event_dim).mean(-1) if event_dim else deviation
