"""Proposals in an exponential family: natural parameters are the prior's plus statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "BernoulliHead",
    "BetaHead",
    "CategoricalHead",
    "DirichletHead",
    "GammaHead",
    "NormalGammaHead",
    "NormalHead",
    "add_positive",
]


def add_positive(prior: Tensor, statistic: Tensor) -> Tensor:
    r"""
    Add a statistic to a positive parameter, so that the sum is positive whatever it is.

    .. math:: f(\lambda, t) = \lambda + t \text{ for } t \ge 0, \qquad
        \lambda e^{\max(t / \lambda, -12)} \text{ for } t < 0.

    The statistics of data are never negative, and simply added. Those of an untrained network may
    be; the value and its slope go on without a step at zero, where the result is the prior.

    :param Tensor prior: :math:`\lambda`, positive.
    :param Tensor statistic: :math:`t`, any real number.
    :returns: of the broadcast shape, positive.
    """
    # elu(t) = e^t - 1 below zero; a factor below e^-12 would be lost in rounding
    return prior * (1 + F.elu((statistic / prior).clamp(min=-12.0)))


class _Head(nn.Module):
    """Parameters of a prior, kept as buffers, and the number of statistics of an event."""

    num_statistics: int

    def _keep(self, **parameters: Tensor | float) -> None:
        tensors = [torch.as_tensor(value, dtype=_dtype(value)) for value in parameters.values()]
        for name, value in zip(parameters, torch.broadcast_tensors(*tensors), strict=True):
            self.register_buffer(name, value.clone())

    def _keep_positive(self, **parameters: Tensor | float) -> None:
        for name, value in parameters.items():
            if not bool((torch.as_tensor(value) > 0).all()):
                raise ValueError(f"{name}={value} of the prior must be positive.")

    def _split(self, statistics: Tensor) -> tuple[Tensor, ...]:
        if statistics.shape[-1:] != (self.num_statistics,):
            raise ValueError(
                f"{type(self).__name__} needs statistics of shape (..., {self.num_statistics}), "
                f"got {tuple(statistics.shape)}."
            )
        return statistics.unbind(-1)


def _dtype(value: Tensor | float) -> torch.dtype:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.dtype if is_float else torch.get_default_dtype()  # type: ignore[union-attr]


class NormalHead(_Head):
    r"""
    Location and scale of a Normal.

    The statistics are the sums of precisions times values, and of precisions:
    :math:`\lambda = \lambda_0 + t_2`, :math:`\mu = (\lambda_0 \mu_0 + t_1) / \lambda`.

    :param Tensor loc: location of the prior.
    :param Tensor scale: standard deviation of the prior, positive.
    :raises ValueError: if a parameter of the prior is out of its range.

    >>> from pyro_ext.nn import NormalHead
    >>> head = NormalHead(0.0, 1.0)
    >>> x = torch.tensor([1.0, 2.0, 3.0])  # with a noise of variance 1
    >>> head(torch.stack([x.sum(), torch.tensor(3.0)]))
    (tensor(1.5000), tensor(0.5000))
    """

    num_statistics = 2
    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor | float = 0.0, scale: Tensor | float = 1.0) -> None:
        super().__init__()
        self._keep_positive(scale=scale)
        self._keep(loc=loc, scale=scale)

    def forward(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """
        Add statistics to the prior.

        :param Tensor statistics: shape ``(..., 2)``.
        :returns: location and scale.
        """
        weighted, precision = self._split(statistics)
        prior_precision = self.scale.square().reciprocal()
        total = add_positive(prior_precision, precision)
        return (prior_precision * self.loc + weighted) / total, total.rsqrt()


class _PositiveHead(_Head):
    """Two positive natural parameters, each with a statistic of its own."""

    num_statistics = 2
    names: tuple[str, str]

    def __init__(self, first: Tensor | float, second: Tensor | float) -> None:
        super().__init__()
        parameters = dict(zip(self.names, (first, second), strict=True))
        self._keep_positive(**parameters)
        self._keep(**parameters)

    def forward(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """
        Add statistics to the prior.

        :param Tensor statistics: shape ``(..., 2)``.
        :returns: the two parameters.
        """
        first, second = self._split(statistics)
        return (
            add_positive(getattr(self, self.names[0]), first),
            add_positive(getattr(self, self.names[1]), second),
        )


class GammaHead(_PositiveHead):
    r"""
    Concentration and rate of a Gamma: :math:`\alpha_0 + t_1` and :math:`\beta_0 + t_2`.

    :param Tensor concentration: of the prior, positive.
    :param Tensor rate: of the prior, positive.
    :raises ValueError: if a parameter of the prior is out of its range.

    >>> from pyro_ext.nn import GammaHead
    >>> GammaHead(2.0, 1.0)(torch.zeros(2))  # the prior
    (tensor(2.), tensor(1.))
    """

    names = ("concentration", "rate")

    def __init__(self, concentration: Tensor | float = 1.0, rate: Tensor | float = 1.0) -> None:
        super().__init__(concentration, rate)


class BetaHead(_PositiveHead):
    r"""
    Concentrations of a Beta: :math:`\alpha_0 + t_1` and :math:`\beta_0 + t_2`.

    :param Tensor concentration1: of the prior, positive.
    :param Tensor concentration0: of the prior, positive.
    :raises ValueError: if a parameter of the prior is out of its range.

    >>> from pyro_ext.nn import BetaHead
    >>> BetaHead(1.0, 1.0)(torch.tensor([3.0, 1.0]))  # three successes, one failure
    (tensor(4.), tensor(2.))
    """

    names = ("concentration1", "concentration0")

    def __init__(
        self, concentration1: Tensor | float = 1.0, concentration0: Tensor | float = 1.0
    ) -> None:
        super().__init__(concentration1, concentration0)


class DirichletHead(_Head):
    r"""
    Concentration of a Dirichlet: :math:`\alpha_0 + t`.

    :param Tensor concentration: of the prior, positive, shape ``(..., K)``.
    :raises ValueError: if a parameter of the prior is out of its range.

    >>> from pyro_ext.nn import DirichletHead
    >>> DirichletHead(torch.ones(3))(torch.tensor([2.0, 0.0, 1.0]))
    tensor([3., 1., 2.])
    """

    concentration: Tensor

    def __init__(self, concentration: Tensor) -> None:
        super().__init__()
        self._keep_positive(concentration=concentration)
        self._keep(concentration=concentration)
        self.num_statistics = self.concentration.shape[-1]

    def forward(self, statistics: Tensor) -> Tensor:
        """
        Add statistics to the prior.

        :param Tensor statistics: shape ``(..., K)``.
        :returns: concentration.
        """
        self._split(statistics)
        return add_positive(self.concentration, statistics)


class CategoricalHead(_Head):
    r"""
    Logits of a Categorical: :math:`\log \pi_0 + t`.

    :param Tensor probs: of the prior, positive, shape ``(..., K)``.
    :raises ValueError: if a parameter of the prior is out of its range.

    >>> from pyro_ext.nn import CategoricalHead
    >>> CategoricalHead(torch.tensor([0.5, 0.5]))(torch.zeros(2)).softmax(-1)
    tensor([0.5000, 0.5000])
    """

    logits: Tensor

    def __init__(self, probs: Tensor) -> None:
        super().__init__()
        self._keep_positive(probs=probs)
        self._keep(logits=torch.log(probs / probs.sum(-1, keepdim=True)))
        self.num_statistics = self.logits.shape[-1]

    def forward(self, statistics: Tensor) -> Tensor:
        """
        Add statistics to the prior.

        :param Tensor statistics: shape ``(..., K)``.
        :returns: normalised logits.
        """
        self._split(statistics)
        return torch.log_softmax(self.logits + statistics, -1)


class BernoulliHead(_Head):
    r"""
    Logits of a Bernoulli: :math:`\log \pi_0 / (1 - \pi_0) + t`.

    :param Tensor probs: of the prior, between 0 and 1.
    :raises ValueError: if a parameter of the prior is out of its range.

    >>> from pyro_ext.nn import BernoulliHead
    >>> BernoulliHead(0.5)(torch.tensor([0.0]))
    tensor(0.)
    """

    num_statistics = 1
    logits: Tensor

    def __init__(self, probs: Tensor | float = 0.5) -> None:
        super().__init__()
        probs = torch.as_tensor(probs, dtype=_dtype(probs))
        if not bool(((probs > 0) & (probs < 1)).all()):
            raise ValueError(f"probs={probs} of the prior must be between 0 and 1.")
        self._keep(logits=torch.logit(probs))

    def forward(self, statistics: Tensor) -> Tensor:
        """
        Add statistics to the prior.

        :param Tensor statistics: shape ``(..., 1)``.
        :returns: logits.
        """
        (statistic,) = self._split(statistics)
        return self.logits + statistic


class NormalGammaHead(_Head):
    r"""
    Parameters of a :class:`pyro_ext.distributions.NormalGamma`.

    The statistics are those of observations with unknown mean and precision: their number N, their
    sum :math:`S_1` and the sum of their squares :math:`S_2`. The conjugate update is

    .. math::

        \nu &= \nu_0 + N, \qquad \mu = (\nu_0 \mu_0 + S_1) / \nu, \qquad
        \alpha = \alpha_0 + N / 2, \\
        \beta &= \beta_0 + \tfrac12 \left(S_2 + \nu_0 \mu_0^2 - \nu \mu^2\right).

    With statistics that no data has (a negative number, or :math:`N S_2 < S_1^2`) the parameters
    are still valid, by :func:`add_positive`.

    :param Tensor loc: :math:`\mu_0` of the prior.
    :param Tensor mean_concentration: :math:`\nu_0` of the prior, positive.
    :param Tensor concentration: :math:`\alpha_0` of the prior, positive.
    :param Tensor rate: :math:`\beta_0` of the prior, positive.
    :raises ValueError: if a parameter of the prior is out of its range.

    Reference: Bernardo and Smith 1994, "Bayesian Theory", appendix A.2.

    >>> from pyro_ext.nn import NormalGammaHead
    >>> head = NormalGammaHead(0.0, 1.0, 2.0, 2.0)
    >>> x = torch.tensor([1.0, 3.0])
    >>> head(torch.stack([torch.tensor(2.0), x.sum(), x.square().sum()]))
    (tensor(1.3333), tensor(3.), tensor(3.), tensor(4.3333))
    """

    num_statistics = 3
    loc: Tensor
    mean_concentration: Tensor
    concentration: Tensor
    rate: Tensor

    def __init__(
        self,
        loc: Tensor | float = 0.0,
        mean_concentration: Tensor | float = 1.0,
        concentration: Tensor | float = 1.0,
        rate: Tensor | float = 1.0,
    ) -> None:
        super().__init__()
        positive = {
            "mean_concentration": mean_concentration,
            "concentration": concentration,
            "rate": rate,
        }
        self._keep_positive(**positive)
        self._keep(loc=loc, **positive)

    def forward(self, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Add statistics to the prior.

        :param Tensor statistics: N, S1 and S2, shape ``(..., 3)``.
        :returns: location, concentration of the mean, concentration and rate.
        """
        number, first, second = self._split(statistics)
        nu = add_positive(self.mean_concentration, number)
        weighted = self.mean_concentration * self.loc + first
        loc = weighted / nu
        squares = second + self.mean_concentration * self.loc.square() - weighted * loc
        alpha = add_positive(self.concentration, 0.5 * number)
        return loc, nu, alpha, add_positive(self.rate, 0.5 * squares)
