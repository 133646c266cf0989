"""The noise that is drawn once for a fit."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.quasirandom import SobolEngine

__all__ = ["Base", "base_distribution", "check_base", "fixed_noise"]

Base = str | TorchDistribution


def check_base(base: Base) -> None:
    """
    Check what noise a guide is to start from.

    :raises ValueError: if it is neither ``"normal"`` nor a distribution of numbers or vectors.
    """
    if base == "normal":
        return
    if not isinstance(base, TorchDistributionMixin):
        raise ValueError(f"base={base!r}: give 'normal' or a distribution of the noise.")
    if base.batch_shape or base.event_dim > 1:
        raise ValueError(
            f"base has batch shape {tuple(base.batch_shape)} and event shape "
            f"{tuple(base.event_shape)}. Give the distribution of one element of the noise, or of "
            "one vector of it: without a batch, and with at most one event dimension."
        )


def base_distribution(base: Base, features: int, like: Tensor) -> TorchDistribution:
    """
    The distribution of the noise of one row.

    :param base: ``"normal"``, or the distribution of an element or of the whole vector.
    :param int features: number of latents.
    :param Tensor like: has the dtype and the device to use for ``"normal"``.
    :raises ValueError: if the distribution is of vectors of another size.
    """
    if isinstance(base, str):
        return dist.Normal(like.new_zeros(features), like.new_ones(features)).to_event(1)
    if base.event_dim == 0:
        return base.expand([features]).to_event(1)
    if base.event_shape != (features,):
        raise ValueError(
            f"base is a distribution of {base.event_shape[0]} numbers, but a row of the model has "
            f"{features} latents."
        )
    return base


def fixed_noise(base: Base, num: int, features: int, like: Tensor) -> Tensor:
    r"""
    Noise that an objective is averaged over, and that is kept while it is optimized.

    Standard normal noise comes from a scrambled Sobol sequence, is centred, and is multiplied by
    a matrix so that its second moments are exactly 1 and 0. Averages over it are then much
    closer to expectations than over independent draws, and exact for polynomials of second
    order: a Gaussian posterior is found without any error of sampling.

    :param base: as for :func:`base_distribution`.
    :param int num: number of draws, more than ``features``.
    :param int features: number of latents.
    :param Tensor like: has the dtype and the device to use.
    :returns: shape ``(num, features)``.
    """
    if not isinstance(base, str):
        return base_distribution(base, features, like).sample([num]).to(like)
    seed = int(torch.randint(2**31 - 1, ()))
    uniform = SobolEngine(features, scramble=True, seed=seed).draw(num, dtype=torch.float64)
    # the sequence has 30 bits, so that 0 can occur
    noise = torch.special.ndtri(uniform.clamp(min=2.0**-31, max=1 - 2.0**-31))
    noise = noise - noise.mean(0)
    factor = torch.linalg.cholesky(noise.mT @ noise / num)
    return torch.linalg.solve_triangular(factor, noise.mT, upper=False).mT.to(like)
