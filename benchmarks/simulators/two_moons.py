r"""Two moons (Greenberg et al. 2019): a posterior of two thin crescents.

.. math:: \theta \sim U[-1, 1]^2, \quad x = (r \cos a + \tfrac14, r \sin a)
    + \tfrac{1}{\sqrt2}(-|\theta_1 + \theta_2|, \theta_2 - \theta_1), \quad
    a \sim U(-\tfrac\pi2, \tfrac\pi2), \quad r \sim N(0.1, 0.01^2)

Reference: Greenberg, Nonnenmacher and Macke 2019, "Automatic posterior transformation for
likelihood-free inference", appendix A.1.1.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from .task import Reference, Task

__all__ = ["TWO_MOONS", "TwoMoons", "model"]

RADIUS, WIDTH, SHIFT = 0.1, 0.01, 0.25


class TwoMoons(TorchDistribution):
    """
    The crescent that one parameter generates.

    :param Tensor theta: shape ``batch_shape + (2,)``.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"theta": constraints.real_vector}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, theta: Tensor, *, validate_args: bool | None = None) -> None:
        self.theta = theta
        super().__init__(theta.shape[:-1], theta.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TwoMoons:
        return TwoMoons(self.theta.expand(*batch_shape, -1), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            theta = self.theta.expand(*sample_shape, *self.theta.shape)
            return _crescent(theta.shape[:-1], theta) + _centre(theta)

    def log_prob(self, value: Tensor) -> Tensor:
        return _log_crescent(value - _centre(self.theta))


def model() -> Tensor:
    """Draw parameters and a point."""
    theta = pyro.sample("theta", dist.Uniform(-torch.ones(2), torch.ones(2)).to_event(1))
    return pyro.sample("x", TwoMoons(theta))


def _centre(theta: Tensor) -> Tensor:
    first, second = theta.unbind(-1)
    return torch.stack([-(first + second).abs(), second - first], -1) / math.sqrt(2)


def _crescent(shape: torch.Size, like: Tensor) -> Tensor:
    angle = math.pi * (torch.rand(shape).to(like) - 0.5)
    radius = RADIUS + WIDTH * torch.randn(shape).to(like)
    return torch.stack([radius * angle.cos() + SHIFT, radius * angle.sin()], -1)


def _log_crescent(point: Tensor) -> Tensor:
    """Density of the crescent at a point; a negative radius has probability 1e-23."""
    first, second = point[..., 0] - SHIFT, point[..., 1]
    radius = torch.hypot(first, second)
    log_density = dist.Normal(RADIUS, WIDTH).log_prob(radius) - (math.pi * radius).log()
    return log_density.where(first > 0, torch.full_like(first, -torch.inf))


def _log_posterior(theta: Tensor, x: Tensor) -> Tensor:
    inside = (theta.abs() <= 1).all(-1)
    log_density = _log_crescent(x - _centre(theta))
    return log_density.where(inside, torch.full_like(log_density, -torch.inf))


def _reference(x: Tensor, num_draws: int) -> Reference:
    """
    Independent draws, by inverting the simulator.

    Up to a sign the map from the point on the crescent to the parameters is linear.
    """
    kept = x.new_empty(0, 2)
    while len(kept) < num_draws:
        point = _crescent(torch.Size([num_draws]), x)
        total, difference = point[:, 0] - x[0], x[1] - point[:, 1]
        sign = 2.0 * torch.randint(2, (num_draws,)).to(x) - 1
        theta = torch.stack([sign * total - difference, sign * total + difference], -1)
        theta = theta / math.sqrt(2)
        kept = torch.cat([kept, theta[(total > 0) & (theta.abs() <= 1).all(-1)]])
    return Reference(kept[:num_draws], num_draws)


TWO_MOONS = Task(
    "two_moons",
    model,
    lambda: torch.zeros(2),
    None,
    log_posterior=_log_posterior,
    reference=_reference,
)
