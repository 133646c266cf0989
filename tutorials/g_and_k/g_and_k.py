r"""The g-and-k distribution: a simulator, the Pyro models, and the density by numerical inversion.

A draw is a warped standard normal,

.. math::

    x = Q(z) = A + B \left(1 + c \tanh\frac{g z}{2}\right) (1 + z^2)^k z,
    \qquad z \sim N(0, 1), \quad c = 0.8,

with location :math:`A`, scale :math:`B`, skewness :math:`g` and weight of the tails :math:`k`. The
density of x has no formula, which made this the classical test of likelihood-free inference
(Rayner and MacGillivray 2002; Allingham, King and Mengersen 2009). As Q is increasing, however, it
can be inverted numerically, one x at a time: :class:`GAndK` does so, and is what the others are
held against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

__all__ = [
    "PARAMETER_NAMES",
    "PRIOR_HIGH",
    "THETA_TRUE",
    "GAndK",
    "density_model",
    "invert",
    "observed_data",
    "quantile",
    "simulator_model",
    "slope",
]

THETA_TRUE = (3.0, 1.0, 2.0, 0.5)
PARAMETER_NAMES = ("A", "B", "g", "k")
PRIOR_HIGH = 10.0
SKEWNESS_FACTOR = 0.8
Parameters = Sequence[Tensor]  # A, B, g, k


def quantile(z: Tensor, theta: Parameters) -> Tensor:
    """
    The value whose standard normal score is z.

    :param Tensor z: scores.
    :param theta: A, B, g and k, which broadcast with the scores.
    """
    location, scale, g, k = theta
    skewness = 1 + SKEWNESS_FACTOR * torch.tanh(0.5 * g * z)
    return location + scale * skewness * (1 + z.square()) ** k * z


def slope(z: Tensor, theta: Parameters) -> Tensor:
    """The derivative of :func:`quantile` with respect to z, which is positive."""
    _, scale, g, k = theta
    tanh, square = torch.tanh(0.5 * g * z), z.square()
    skewness, tail = 1 + SKEWNESS_FACTOR * tanh, (1 + square) ** k
    of_skewness = 0.5 * SKEWNESS_FACTOR * g * (1 - tanh.square())
    return scale * tail * (of_skewness * z + skewness * (1 + (2 * k + 1) * square) / (1 + square))


def invert(x: Tensor, theta: Parameters, num_steps: int = 100) -> Tensor:
    """
    Find the scores of values: Newton's iterations, kept inside an interval that shrinks.

    A Newton step that would leave the interval known to contain the solution is replaced by
    halving it. The result is differentiable with respect to x and the parameters: one last Newton
    step is recorded, whose derivative is that of the implicit function.

    :param Tensor x: values.
    :param theta: A, B, g and k.
    :param int num_steps: most iterations; values further out than 38 standard deviations, whose
        probability underflows, are not found.
    """
    with torch.no_grad():
        low = torch.full(torch.broadcast_shapes(x.shape, *(t.shape for t in theta)), -38.0)
        low = low.to(x)
        high, z = -low, torch.zeros_like(low)
        for _ in range(num_steps):
            excess = quantile(z, theta) - x
            high, low = torch.where(excess > 0, z, high), torch.where(excess > 0, low, z)
            newton = z - excess / slope(z, theta)
            is_inside = (newton >= low) & (newton <= high)
            new = torch.where(is_inside, newton, 0.5 * (low + high))
            step, z = (new - z).abs().max(), new
            if step < 1e-12:
                break
        slope_here = slope(z, theta)
    return z - (quantile(z, theta) - x) / slope_here


class GAndK(dist.TorchDistribution):
    """
    The g-and-k distribution, with a density by numerical inversion.

    :param Tensor location: A.
    :param Tensor scale: B, positive.
    :param Tensor g: skewness.
    :param Tensor k: weight of the tails, not negative.
    """

    arg_constraints: ClassVar = {
        "location": constraints.real,
        "scale": constraints.positive,
        "g": constraints.real,
        "k": constraints.nonnegative,
    }
    support = constraints.real

    def __init__(
        self,
        location: Tensor,
        scale: Tensor,
        g: Tensor,
        k: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.location, self.scale, self.g, self.k = torch.broadcast_tensors(location, scale, g, k)
        super().__init__(self.location.shape, validate_args=validate_args)

    @property
    def _theta(self) -> Parameters:
        return self.location, self.scale, self.g, self.k

    def expand(self, batch_shape: Any, _instance: Any = None) -> GAndK:
        """A distribution of another batch shape."""
        return GAndK(*(t.expand(batch_shape) for t in self._theta), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw by the definition."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            z = torch.randn(shape, dtype=self.location.dtype, device=self.location.device)
            return quantile(z, self._theta)

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Evaluate :math:`\log N(z; 0, 1) - \log Q'(z)` at the score z of the value."""
        z = invert(value, self._theta)
        return -0.5 * (z.square() + math.log(2 * math.pi)) - slope(z, self._theta).log()


# ----------------------------------------------------------------------------------------- models


def observed_data(size: int = 200, seed: int = 0) -> Tensor:
    """Draw observations at the true parameters, shape ``(size,)``."""
    z = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return quantile(z, torch.tensor(THETA_TRUE, dtype=torch.float64).unbind())


def _parameters() -> Parameters:
    prior = dist.Uniform(0.0, PRIOR_HIGH).expand([4]).to_event(1)
    return pyro.sample("theta", prior).unbind(-1)


def simulator_model(size: int) -> Tensor:
    """
    Draw parameters and scores, and simulate; nothing here knows a density.

    :param int size: number of observations.
    """
    theta = _parameters()
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
    return pyro.deterministic("x", quantile(z, theta))


def density_model(x: Tensor) -> None:
    """
    The same, with the scores summed out: what one has to write for stock HMC.

    :param Tensor x: observations, shape ``(size,)``.
    """
    theta = _parameters()
    pyro.sample("x", GAndK(*theta).expand([len(x)]).to_event(1), obs=x)
