"""What estimators minimise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Batch", "contrast_with", "contrastive_loss"]


class Batch(NamedTuple):
    """Simulations as a loss sees them; one tensor when they are stored."""

    latents: Tensor
    """Unconstrained, shape ``(rows, features)``."""
    log_prior: Tensor
    """Log-density of the prior there, shape ``(rows,)``."""
    is_valid: Tensor
    """False where the simulator failed, shape ``(rows,)``."""
    is_prior: Tensor
    """Whether the latents are a draw from the prior, shape ``(rows,)``."""

    def pack(self) -> Tensor:
        """One tensor of shape ``(rows, features + 3)``."""
        others = [self.log_prior, self.is_valid, self.is_prior]
        return torch.cat([self.latents, *(v.to(self.latents)[:, None] for v in others)], -1)

    @staticmethod
    def unpack(packed: Tensor) -> Batch:
        """The inverse of :meth:`pack`."""
        latents, (log_prior, is_valid, is_prior) = packed[:, :-3], packed[:, -3:].unbind(-1)
        return Batch(latents, log_prior, is_valid > 0.5, is_prior > 0.5)


def contrast_with(num_rows: int, num_atoms: int, *, at_random: bool) -> Tensor:
    """
    For every row of a minibatch, which rows its observation is tried with.

    The first is the row itself. The others are K - 1 further rows without replacement: those at
    K - 1 random distances, the same for all rows. As minibatches are shuffled, the parameters of
    these rows are independent draws.

    :param int num_rows: rows B of the minibatch.
    :param int num_atoms: K; fewer where there are not as many rows.
    :param bool at_random: otherwise always the next ones, so that values can be compared.
    :returns: indices of rows, shape ``(B, K)``.
    """
    num_others = min(num_atoms, num_rows) - 1
    distances = torch.randperm(num_rows - 1) if at_random else torch.arange(num_rows - 1)
    distances = torch.cat([torch.zeros(1, dtype=torch.long), 1 + distances[:num_others]])
    return (torch.arange(num_rows)[:, None] + distances) % num_rows


def contrastive_loss(
    log_ratio: Callable[[Tensor, Tensor, Tensor], Tensor],
    batch: Batch,
    features: Tensor,
    index: Tensor,
) -> tuple[Tensor, Tensor]:
    r"""
    Mean of :math:`-\log \frac{\exp f(\theta_b, x_b)}{\sum_{k=1}^{K} \exp f(\theta_k, x_b)}`.

    Its minimum over all functions is :math:`f = \log p(x \mid \theta) + c(x)`, for any proposal
    that the parameters are drawn from. A failed simulation has no x to be asked about, but its
    parameters are among those to choose from: with contrasting parameters from the proposal
    :math:`\tilde p(\theta)`, not from :math:`\tilde p(\theta) \, P(\text{valid} \mid \theta)`,
    the density :math:`p(x \mid \theta)` includes the probability of not failing.

    Reference: Durkan, Murray and Papamakarios 2020, "On contrastive learning for likelihood-free
    inference", eq. 15 and algorithm 1.

    :param log_ratio: f of latents ``(n, K, d)``, their log prior ``(n, K)`` and features
        ``(n, 1, e)``; returns ``(n, K)``.
    :param Batch batch: simulations.
    :param Tensor features: of their observations, one row each.
    :param Tensor index: from :func:`contrast_with`.
    :returns: the loss, and f of the valid rows with their own latents, shape ``(n,)``.
    """
    index = index.to(batch.latents.device)[batch.is_valid]
    f = log_ratio(batch.latents[index], batch.log_prior[index], features[batch.is_valid][:, None])
    own = f[:, 0]
    losses = f.logsumexp(1) - own
    # without a valid row, zero with a graph
    return losses.sum() / max(len(losses), 1), own
