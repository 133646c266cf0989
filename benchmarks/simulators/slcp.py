r"""Simple likelihood, complex posterior (Papamakarios et al. 2019): four modes.

.. math:: \theta \sim U[-3, 3]^5, \quad x_1, \ldots, x_4 \sim N\left((\theta_1, \theta_2),
    \begin{pmatrix} s_1^2 & \rho s_1 s_2 \\ \rho s_1 s_2 & s_2^2 \end{pmatrix}\right), \quad
    s_1 = \theta_3^2, \ s_2 = \theta_4^2, \ \rho = \tanh \theta_5

The likelihood is tractable, for a reference only.

Reference: Papamakarios, Sterratt and Murray 2019, "Sequential neural likelihood", appendix A.1.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .task import Reference, Task, draw_on_grid, resample

__all__ = ["SLCP", "likelihood", "model"]

BOUND, NUM_POINTS = 3.0, 4
TRUTH = (-0.7, -2.9, -1.0, -0.9, 0.6)
OBSERVATION = (
    (-0.97071232, -2.94612244),
    (-0.44947218, -3.42318484),
    (-0.13285634, -3.36401699),
    (-0.85367595, -2.42716377),
)
_GRID = 64
_DRAWS_PER_DRAW = 40


def model() -> Tensor:
    """Draw parameters and four points."""
    bound = BOUND * torch.ones(5)
    theta = pyro.sample("theta", dist.Uniform(-bound, bound).to_event(1))
    return pyro.sample("x", likelihood(theta))


def likelihood(theta: Tensor) -> dist.TorchDistribution:
    """
    The four points given the parameters.

    :param Tensor theta: shape ``batch_shape + (5,)``.
    :returns: distribution with event shape ``(4, 2)``.
    """
    first, second = theta[..., 2].square(), theta[..., 3].square()
    # 1 - rho^2 without cancellation
    rho, complement = theta[..., 4].tanh(), 1 / theta[..., 4].cosh()
    zero = torch.zeros_like(first)
    rows = [torch.stack([first, zero], -1), torch.stack([rho * second, complement * second], -1)]
    point = dist.MultivariateNormal(
        theta[..., None, :2], scale_tril=torch.stack(rows, -2).unsqueeze(-3)
    )
    return point.expand((*theta.shape[:-1], NUM_POINTS)).to_event(1)


def _log_posterior(theta: Tensor, x: Tensor) -> Tensor:
    inside = (theta.abs() <= BOUND).all(-1)
    safe = torch.where(inside[..., None], theta, torch.ones_like(theta))
    return likelihood(safe).log_prob(x).where(inside, theta.new_tensor(-torch.inf))


def _reference(x: Tensor, num_draws: int) -> Reference:
    """
    Nearly independent draws, by importance sampling in three dimensions.

    With the mean integrated out (over the whole plane), the likelihood is that of the scatter of
    the points; the mean given the rest is normal around their average, and draws outside the box
    have no weight. The signs of the third and fourth parameter are arbitrary.
    """
    average = x.mean(0)
    scatter = (x - average).T @ (x - average)

    def log_density(rest: Tensor) -> Tensor:
        first, second = rest[:, 0].square(), rest[:, 1].square()
        rho, complement = rest[:, 2].tanh(), 1 / rest[:, 2].cosh()
        # 1/2 tr(S^-1 scatter), and all but one of the four determinants
        standard = scatter[0, 0] / first**2 + scatter[1, 1] / second**2
        product = 2 * rho * scatter[0, 1] / (first * second)
        exponent = 0.5 * (standard - product) / complement**2
        return -exponent - (NUM_POINTS - 1) * (first * second * complement).log()

    number = _DRAWS_PER_DRAW * num_draws
    axes = [(0.0, BOUND, _GRID), (0.0, BOUND, _GRID), (-BOUND, BOUND, _GRID)]
    rest, log_weights = draw_on_grid(log_density, axes, number)
    first, second = rest[:, 0].square(), rest[:, 1].square()
    normal = torch.randn(number, 2).to(x)
    rho, complement = rest[:, 2].tanh(), 1 / rest[:, 2].cosh()
    correlated = rho * normal[:, 0] + complement * normal[:, 1]
    spread = torch.stack([first * normal[:, 0], second * correlated], -1)
    mean = average + spread / math.sqrt(NUM_POINTS)
    log_weights[(mean.abs() > BOUND).any(-1)] = -torch.inf
    signs = 2.0 * torch.randint(2, (number, 2)).to(x) - 1
    theta = torch.cat([mean, signs * rest[:, :2], rest[:, 2:]], -1)
    return resample(theta, log_weights, num_draws)


SLCP = Task(
    "slcp",
    model,
    lambda: torch.tensor(OBSERVATION),
    torch.tensor(TRUTH),
    log_posterior=_log_posterior,
    reference=_reference,
)
