"""One-dimensional densities with an energy: what an energy machine is a product of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .proposals import Proposal, broad_log_prob

__all__ = ["Conditionals"]

_ROWS_AT_ONCE = 2048  # through the energy network, so that they stay in a core's own cache


@dataclass(frozen=True)
class Conditionals:
    r"""
    The densities of ``n`` numbers, in standardised coordinates, up to their normalisers.

    .. math:: p_i(x) = \frac{r_i(x) \, e^{u(x; \gamma_i)}}{Z_i}, \qquad
        Z_i = \int r_i(x) \, e^{u(x; \gamma_i)} dx = E_{q_i} \frac{r_i e^u}{q_i}

    The reference r is a normalised density: the proposal q itself, or the broad component of it.
    With u between -B and 0 the integral exists, and the weights :math:`r e^u / q` are bounded.

    :param nn.Module energy: u, called with numbers ``(n, m)`` and vectors ``(n, 1, size)``.
    :param Tensor context: the vectors :math:`\gamma`, shape ``(n, size)``.
    :param Proposal proposal: q, n of them.
    :param bool has_broad_reference: whether r is the broad component.
    """

    energy: nn.Module
    context: Tensor
    proposal: Proposal
    has_broad_reference: bool

    def __len__(self) -> int:
        return len(self.context)

    def select(self, index: Tensor) -> Conditionals:
        """Some of the densities."""
        proposal = self.proposal.select(index)
        return Conditionals(self.energy, self.context[index], proposal, self.has_broad_reference)

    def detach_proposal(self) -> Conditionals:
        """The same, with no gradients to the proposal."""
        proposal = self.proposal.detach()
        return Conditionals(self.energy, self.context, proposal, self.has_broad_reference)

    def log_reference(self, x: Tensor) -> Tensor:
        """Logarithm of r at points of shape ``(n, m)``."""
        return broad_log_prob(x) if self.has_broad_reference else self.proposal.log_prob(x)

    def negative_energy(self, x: Tensor) -> Tensor:
        """Evaluate u at points of shape ``(n, m)``, in parts where no gradient is needed."""
        context = self.context.unsqueeze(-2)
        if torch.is_grad_enabled() or x.numel() <= _ROWS_AT_ONCE:
            values: Tensor = self.energy(x, context)
            return values
        size = max(1, _ROWS_AT_ONCE // x.shape[1])
        rows = [
            torch.cat([self.energy(piece, part) for piece in points.split(_ROWS_AT_ONCE, 1)], 1)
            for points, part in zip(x.split(size), context.split(size), strict=True)
        ]
        return torch.cat(rows)

    def log_unnormalized(self, x: Tensor) -> Tensor:
        """Logarithm of r e^u at points of shape ``(n, m)``."""
        return self.log_reference(x) + self.negative_energy(x)

    def log_weights(self, nodes: Tensor, negative_energy: Tensor | None = None) -> Tensor:
        """Logarithm of r e^u / q at draws of q, shape ``(n, m)``, with no gradient of q."""
        log_weights = self.negative_energy(nodes) if negative_energy is None else negative_energy
        if self.has_broad_reference:
            log_proposal = self.proposal.detach().log_prob(nodes)
            return log_weights + (broad_log_prob(nodes) - log_proposal)
        log_reference = self.proposal.log_prob(nodes) if torch.is_grad_enabled() else nodes
        if log_reference.requires_grad:  # r = q, of which r alone has a gradient
            log_weights = log_weights + (log_reference - log_reference.detach())
        return log_weights
