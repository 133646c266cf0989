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

from .task import Reference, Task, draw_on_grid, effective_draws, resample

__all__ = ["SLCP", "likelihood", "model"]

BOUND, NUM_POINTS = 3.0, 4
TRUTH = (-0.7, -2.9, -1.0, -0.9, 0.6)
OBSERVATION = (
    (-0.97071232, -2.94612244),
    (-0.44947218, -3.42318484),
    (-0.13285634, -3.36401699),
    (-0.85367595, -2.42716377),
)
_GRID = 48
_DRAWS_PER_DRAW = (40, 400, 4000)  # more where the posterior is a thin ridge


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

    With the mean integrated out over the whole plane, the likelihood is that of the scatter of the
    points. Given the rest, the mean is normal around their average and cut off by the box: its
    first element is drawn from its marginal, the second given the first. What the box leaves of
    both goes into the weights, and as far as the rest determines it, into the proposal. Signs of
    the third and the fourth parameter are arbitrary, and their logarithms have scales that do not
    depend on the data.
    """
    average = x.mean(0)
    scatter = (x - average).T @ (x - average)

    def log_density(rest: Tensor) -> Tensor:
        first, second, rho, complement = _scales(rest)
        standard = scatter[0, 0] / first**2 + scatter[1, 1] / second**2
        product = 2 * rho * scatter[0, 1] / (first * second)
        exponent = 0.5 * (standard - product) / complement**2
        # all but one of the four determinants, and the Jacobian of the logarithms
        log_factor = rest[:, :2].sum(-1) - (NUM_POINTS - 1) * (first * second * complement).log()
        return log_factor - exponent + _log_marginals_in_box(average, rest).sum(-1)

    # below these bounds the exponent of either variance alone exceeds 60
    lows = (0.25 * (scatter.diagonal() / 120).log()).clamp(max=math.log(BOUND) - 0.5).tolist()
    axes = [(low, math.log(BOUND), _GRID) for low in lows]
    axes.append((-BOUND, BOUND, _GRID))
    for factor in _DRAWS_PER_DRAW:
        rest, log_weights = draw_on_grid(log_density, axes, factor * num_draws)
        mean, log_inside = _draw_mean(average, rest)
        log_weights = log_weights + log_inside - _log_marginals_in_box(average, rest).sum(-1)
        if effective_draws(log_weights) >= 10 * num_draws:
            break
    signs = 2.0 * torch.randint(2, (len(rest), 2)).to(x) - 1
    theta = torch.cat([mean, signs * rest[:, :2].exp(), rest[:, 2:]], -1)
    return resample(theta, log_weights, num_draws)


def _draw_mean(average: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Draws in the box, shape ``(n, 2)``, and the log-probabilities of what was left to them."""
    first, second, rho, complement = _scales(rest)
    error = NUM_POINTS**-0.5
    mean_1, log_inside_1 = _draw_in_box(average[0], error * first)
    centre = average[1] + rho * second / first * (mean_1 - average[0])
    mean_2, log_inside_2 = _draw_in_box(centre, error * second * complement)
    return torch.stack([mean_1, mean_2], -1), log_inside_1 + log_inside_2


def _scales(rest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standard deviations, correlation, and the square root of one minus its square."""
    first, second = (2 * rest[:, :2]).exp().unbind(-1)
    return first, second, rest[:, 2].tanh(), 1 / rest[:, 2].cosh()


def _log_marginals_in_box(average: Tensor, rest: Tensor) -> Tensor:
    """Log-probability that each element of the mean alone is in the box, shape ``(n, 2)``."""
    scale = (2 * rest[:, :2]).exp() * NUM_POINTS**-0.5
    return _log_probability_in_box(average.expand_as(scale), scale)


def _log_probability_in_box(centre: Tensor, scale: Tensor) -> Tensor:
    # by symmetry in the lower tail, where probabilities are accurate
    high = torch.special.log_ndtr((BOUND - centre.abs()) / scale)
    low = torch.special.log_ndtr((-BOUND - centre.abs()) / scale)
    return high + (-(low - high).exp()).log1p()


def _draw_in_box(centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Normal draws cut off by the box, and the log-probability of what is left."""
    high = torch.special.ndtr((BOUND - centre.abs()) / scale)
    low = torch.special.ndtr((-BOUND - centre.abs()) / scale)
    standard = torch.special.ndtri(low + (high - low) * torch.rand_like(scale))
    draws = torch.where(centre > 0, 1.0, -1.0) * (centre.abs() + scale * standard)
    # where nothing of the probability is left in double precision, neither is the weight
    return draws.clamp(-BOUND, BOUND), _log_probability_in_box(centre.expand_as(scale), scale)


SLCP = Task(
    "slcp",
    model,
    lambda: torch.tensor(OBSERVATION),
    torch.tensor(TRUTH),
    log_posterior=_log_posterior,
    reference=_reference,
)
