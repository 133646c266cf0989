r"""Draws by the reverse stochastic differential equation.

.. math:: dx = \left( f(t) \, x - g(t)^2 s(x, t) \right) dt + g(t) \, d\bar w

(Song, Durkan, Murray and Ermon 2021, eq. 5), from T down to :math:`\epsilon`, in steps of equal
length on the natural scale of the diffusion.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .score import Score, check_finite, column, row_numbers
from .sde import SDE

__all__ = ["SDE_METHODS", "reverse_sde"]

SDE_METHODS = ("euler_maruyama", "predictor_corrector")


def reverse_sde(
    score: Score,
    sde: SDE,
    x: Tensor,
    *,
    num_steps: int,
    num_corrections: int,
    correction_size: float,
    denoise: bool,
) -> Tensor:
    r"""
    Carry noise to data along the reverse diffusion.

    A step of Euler and Maruyama over :math:`\Delta u` changes time by :math:`\Delta t` and is

    .. math:: x \leftarrow x - (f x - g^2 s) \Delta t + g \sqrt{\Delta t} \, \xi .

    A correction is a step of Langevin's equation at the time that was reached, of the size
    :math:`\delta = r^2 \sigma^2` (Song et al. 2021, algorithms 4 and 5, whose size depends on
    norms over the batch; this one keeps rows independent):

    .. math:: x \leftarrow x + \delta \, s + \sqrt{2 \delta} \, \xi .

    :param Score score: the score.
    :param SDE sde: the diffusion.
    :param Tensor x: draws of the prior, shape ``(n,) + event_shape``.
    :param int num_steps: steps of Euler and Maruyama.
    :param int num_corrections: corrections after each.
    :param float correction_size: r.
    :param bool denoise: whether to end with the expectation of the data given
        :math:`x_\epsilon`, by Tweedie's formula, instead of :math:`x_\epsilon`.
    :returns: shape ``(n,) + event_shape``.
    :raises ValueError: if scores are NaN or infinite; the message names the time.
    """
    rows = row_numbers(x)
    grid = sde.time(torch.linspace(1, 0, num_steps + 1, dtype=x.dtype, device=x.device))

    def evaluated(x: Tensor, t: Tensor) -> Tensor:
        times = t.expand(len(x))
        found = score(x, times, rows)
        check_finite(found, times)
        return found

    for t, earlier in pairwise(grid):
        length = t - earlier
        diffusion = sde.diffusion(t)
        drift = sde.drift_rate(t) * x - diffusion.square() * evaluated(x, t)
        x = x - drift * length + diffusion * length.sqrt() * torch.randn_like(x)
        for _ in range(num_corrections):
            size = (correction_size * sde.std(earlier)).square()
            noise = torch.randn_like(x)
            x = x + size * evaluated(x, earlier) + (2 * size).sqrt() * noise
    if not denoise:
        return x
    return denoised(sde, x, grid[-1:], evaluated(x, grid[-1]))


def denoised(sde: SDE, x: Tensor, t: Tensor, score: Tensor) -> Tensor:
    r"""
    Expectation of the data given noisy ones, :math:`(x_t + \sigma^2 s) / a` (Tweedie's formula).

    :param SDE sde: the diffusion.
    :param Tensor x: noisy data, shape ``(n,) + event_shape``.
    :param Tensor t: their times, shape ``(n,)`` or ``(1,)``.
    :param Tensor score: the score there, shape ``(n,) + event_shape``.
    :returns: shape ``(n,) + event_shape``.
    """
    return (x + column(sde.std(t).square(), x) * score) / column(sde.mean_factor(t), x)
