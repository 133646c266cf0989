"""Planar normalizing flows that are invertible whatever their parameters are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .row_map import RowMap

__all__ = ["PlanarMap"]

_LARGEST_COMPRESSION = 0.999
_BISECTIONS = 8
_NEWTON_STEPS = 40


class PlanarMap(RowMap):
    r"""
    :math:`h' = h + \hat u \tanh(w^\top h + b)`, one layer of a planar flow.

    It is invertible if and only if :math:`w^\top \hat u > -1`. Here that is so for all
    parameters, because

    .. math:: \hat u = \frac{u}{1 + \max(0, -w^\top u) / 0.999} \quad\Rightarrow\quad
        w^\top \hat u > -0.999,

    which every pair with that property can be written as, and which, unlike the usual
    correction along :math:`w / |w|^2`, is smooth at :math:`w = 0`. So
    :math:`\log|\det| = \log(1 + \tanh'(w^\top h + b)\, w^\top \hat u)` is never less than
    :math:`\log 0.001`.

    The inverse is the root of an increasing function of one variable, enclosed by a bracket.

    :param int features: number of latents d; psi has ``2 d + 1`` elements.

    Reference: Rezende and Mohamed 2015, eq. 10-12 and appendix A.1; Wu, Domke and Sanner 2022,
    eq. 8.
    """

    def __init__(self, features: int) -> None:
        super().__init__(features, 2 * features + 1)

    def initial(self, num_rows: int) -> Tensor:
        """
        Near the identity, with hinges through different parts of the noise.

        They are the same in all rows, so that a row does not depend on the others.
        """
        d = self.features
        w = torch.randn(d) / math.sqrt(d)
        return torch.cat([0.01 * torch.randn(d), w, torch.randn(1)]).expand(num_rows, -1).clone()

    def to_latents(self, noise: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`RowMap.to_latents`."""
        u, w, b, slope = self._parts(psi)
        hinge = (noise * w).sum(-1) + b
        bend = hinge.tanh()
        return noise + u * bend[..., None], torch.log1p(slope * (1 - bend.square()))

    def to_noise(self, latents: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`RowMap.to_noise`."""
        u, w, b, slope = self._parts(psi)
        hinge = _solve((latents * w).sum(-1) + b, slope)
        bend = hinge.tanh()
        return latents - u * bend[..., None], -torch.log1p(slope * (1 - bend.square()))

    def _parts(self, psi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u, w, b = psi[:, None].split([self.features, self.features, 1], -1)
        product = (u * w).sum(-1)
        shrink = 1.0 + (-product).clamp(min=0) / _LARGEST_COMPRESSION
        return u / shrink[..., None], w, b.squeeze(-1), product / shrink


def _solve(value: Tensor, slope: Tensor) -> Tensor:
    """The root x of ``x + slope tanh(x) = value``, where ``slope > -1``, with its gradient."""
    with torch.no_grad():
        size = slope.abs().expand(value.shape)
        low, high = value - size, value + size
        x = value.clone()
        for i in range(_BISECTIONS + _NEWTON_STEPS):
            residual = x + slope * x.tanh() - value
            low = torch.where(residual < 0, x, low)
            high = torch.where(residual > 0, x, high)
            newton = x - residual / (1 + slope * (1 - x.tanh().square()))
            is_inside = (newton > low) & (newton < high) & (i >= _BISECTIONS)
            x = torch.where(residual == 0, x, torch.where(is_inside, newton, 0.5 * (low + high)))
    # one step of Newton's method from the root has the gradient of the root
    bend = x.tanh()
    derivative = (1 + slope * (1 - bend.square())).detach()
    return x - (x + slope * bend - value) / derivative
