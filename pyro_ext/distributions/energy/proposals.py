r"""
Proposals of one number, for many conditionals at once, that can be drawn from in strata.

All of them are a map from uniform positions :math:`t \in (0, 1)` to numbers. Positions spread
evenly over the strata of (0, 1) give nodes whose average is an unbiased estimate of an integral,
with a smaller variance than independent draws have.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution

__all__ = [
    "BROAD_SCALE",
    "DefensiveMixture",
    "FixedProposal",
    "Proposal",
    "UniformProposal",
    "broad_log_prob",
    "stratified_positions",
]

BROAD_SCALE = 2.0 * math.sqrt(3.0) / math.pi
"""Scale of the broad component, a logistic distribution with standard deviation 2."""

_LOG_SQRT_2_PI = 0.5 * math.log(2.0 * math.pi)
_BROAD_END = 30.0  # of the grid, in scales: less than 1e-12 of the mass is further out
_NORMAL_NODES = (-6.0, -4.5, -3.5, *(0.5 * i for i in range(-5, 6)), 3.5, 4.5, 6.0)


class Proposal(ABC):
    """Distributions of ``n`` numbers; points have shape ``(n, m)``, m of them for each."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-densities of points, shape ``(n, m)`` to the same."""

    @abstractmethod
    def place(self, positions: Tensor) -> Tensor:
        """Points at positions in (0, 1), without gradients."""

    @abstractmethod
    def position(self, x: Tensor) -> Tensor:
        """A position that is mapped to the point: one of them at random, if there are more."""

    @abstractmethod
    def grid(self) -> Tensor:
        """Increasing points that notice what the densities look like, shape ``(n, m)``."""

    @abstractmethod
    def select(self, index: Tensor) -> Proposal:
        """The distributions of some of the numbers."""

    @abstractmethod
    def detach(self) -> Proposal:
        """The same without gradients."""


