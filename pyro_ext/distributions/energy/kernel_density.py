"""A normalised approximation of an autoregressive energy machine."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...nn import ResMADE
from . import sampler
from .conditionals import Conditionals
from .distribution import EnergyMachineDistribution
from .machine import AutoregressiveEnergyMachine

__all__ = ["KernelDensityAEM", "KernelFit"]

_NODES_AT_ONCE = 2**18
_LOG_SQRT_2_PI = 0.5 * math.log(2.0 * math.pi)
_EM_STEPS = 100


class KernelFit(NamedTuple):
    """What a fit of bandwidths and weights found, shape ``(features,)`` each but the last."""

    bandwidth: Tensor
    proposal_weight: Tensor
    log_likelihood: float  # mean over the validation data, nats


class KernelDensityAEM(nn.Module):
    r"""
    A kernel density estimate of every conditional of an energy machine (AEM-KDE).

    .. math:: p(x_d \mid x_{<d}) = \alpha_d \, q(x_d) + (1 - \alpha_d)
        \sum_{s=1}^S \bar w_s \, N(x_d; x_s, h_d^2), \qquad
        \bar w_s \propto \frac{r(x_s) e^{u(x_s)}}{q(x_s)}

    with nodes :math:`x_s` of the proposal q (Nash and Durkan 2019, section 4.3). The nodes are
    at the centres of S strata, so that this is a fixed function, which integrates to one
    exactly: unlike the machine's own estimates it can be compared with any other density.
    Bandwidth h and weight :math:`\alpha` of each feature are chosen by :meth:`fit`. For data in a
    box, a little of the mass of kernels leaves it.

    :param AutoregressiveEnergyMachine machine: a trained machine, which is not changed.
    :param int num_nodes: S.
    :raises ValueError: for fewer than two nodes.

    >>> aem = AutoregressiveEnergyMachine(2, hidden_features=8, energy_hidden_features=8).eval()
    >>> density = KernelDensityAEM(aem, num_nodes=100)
    >>> result = density.fit(torch.randn(200, 2))
    >>> density().log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    bandwidth: Tensor
    proposal_weight: Tensor

    def __init__(self, machine: AutoregressiveEnergyMachine, *, num_nodes: int = 1000) -> None:
        super().__init__()
        if isinstance(num_nodes, bool) or not isinstance(num_nodes, int) or num_nodes < 2:
            raise ValueError(f"num_nodes={num_nodes!r}: give a whole number of at least 2.")
        self.machine, self.num_nodes = machine, num_nodes
        self.features, self.context_features = machine.features, machine.context_features
        like = machine.standardize.loc
        self.register_buffer("bandwidth", torch.full_like(like, 0.05))
        self.register_buffer("proposal_weight", torch.full_like(like, 0.1))

    @property
    def network(self) -> ResMADE:
        """The masked network of the machine."""
        return self.machine.network

    def forward(self, context: Tensor | None = None) -> EnergyMachineDistribution:
        """
        Return the distribution of the data, given a context if there is one.

        :param Tensor context: shape ``batch_shape + (context_features,)``.
        :returns: a distribution over vectors of shape ``(features,)``, without gradients.
        :raises ValueError: if the context is missing, not expected or of the wrong size.
        """
        self.machine(context)  # checks the context
        return EnergyMachineDistribution(self, context)

    @property
    def support(self) -> torch.distributions.constraints.Constraint:
        """Kernels reach everywhere."""
        return torch.distributions.constraints.real_vector

    @torch.no_grad()
    def fit(
        self,
        validation: Tensor,
        context: Tensor | None = None,
        *,
        bandwidths: Tensor | None = None,
    ) -> KernelFit:
        r"""
        Choose bandwidth and weight of the proposal, for each feature, by the likelihood.

        For each bandwidth the best weight is found by expectation-maximisation, whose objective
        has one maximum.

        :param Tensor validation: data that the machine was not trained on, ``(n, features)``.
        :param Tensor context: shape ``(n, context_features)``.
        :param Tensor bandwidths: those to try, in standard deviations of the data; 24 from 0.001
            to 0.5 by default.
        :returns: what was chosen.
        :raises ValueError: for data of another shape or not finite.
        """
        self.machine._check_data(validation)
        if bandwidths is None:
            bandwidths = torch.logspace(-3.0, math.log10(0.5), 24).to(self.bandwidth)
        z, log_det = self.machine.standardize.to_noise(validation)
        conditionals = self.machine._conditionals(z, context)
        log_kernel, log_q = self._parts(conditionals, z.reshape(-1), bandwidths)
        log_kernel = log_kernel.unflatten(1, z.shape)  # (bandwidths, n, features)
        log_q = log_q.reshape(z.shape)
        weight = torch.full_like(log_kernel[:, :1], 0.1)
        for _ in range(_EM_STEPS):
            log_odds = weight.logit() + log_q - log_kernel
            weight = torch.sigmoid(log_odds).mean(1, keepdim=True).clamp(1e-4, 1.0 - 1e-4)
        values = _mixture(weight, log_q, log_kernel).mean(1)  # (bandwidths, features)
        best = values.argmax(0)
        self.bandwidth.copy_(bandwidths[best])
        self.proposal_weight.copy_(weight.squeeze(1).gather(0, best[None])[0])
        likelihood = values.gather(0, best[None]).sum() + log_det[0]
        scale = self.machine.standardize.scale
        return KernelFit(self.bandwidth * scale, self.proposal_weight.clone(), float(likelihood))

    @torch.no_grad()
    def log_density(
        self,
        rows: Tensor,
        context: Tensor | None,
        *,
        num_importance_samples: int | None = None,
        exact: bool | None = None,
    ) -> Tensor:
        """
        Log-densities of rows; there is nothing to estimate, so that the settings do not matter.

        :param Tensor rows: shape ``(n, features)``.
        :param Tensor context: shape ``(n, context_features)``.
        :returns: shape ``(n,)``.
        """
        z, log_det = self.machine.standardize.to_noise(rows)
        conditionals = self.machine._conditionals(z, context)
        bandwidth = self.bandwidth.expand(z.shape).reshape(1, -1)
        log_kernel, log_q = self._parts(conditionals, z.reshape(-1), bandwidth)
        weight = self.proposal_weight.expand(z.shape).reshape(-1)
        return _mixture(weight, log_q, log_kernel[0]).reshape(z.shape).sum(-1) + log_det

    def proposal_log_density(self, rows: Tensor, context: Tensor | None) -> Tensor:
        """Log-densities of rows under the proposal of the machine."""
        return self.machine.proposal_log_density(rows, context)

    def draw(
        self,
        num_rows: int,
        context: Tensor | None,
        *,
        num_proposals: int | None = None,
        exact: bool | None = None,
    ) -> Tensor:
        """
        Draw rows: from the proposal, or a node by its weight and then from its kernel.

        :param int num_rows: number of rows.
        :param Tensor context: shape ``(num_rows, context_features)``.
        :returns: shape ``(num_rows, features)``.
        """

        def draw_one(conditionals: Conditionals, feature: int, num_draws: int) -> Tensor:
            nodes, log_weights = self._nodes(conditionals)
            cumulative = log_weights.softmax(-1).cumsum(-1).expand(num_draws, -1)
            chosen = sampler.choose(cumulative).unsqueeze(-1)
            kernel = nodes.expand(num_draws, -1).gather(-1, chosen).squeeze(-1)
            kernel = kernel + self.bandwidth[feature] * torch.randn_like(kernel)
            position = torch.rand_like(kernel).unsqueeze(-1)
            index = torch.arange(len(conditionals), device=kernel.device).expand(num_draws)
            conditionals = conditionals.select(index)
            from_proposal = conditionals.proposal.place(position).squeeze(-1)
            uniform = torch.rand_like(kernel)
            return torch.where(uniform < self.proposal_weight[feature], from_proposal, kernel)

        if context is not None:
            context = self.machine.context_scale(context)
        z = sampler.draw(self.network, self.machine._from_parameters, num_rows, context, draw_one)
        return self.machine.standardize.to_data(z)[0]

    def _nodes(self, conditionals: Conditionals) -> tuple[Tensor, Tensor]:
        """Nodes at the centres of strata, and the logarithms of their weights, ``(n, S)``."""
        like = conditionals.context
        steps = torch.arange(self.num_nodes, dtype=like.dtype, device=like.device)
        positions = ((steps + 0.5) / self.num_nodes).expand(len(conditionals), -1)
        nodes = conditionals.proposal.place(positions)
        return nodes, conditionals.log_weights(nodes)

    def _parts(
        self, conditionals: Conditionals, z: Tensor, bandwidths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-densities ``(bandwidths, n)`` of the kernels and ``(n,)`` of the proposal."""
        index = torch.arange(len(z), device=z.device)
        log_kernels, log_qs = [], []
        for part in index.split(max(1, _NODES_AT_ONCE // self.num_nodes)):
            chosen = conditionals.select(part)
            nodes, log_weights = self._nodes(chosen)
            log_weights = log_weights.log_softmax(-1)
            distance = (z[part].unsqueeze(-1) - nodes).square()
            of_part = bandwidths[:, part] if bandwidths.dim() == 2 else bandwidths[:, None]
            log_kernels.append(
                torch.stack(
                    [
                        (log_weights - 0.5 * distance / h.square().unsqueeze(-1)).logsumexp(-1)
                        - h.log()
                        - _LOG_SQRT_2_PI
                        for h in of_part
                    ]
                )
            )
            log_qs.append(chosen.proposal.log_prob(z[part].unsqueeze(-1)).squeeze(-1))
        return torch.cat(log_kernels, 1), torch.cat(log_qs)


def _mixture(weight: Tensor, log_q: Tensor, log_kernel: Tensor) -> Tensor:
    """Logarithm of the mixture of proposal and kernels."""
    return torch.logaddexp(weight.log() + log_q, torch.log1p(-weight) + log_kernel)
