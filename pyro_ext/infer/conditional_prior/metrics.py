"""Measures of completed data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["average_ssim", "average_standard_deviation", "log_mean_exp"]


def log_mean_exp(values: Tensor, dim: int = 0) -> Tensor:
    r"""
    :math:`\log \frac1M \sum_m e^{v_m}`, with which a query is scored from M draws of the latents.

    :param Tensor values: log-densities :math:`\log p(y \mid z_m)`.
    :param int dim: the dimension of the draws.

    Reference: Wu, Domke and Sanner 2022, section 4.3, "Query Marginal Likelihood".
    """
    return values.logsumexp(dim) - math.log(values.shape[dim])


def average_ssim(
    completed: Tensor, original: Tensor, *, data_range: float = 1.0, window: int = 7
) -> Tensor:
    r"""
    :math:`\frac1N \sum_i \mathrm{SSIM}(s_i, o)` of completed images and the original.

    The structural similarity is scikit-image's, with a uniform window.

    :param Tensor completed: draws, shape ``(num_draws,) + batch_shape + (height, width)``.
    :param Tensor original: shape ``batch_shape + (height, width)``.
    :param float data_range: difference of the largest and the smallest possible value.
    :param int window: odd width of the window.
    :returns: shape ``batch_shape``.
    :raises ImportError: without scikit-image.
    :raises ValueError: if the shapes differ, or the window does not fit the images.

    Reference: Wang, Bovik, Sheikh and Simoncelli 2004, eq. 13; Wu, Domke and Sanner 2022,
    section 4.3.

    >>> from pyro_ext.infer.conditional_prior.metrics import average_ssim
    >>> images = torch.rand(3, 8, 8)
    >>> average_ssim(images.expand(5, 3, 8, 8), images)
    tensor([1., 1., 1.])
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError("average_ssim needs scikit-image: pip install scikit-image.") from error

    if completed.shape[1:] != original.shape:
        raise ValueError(
            f"completed has shape {tuple(completed.shape)}, which is not (num_draws,) + "
            f"{tuple(original.shape)}, the shape of the original."
        )
    *batch_shape, height, width = original.shape
    if window % 2 == 0 or window < 3 or window > min(height, width):
        raise ValueError(
            f"window={window} does not fit images of {height} x {width}: give an odd number of at "
            f"least 3 and at most {min(height, width)}."
        )
    draws = completed.reshape(len(completed), -1, height, width).transpose(0, 1).cpu()
    images = original.reshape(-1, 1, height, width).expand(draws.shape).cpu()
    # the draws of an image are its channels, over which scikit-image takes the mean
    settings = {"win_size": window, "data_range": data_range, "channel_axis": 0}
    values = [
        structural_similarity(a.numpy(), b.numpy(), **settings)
        for a, b in zip(draws, images, strict=True)
    ]
    return torch.tensor(values).to(original).reshape(batch_shape)


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
