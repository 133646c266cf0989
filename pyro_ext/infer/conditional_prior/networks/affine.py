"""Gaussian variational inference: an affine map, whose determinant cannot fail."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .row_map import RowMap

__all__ = ["AffineMap"]

_MAX_LOG_SCALE = 25.0


class AffineMap(RowMap):
    r"""
    :math:`z = W \epsilon + b` with a lower triangular :math:`W`.

    Every Gaussian has such a factor. The logarithm of an element of the diagonal is

    .. math:: \log W_{ii} = \frac{\theta_i}{1 + |\theta_i| / 25},

    so that it is between -25 and 25 whatever an optimizer tries, and :math:`\log|\det W|` is
    their sum: no determinant is computed, and none can overflow, vanish or change its sign.

    :param int features: number of latents d; psi has ``d (d + 3) / 2`` elements.

    Reference: Wu, Domke and Sanner 2022, eq. 7.
    """

    def __init__(self, features: int) -> None:
        below = features * (features - 1) // 2
        super().__init__(features, 2 * features + below)
        self._rows, self._columns = torch.tril_indices(features, features, -1).tolist()

    def initial(self, num_rows: int) -> Tensor:
        """The identity."""
        return torch.zeros(num_rows, self.num_parameters)

    def to_latents(self, noise: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`RowMap.to_latents`."""
        loc, log_scale, factor = self._parts(psi)
        latents = torch.baddbmm(loc[:, None], noise, factor.mT)
        return latents, log_scale.sum(-1, keepdim=True).expand(noise.shape[:-1])

    def to_noise(self, latents: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`RowMap.to_noise`."""
        loc, log_scale, factor = self._parts(psi)
        centred = (latents - loc[:, None]).mT
        noise = torch.linalg.solve_triangular(factor, centred, upper=False).mT
        return noise, -log_scale.sum(-1, keepdim=True).expand(latents.shape[:-1])

    def affine_end(self) -> RowMap:
        """See :meth:`RowMap.affine_end`."""
        return self

    def centred(self, loc: Tensor, scale: float) -> Tensor:
        """See :meth:`RowMap.centred`."""
        log_scale = math.log(scale)
        theta = log_scale / (1 - abs(log_scale) / _MAX_LOG_SCALE)
        below = loc.new_zeros(len(loc), self.num_parameters - 2 * self.features)
        return torch.cat([loc, torch.full_like(loc, theta), below], -1)

    def _parts(self, psi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = self.features
        loc, theta, below = psi.split([d, d, self.num_parameters - 2 * d], -1)
        log_scale = theta / (1.0 + theta.abs() / _MAX_LOG_SCALE)
        factor = torch.diag_embed(log_scale.exp())
        if self._rows:
            off_diagonal = torch.zeros_like(factor)
            off_diagonal[:, self._rows, self._columns] = below
            factor = factor + off_diagonal
        return loc, log_scale, factor
