"""The conjugate prior of the mean and the precision of a Gaussian."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import register_kl
from torch.distributions.utils import broadcast_all

__all__ = ["NormalGamma"]


class NormalGamma(TorchDistribution):
    r"""
    Joint distribution of a mean :math:`\mu` and a precision :math:`\tau`.

    .. math:: \tau \sim \mathrm{Gamma}(\alpha, \beta), \qquad
        \mu \mid \tau \sim \mathrm{Normal}\left(\mu_0, (\nu \tau)^{-1/2}\right).

    A value has the mean and the precision as its two elements: ``mean, precision =
    value.unbind(-1)``. It is the conjugate prior of N observations :math:`x_n \sim
    \mathrm{Normal}(\mu, \tau^{-1/2})`, see :class:`pyro_ext.nn.NormalGammaHead` for its update.

    :param Tensor loc: :math:`\mu_0`, where the mean is.
    :param Tensor mean_concentration: :math:`\nu`, positive: how many observations the knowledge
        of the mean is worth.
    :param Tensor concentration: :math:`\alpha`, positive.
    :param Tensor rate: :math:`\beta`, positive.

    Reference: Bernardo and Smith 1994, "Bayesian Theory", section 3.2.5.

    >>> from pyro_ext.distributions import NormalGamma
    >>> prior = NormalGamma(torch.zeros(3), 0.1, 2.0, 2.0)
    >>> mean, precision = prior.sample().unbind(-1)
    >>> mean.shape, prior.event_shape
    (torch.Size([3]), torch.Size([2]))
    """

    arg_constraints = {  # noqa: RUF012
        "loc": constraints.real,
        "mean_concentration": constraints.positive,
        "concentration": constraints.positive,
        "rate": constraints.positive,
    }
    support = constraints.stack([constraints.real, constraints.positive], -1)
    has_rsample = True

    def __init__(
        self,
        loc: Tensor | float,
        mean_concentration: Tensor | float,
        concentration: Tensor | float,
        rate: Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.mean_concentration, self.concentration, self.rate = broadcast_all(
            loc, mean_concentration, concentration, rate
        )
        super().__init__(self.loc.shape, torch.Size([2]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NormalGamma:
        """Copy with expanded parameters."""
        new = self._get_checked_instance(NormalGamma, _instance)
        batch_shape = torch.Size(batch_shape)
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(batch_shape))
        super(NormalGamma, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """
        Draw mean and precision, with gradients to the parameters.

        :param sample_shape: in front of the batch shape.
        :returns: shape ``sample_shape + batch_shape + (2,)``.
        """
        shape = torch.Size(sample_shape) + self.batch_shape
        gamma = torch._standard_gamma(self.concentration.expand(shape)) / self.rate
        precision = gamma.clamp_min(torch.finfo(gamma.dtype).tiny)
        noise = torch.randn(shape, dtype=gamma.dtype, device=gamma.device)
        mean = self.loc + noise * (self.mean_concentration * precision).rsqrt()
        return torch.stack([mean, precision], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """
        Log-density of a mean and a precision.

        :param Tensor value: shape ``(..., 2)``.
        :returns: shape ``(...)``.
        """
        if self._validate_args:
            self._validate_sample(value)
        mean, precision = value.unbind(-1)
        nu, alpha, beta = self.mean_concentration, self.concentration, self.rate
        # Gamma(tau | alpha, beta) Normal(mu | mu_0, 1 / (nu tau)), with like terms together
        return (
            (alpha - 0.5) * precision.log()
            - precision * (beta + 0.5 * nu * (mean - self.loc).square())
            + alpha * beta.log()
            - torch.lgamma(alpha)
            + 0.5 * (nu / (2 * math.pi)).log()
        )

    @property
    def mean(self) -> Tensor:
        """Expectations of mean and precision."""
        return torch.stack([self.loc, self.concentration / self.rate], -1)

    @property
    def variance(self) -> Tensor:
        """Variances of mean and precision; the first is infinite for a concentration up to 1."""
        finite = self.concentration > 1
        excess = torch.where(finite, self.concentration - 1, 1.0)
        of_mean = self.rate / (self.mean_concentration * excess)
        of_mean = torch.where(finite, of_mean, torch.inf)
        return torch.stack([of_mean, self.concentration / self.rate.square()], -1)

    def entropy(self) -> Tensor:
        """Entropy, of the batch shape."""
        alpha, beta = self.concentration, self.rate
        log_precision = torch.digamma(alpha) - beta.log()
        of_precision = (
            torch.lgamma(alpha) - beta.log() + alpha + (1 - alpha) * torch.digamma(alpha)
        )
        of_mean = 0.5 * (1 + math.log(2 * math.pi) - self.mean_concentration.log() - log_precision)
        return of_precision + of_mean


@register_kl(NormalGamma, NormalGamma)
def _kl_normal_gamma(p: NormalGamma, q: NormalGamma) -> Tensor:
    nu_ratio = q.mean_concentration / p.mean_concentration
    distance = q.mean_concentration * p.mean[..., 1] * (p.loc - q.loc).square()
    of_mean = 0.5 * (nu_ratio + distance - 1 - nu_ratio.log())
    of_precision = (
        q.concentration * (p.rate / q.rate).log()
        - torch.lgamma(p.concentration)
        + torch.lgamma(q.concentration)
        + (p.concentration - q.concentration) * torch.digamma(p.concentration)
        + p.concentration * (q.rate / p.rate - 1)
    )
    return of_mean + of_precision
