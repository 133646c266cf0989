"""The distribution of the latents of every row, as Pyro's objectives see it."""

from __future__ import annotations

from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from .networks import RowMap

__all__ = ["ConditionalPrior"]


class ConditionalPrior(TorchDistribution):
    r"""
    Noise that has gone through the network of its row, and the prior's location and scale.

    .. math:: z = l + s \odot \mathrm{Prior}_\psi(\epsilon), \qquad
        \log q(z) = \log q(\epsilon) - \log|\nabla \mathrm{Prior}_\psi(\epsilon)| - \sum \log s.

    The log-density of the latest draw is known from the pass that made it; only the very tensor
    that was drawn is recognised. Others are scored through the inverse.

    :param RowMap row_map: the network.
    :param Tensor psi: its parameters, shape ``(rows, num_parameters)``.
    :param TorchDistribution base: of the noise of one row, ``event_shape == (features,)``.
    :param Tensor loc: shape ``(rows, features)``.
    :param Tensor scale: shape ``(rows, features)``.
    :param torch.Size row_shape: batch shape, whose product is the number of rows.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        row_map: RowMap,
        psi: Tensor,
        base: TorchDistribution,
        loc: Tensor,
        scale: Tensor,
        row_shape: torch.Size,
    ) -> None:
        self.row_map = row_map
        self.psi = psi
        self.base = base
        self.loc = loc
        self.scale = scale
        self.row_shape = torch.Size(row_shape)
        self._latest: tuple[Tensor, Tensor, bool] | None = None
        super().__init__(self.row_shape, base.event_shape, validate_args=False)

    def expand(
        self,
        batch_shape: torch.Size | list[int] | tuple[int, ...],
        _instance: ConditionalPrior | None = None,
    ) -> ConditionalPrior:
        """Expand to further dimensions on the left, over which draws are independent."""
        batch_shape = torch.Size(batch_shape)
        if batch_shape[len(batch_shape) - len(self.row_shape) :] != self.row_shape:
            raise ValueError(
                f"A ConditionalPrior over rows of shape {tuple(self.row_shape)} cannot be "
                f"expanded to {tuple(batch_shape)}: every row has parameters of its own."
            )
        new = self._get_checked_instance(ConditionalPrior, _instance)
        for name in ("row_map", "psi", "base", "loc", "scale", "row_shape"):
            setattr(new, name, getattr(self, name))
        new._latest = None
        super(ConditionalPrior, new).__init__(batch_shape, self.event_shape, validate_args=False)
        return new

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draw with gradients to psi, shape ``sample_shape + batch_shape + (features,)``."""
        z, log_prob = self.rsample_and_log_prob(sample_shape)
        self._latest = (z, log_prob, torch.is_grad_enabled())
        return z

    def rsample_and_log_prob(
        self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """Draw, and score the draws in the same pass."""
        shape = torch.Size(sample_shape) + self.batch_shape
        noise = self.base.sample(shape).to(self.psi)
        z, log_det = self.row_map.to_latents(self._to_rows(noise), self.psi)
        z = self.loc[:, None] + self.scale[:, None] * z
        log_det = log_det + self.scale.log().sum(-1, keepdim=True)
        z = self._from_rows(z, shape + self.event_shape)
        return z, self.base.log_prob(noise) - self._from_rows(log_det, shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, by the inverse of the network unless it is that of the latest draw."""
        if self._latest is not None:
            z, log_prob, had_grad = self._latest
            if value is z and had_grad == torch.is_grad_enabled():
                return log_prob
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value = self._to_rows(value.expand(*shape, -1))
        standardized = (value - self.loc[:, None]) / self.scale[:, None]
        noise, log_det = self.row_map.to_noise(standardized, self.psi)
        log_det = log_det - self.scale.log().sum(-1, keepdim=True)
        log_prob = self.base.log_prob(noise)
        return self._from_rows(log_prob + log_det, shape)

    def _to_rows(self, value: Tensor) -> Tensor:
        """Rows first, then everything else: shape ``(rows, draws, features)``."""
        return value.reshape(-1, len(self.psi), value.shape[-1]).transpose(0, 1)

    def _from_rows(self, value: Tensor, shape: torch.Size) -> Tensor:
        return value.transpose(0, 1).reshape(shape)