class DefensiveMixture(Proposal):
    r"""
    Gaussians and a broad component, whose weight :math:`\epsilon` is fixed.

    .. math:: q(x) = \epsilon \, b(x) + (1 - \epsilon) \sum_k \pi_k \, N(x; m_k, s_k^2)

    with a logistic b of mean 0 and standard deviation 2 (defensive mixture, Hesterberg 1995): no
    place within reach of the data is without draws. A position chooses the component by its
    integral multiples of the weights, and what is left of it the quantile in the component.

    :param Tensor log_weights: logarithms of the weights, broad component first, shape
        ``(n, K + 1)``.
    :param Tensor locs: m, shape ``(n, K)``.
    :param Tensor scales: s, shape ``(n, K)``.
    """

    def __init__(self, log_weights: Tensor, locs: Tensor, scales: Tensor) -> None:
        self.log_weights, self.locs, self.scales = log_weights, locs, scales

    @classmethod
    def from_network(
        cls, parameters: Tensor, *, defensive_weight: float, min_scale: float
    ) -> DefensiveMixture:
        """
        Read the outputs of a network: logits, locations and raw scales.

        :param Tensor parameters: shape ``(n, 3 K)``.
        :param float defensive_weight: weight of the broad component.
        :param float min_scale: smallest scale of a Gaussian.
        """
        logits, locs, raw_scales = parameters.chunk(3, -1)
        log_weights = logits.log_softmax(-1) + math.log1p(-defensive_weight)
        broad = log_weights.new_full((len(logits), 1), math.log(defensive_weight))
        scales = min_scale + F.softplus(raw_scales)
        return cls(torch.cat([broad, log_weights], -1), locs, scales)

    def log_prob(self, x: Tensor) -> Tensor:
        """See :meth:`Proposal.log_prob`."""
        return self._log_components(x).logsumexp(-1)

    def _log_components(self, x: Tensor) -> Tensor:
        """Logarithms of weight times density, shape ``(n, m, K + 1)``."""
        scales = self.scales.unsqueeze(-2)
        standardized = (x.unsqueeze(-1) - self.locs.unsqueeze(-2)) / scales
        log_normals = -0.5 * standardized.square() - scales.log() - _LOG_SQRT_2_PI
        log_densities = torch.cat([broad_log_prob(x).unsqueeze(-1), log_normals], -1)
        return log_densities + self.log_weights.unsqueeze(-2)

    @torch.no_grad()
    def place(self, positions: Tensor) -> Tensor:
        """See :meth:`Proposal.place`."""
        weights = self.log_weights.exp()
        ends = weights.cumsum(-1)
        component = torch.searchsorted(
            ends[..., :-1].contiguous(), positions.contiguous(), right=True
        )
        weight, end = weights.gather(-1, component), ends.gather(-1, component)
        tiny = torch.finfo(positions.dtype).tiny
        # by rounding, also a component of no weight may be chosen
        level = 1.0 - (end - positions) / weight.clamp_min(tiny)
        level = level.clamp(tiny, 1.0 - torch.finfo(positions.dtype).eps)
        normal = (component - 1).clamp_min(0)
        gaussian = self.locs.gather(-1, normal)
        gaussian = gaussian + self.scales.gather(-1, normal) * torch.special.ndtri(level)
        return torch.where(component == 0, BROAD_SCALE * torch.logit(level), gaussian)

    @torch.no_grad()
    def position(self, x: Tensor) -> Tensor:
        """See :meth:`Proposal.position`."""
        log_components = self._log_components(x)
        responsibilities = (log_components - log_components.logsumexp(-1, keepdim=True)).exp()
        # inverse of the distribution function: one uniform number chooses a component
        uniform = torch.rand_like(x).unsqueeze(-1)
        component = (responsibilities.cumsum(-1)[..., :-1] <= uniform).sum(-1)
        normal = (component - 1).clamp_min(0)
        standardized = (x - self.locs.gather(-1, normal)) / self.scales.gather(-1, normal)
        level = torch.where(
            component == 0, torch.sigmoid(x / BROAD_SCALE), torch.special.ndtr(standardized)
        )
        weights = self.log_weights.exp()
        weight, end = weights.gather(-1, component), weights.cumsum(-1).gather(-1, component)
        return (end - weight * (1.0 - level)).clamp(0.0, 1.0)

    @torch.no_grad()
    def grid(self) -> Tensor:
        """See :meth:`Proposal.grid`."""
        steps = self.locs.new_tensor(_NORMAL_NODES)
        gaussian = self.locs.unsqueeze(-1) + self.scales.unsqueeze(-1) * steps
        near = torch.linspace(-4.0, 4.0, 33, dtype=steps.dtype, device=steps.device)
        far = torch.linspace(5.0, _BROAD_END, 11, dtype=steps.dtype, device=steps.device)
        broad = BROAD_SCALE * torch.cat([-far.flip(0), near, far])
        points = torch.cat([gaussian.flatten(-2), broad.expand(len(gaussian), -1)], -1)
        # a Gaussian outside of the ends of the broad component stretches the grid
        return points.sort(-1).values

    def select(self, index: Tensor) -> DefensiveMixture:
        """See :meth:`Proposal.select`."""
        return DefensiveMixture(self.log_weights[index], self.locs[index], self.scales[index])

    def detach(self) -> DefensiveMixture:
        """See :meth:`Proposal.detach`."""
        return DefensiveMixture(
            self.log_weights.detach(), self.locs.detach(), self.scales.detach()
        )


class UniformProposal(Proposal):
    """
    Uniform on [-1, 1], both ends included, for data in a box.

    :param int number: n.
    :param Tensor like: gives dtype and device.
    """

    def __init__(self, number: int, like: Tensor) -> None:
        self.number, self.like = number, like

    def log_prob(self, x: Tensor) -> Tensor:
        """See :meth:`Proposal.log_prob`; minus infinity outside."""
        # an end of the box may come out a rounding error outside
        inside = x.abs() <= 1.0 + 4.0 * torch.finfo(x.dtype).eps
        return torch.where(inside, -math.log(2.0), -math.inf).to(x.dtype)

    def place(self, positions: Tensor) -> Tensor:
        """See :meth:`Proposal.place`."""
        return 2.0 * positions - 1.0

    @torch.no_grad()
    def position(self, x: Tensor) -> Tensor:
        """See :meth:`Proposal.position`."""
        return (0.5 * (x + 1.0)).clamp(0.0, 1.0)

    def grid(self) -> Tensor:
        """See :meth:`Proposal.grid`."""
        points = torch.linspace(-1.0, 1.0, 129, dtype=self.like.dtype, device=self.like.device)
        return points.expand(self.number, -1)

    def select(self, index: Tensor) -> UniformProposal:
        """See :meth:`Proposal.select`."""
        return UniformProposal(len(index), self.like)

    def detach(self) -> UniformProposal:
        """See :meth:`Proposal.detach`."""
        return self


class FixedProposal(Proposal):
    r"""
    A distribution of PyTorch that is not trained, the same for all n.

    The numbers here are standardised, :math:`z = (x - m) / s`, those of the distribution are x.

    :param int number: n.
    :param Distribution distribution: of one number x, with ``icdf`` and ``cdf``.
    :param Tensor loc: m, a number.
    :param Tensor scale: s, a number.
    """

    def __init__(
        self, number: int, distribution: Distribution, loc: Tensor, scale: Tensor
    ) -> None:
        self.number, self.distribution = number, distribution
        self.loc, self.scale = loc, scale

    def log_prob(self, x: Tensor) -> Tensor:
        """See :meth:`Proposal.log_prob`; minus infinity outside of the support."""
        value = x * self.scale + self.loc
        inside = self._is_inside(value)
        # a value of the support for those outside, so that no check fails
        log_prob = self.distribution.log_prob(torch.where(inside, value, self.loc))
        return torch.where(inside, log_prob + self.scale.log(), -math.inf)

    @torch.no_grad()
    def place(self, positions: Tensor) -> Tensor:
        """See :meth:`Proposal.place`."""
        value: Tensor = self.distribution.icdf(positions)
        return (value - self.loc) / self.scale

    @torch.no_grad()
    def position(self, x: Tensor) -> Tensor:
        """See :meth:`Proposal.position`."""
        value = x * self.scale + self.loc
        inside = self._is_inside(value)
        position: Tensor = self.distribution.cdf(torch.where(inside, value, self.loc))
        return position.clamp(0.0, 1.0)

    @torch.no_grad()
    def grid(self) -> Tensor:
        """See :meth:`Proposal.grid`."""
        end = -math.log(torch.finfo(self.loc.dtype).eps)
        logits = torch.linspace(-end, end, 257, dtype=self.loc.dtype, device=self.loc.device)
        return self.place(torch.sigmoid(logits)).expand(self.number, -1)

    def _is_inside(self, value: Tensor) -> Tensor:
        support = self.distribution.support
        return (
            torch.ones_like(value, dtype=torch.bool) if support is None else support.check(value)
        )

    def select(self, index: Tensor) -> FixedProposal:
        """See :meth:`Proposal.select`."""
        return FixedProposal(len(index), self.distribution, self.loc, self.scale)

    def detach(self) -> FixedProposal:
        """See :meth:`Proposal.detach`."""
        return self


def broad_log_prob(x: Tensor) -> Tensor:
    """Log-density of the broad component, elementwise."""
    standardized = x / BROAD_SCALE
    return -F.softplus(-standardized) - F.softplus(standardized) - math.log(BROAD_SCALE)


def stratified_positions(
    shape: tuple[int, int], like: Tensor, first: int = 0, last: int | None = None
) -> Tensor:
    """
    One uniform position in each stratum of (0, 1), or in those from ``first`` to ``last``.

    :param shape: ``(n, number of strata)``.
    :param Tensor like: gives dtype and device.
    :param int first: number of the first stratum.
    :param last: number after that of the last stratum; the number of strata by default.
    :returns: shape ``(n, last - first)``.
    """
    number, strata = shape
    last = strata if last is None else last
    uniform = torch.rand((number, last - first), dtype=like.dtype, device=like.device)
    start = torch.arange(first, last, dtype=like.dtype, device=like.device)
    return ((start + uniform) / strata).clamp_max(1.0 - 0.5 * torch.finfo(like.dtype).eps)
