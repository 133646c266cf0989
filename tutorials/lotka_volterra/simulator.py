r"""Lotka-Volterra: the data, the simulator, the Pyro models and the exact posterior.

Prey :math:`q_1` and predators :math:`q_2` follow an Euler-Maruyama recursion with time step 1,

.. math::

    q_1 \leftarrow q_1 + \theta_1 q_1 - \theta_2 q_1 q_2 + n_1, \qquad
    q_2 \leftarrow q_2 - \theta_3 q_2 + \theta_4 q_1 q_2 + n_2, \qquad
    n_1, n_2 \sim N(0, 1),

from :math:`q = (100, 100)`; both populations are observed, without error, after each of 50 steps.
The priors are :math:`\log\theta_i \sim N(-2, 1)`.

The example is section 7.1 of Graham & Storkey, "Asymptotically exact inference in differentiable
generative models", AISTATS 2017, https://proceedings.mlr.press/v54/graham17a.html. Its likelihood
happens to be tractable (the process is Markov and fully observed), which makes it a good test:
what a likelihood-free method returns can be held against :func:`exact_posterior`.
"""

from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq
from torch import Tensor

__all__ = [
    "DATA_SEED",
    "INITIAL_POPULATIONS",
    "NUM_STEPS",
    "PARAMETER_NAMES",
    "PRIOR_LOC",
    "PRIOR_SCALE",
    "THETA_TRUE",
    "ExactPosterior",
    "Marginal",
    "data_by_steps",
    "exact_posterior",
    "model",
    "model_by_steps",
    "normals_from_parameters",
    "observed_data",
    "one_step_mean",
    "parameters_from_normals",
    "simulate",
    "simulate_from_normals",
    "solve_noise",
    "start_on_data",
    "tractable_model",
]

NUM_STEPS = 50
INITIAL_POPULATIONS = (100.0, 100.0)
THETA_TRUE = (0.4, 0.005, 0.05, 0.001)
PARAMETER_NAMES = ("theta1", "theta2", "theta3", "theta4")
PRIOR_LOC = -2.0
PRIOR_SCALE = 1.0
DATA_SEED = 1234


def simulate(theta: Tensor, noise: Tensor) -> Tensor:
    """
    Run the whole recursion, as a user would write it: nothing here knows the observations.

    Any leading batch dimensions broadcast, and since nothing is written in place the function can
    also be batched with :func:`torch.func.vmap`.

    :param Tensor theta: prey birth, predation, predator death and predator growth rates, shape
        ``batch_shape + (4,)``.
    :param Tensor noise: standard normal noise of (prey, predators) in every step, shape
        ``batch_shape + (num_steps, 2)``.
    :returns: populations (prey, predators) after every step, shape
        ``batch_shape + (num_steps, 2)``.
    :raises ValueError: if the last dimension of either input has the wrong size.
    """
    if theta.shape[-1:] != (4,):
        raise ValueError(f"theta must have shape (..., 4), got {tuple(theta.shape)}")
    if noise.dim() < 2 or noise.shape[-1] != 2:
        raise ValueError(f"noise must have shape (..., num_steps, 2), got {tuple(noise.shape)}")
    birth, predation, death, growth = theta.unbind(-1)
    prey_factor, predator_factor = 1 + birth, 1 - death
    prey, predators = INITIAL_POPULATIONS
    trajectory = []
    for prey_noise, predator_noise in zip(
        noise[..., 0].unbind(-1), noise[..., 1].unbind(-1), strict=True
    ):
        prey, predators = (
            prey * (prey_factor - predation * predators) + prey_noise,
            predators * (predator_factor + growth * prey) + predator_noise,
        )
        trajectory += [prey, predators]
    return torch.stack(trajectory, -1).unflatten(-1, (-1, 2))


def observed_data(seed: int = DATA_SEED, num_steps: int = NUM_STEPS) -> Tensor:
    """
    Simulate the observations from the true parameters.

    The noise comes from :class:`numpy.random.RandomState`, whose streams are frozen, in the order
    of the original authors' notebook: (prey, predators) of step 1, of step 2, and so on.

    :param int seed: seed of the noise.
    :param int num_steps: number of Euler-Maruyama steps.
    :returns: populations (prey, predators) after every step, shape ``(num_steps, 2)``, float64.
    """
    noise = np.random.RandomState(seed).normal(size=2 * num_steps).reshape(num_steps, 2)
    return simulate(torch.tensor(THETA_TRUE, dtype=torch.float64), torch.from_numpy(noise))


# ---------------------------------------------------------------------------------------- models


def model() -> Tensor:
    """
    Draw parameters and noise, and simulate.

    To make ``x`` data, condition the deterministic site on it::

        conditioned = pyro.condition(model, {"x": observed_data()})

    :returns: the simulated populations, shape ``(50, 2)``.
    """
    theta = pyro.sample("theta", _prior())
    noise = pyro.sample("noise", _standard_normal(NUM_STEPS, 2))
    return pyro.deterministic("x", simulate(theta, noise))


def model_by_steps(num_steps: int = NUM_STEPS) -> None:
    """
    Draw parameters and noise, and simulate, with a deterministic site for every step.

    Conditioned on :func:`data_by_steps`, a step continues from the *observed* state before it. The
    inputs that reproduce the data are the same as for :func:`model`, but every noise now touches
    one step alone, which makes sampling much faster::

        conditioned = pyro.condition(model_by_steps, data_by_steps(observed_data()))

    :param int num_steps: number of Euler-Maruyama steps.
    """
    birth, predation, death, growth = pyro.sample("theta", _prior()).unbind(-1)
    prey, predators = torch.tensor(INITIAL_POPULATIONS, dtype=birth.dtype)
    for t in range(num_steps):
        noise = pyro.sample(f"noise_{t}", _standard_normal(2))
        mean = [
            prey * (1 + birth - predation * predators),
            predators * (1 - death + growth * prey),
        ]
        prey, predators = pyro.deterministic(f"x_{t}", torch.stack(mean) + noise).unbind(-1)


def data_by_steps(x: Tensor) -> dict[str, Tensor]:
    """
    Observations by the names of the sites of :func:`model_by_steps`.

    :param Tensor x: populations after every step, shape ``(num_steps, 2)``.
    """
    return {f"x_{t}": x_t for t, x_t in enumerate(x)}


def tractable_model(x: Tensor | None = None) -> Tensor:
    r"""
    Draw parameters and score the data: same posterior of ``theta``, with a likelihood.

    Given its predecessor, each state is normal with unit variance, so

    .. math:: \log p(x \mid \theta) = \sum_t \log N(x_t \mid f_\theta(x_{t-1}), I).

    :param Tensor x: observed populations, shape ``(num_steps, 2)``; :func:`observed_data` if not
        given.
    :returns: one draw of ``theta``, shape ``(4,)``.
    """
    x = observed_data() if x is None else x
    theta = pyro.sample("theta", _prior())
    pyro.sample("x", dist.Normal(one_step_mean(theta, x), 1.0).to_event(2), obs=x)
    return theta


def _prior() -> dist.TorchDistribution:
    loc = torch.tensor(PRIOR_LOC, dtype=torch.float64)
    return dist.LogNormal(loc, torch.full_like(loc, PRIOR_SCALE)).expand([4]).to_event(1)


def _standard_normal(*shape: int) -> dist.TorchDistribution:
    loc = torch.zeros((), dtype=torch.float64)
    return dist.Normal(loc, torch.ones_like(loc)).expand(shape).to_event(len(shape))


def one_step_mean(theta: Tensor, x: Tensor) -> Tensor:
    r"""
    Return the noise-free next state of every *observed* state, :math:`f_\theta(x_{t-1})`.

    :param Tensor theta: parameters, shape ``batch_shape + (4,)``.
    :param Tensor x: populations after every step, shape ``(num_steps, 2)``.
    :returns: means of ``x`` given its own past, shape ``batch_shape + (num_steps, 2)``.
    """
    prey, predators = _previous(x).unbind(-1)
    birth, predation, death, growth = theta.unsqueeze(-1).unbind(-2)
    return torch.stack(
        [
            prey * (1 + birth - predation * predators),
            predators * (1 - death + growth * prey),
        ],
        -1,
    )


def _previous(x: Tensor) -> Tensor:
    return torch.cat([x.new_tensor(INITIAL_POPULATIONS).unsqueeze(0), x[:-1]])


# ------------------------------------------------------------- standardised inputs (ABC, starts)


def parameters_from_normals(z: Tensor) -> Tensor:
    r"""
    Map standard normal inputs to parameters, :math:`\theta = \exp(-2 + z)`.

    :param Tensor z: standard normal inputs, shape ``batch_shape + (4,)``.
    :returns: parameters, same shape.
    """
    return (PRIOR_LOC + PRIOR_SCALE * z).exp()


def simulate_from_normals(z: Tensor, noise: Tensor) -> Tensor:
    """
    Simulate from standard normal vectors alone, as the ABC baselines do.

    :param Tensor z: standard normal inputs of the parameters, shape ``batch_shape + (4,)``.
    :param Tensor noise: flat noise, shape ``batch_shape + (2 * num_steps,)``.
    :returns: flat populations, interleaved (prey, predators), same shape as ``noise``.
    """
    steps = noise.unflatten(-1, (-1, 2))
    return simulate(parameters_from_normals(z), steps).flatten(-2)


def solve_noise(theta: Tensor, x: Tensor) -> Tensor:
    r"""
    Solve for the noise with which ``simulate(theta, noise)`` returns exactly ``x``.

    :param Tensor theta: parameters, shape ``batch_shape + (4,)``.
    :param Tensor x: populations after every step, shape ``(num_steps, 2)``.
    :returns: the noise :math:`x_t - f_\theta(x_{t-1})`, shape ``batch_shape + (num_steps, 2)``.
    """
    return x - one_step_mean(theta, x)


def normals_from_parameters(theta: Tensor) -> Tensor:
    r"""
    Map parameters to standard normal inputs, :math:`z = \log\theta + 2`.

    :param Tensor theta: parameters, shape ``batch_shape + (4,)``.
    :returns: standard normal inputs, same shape.
    """
    return (theta.log() - PRIOR_LOC) / PRIOR_SCALE


def start_on_data(theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """
    Make starting points for ABC that reproduce the data exactly, one per row of parameters.

    The noise is solved for one step after the other (:func:`solve_noise`), which puts every chain
    at distance 0 from the data, inside a ball of any radius. How good a start that is depends on
    the parameters: the less plausible they are, the larger the noise they need, and the longer the
    chain takes to come back from it. The authors of the paper took the parameters of inputs
    ``z = -4 + 0.1 * torch.randn(num_chains, 4)``. Draws from the exact posterior need no warm-up
    of that kind; it is a head start that no likelihood-free method has in practice.

    :param Tensor theta: parameters, shape ``(num_chains, 4)``.
    :param Tensor x: observed populations, shape ``(num_steps, 2)``.
    :returns: inputs of the parameters, shape ``(num_chains, 4)``, and flat noise, shape
        ``(num_chains, 2 * num_steps)``.
    """
    return normals_from_parameters(theta), solve_noise(theta, x).flatten(-2)


# ------------------------------------------------------------------------------- exact posterior


class Marginal(NamedTuple):
    """Posterior density of one parameter on a grid, both of shape ``(num_points,)``."""

    theta: Tensor
    density: Tensor


class ExactPosterior(NamedTuple):
    """
    Summaries of the exact posterior; tensors of shape ``(4,)`` are in the order of the parameters.

    ``quantiles`` maps each level to a tensor of shape ``(4,)``; ``marginals`` holds one
    :class:`Marginal` per parameter.
    """

    mean: Tensor
    sd: Tensor
    log_mean: Tensor
    log_sd: Tensor
    quantiles: dict[float, Tensor]
    marginals: tuple[Marginal, ...]


def exact_posterior(
    x: Tensor | None = None,
    *,
    levels: tuple[float, ...] = (0.025, 0.05, 0.25, 0.5, 0.75, 0.95, 0.975),
    num_points: int = 1001,
    half_width: float = 9.0,
) -> ExactPosterior:
    r"""
    Compute the posterior of the parameters by quadrature, without any sampling.

    Given the data the next state is linear in the parameters, with :math:`\theta_1, \theta_2`
    only in the prey equation and :math:`\theta_3, \theta_4` only in the predators'. Hence

    .. math:: p(\theta \mid x) = p(\theta_1, \theta_2 \mid x)\, p(\theta_3, \theta_4 \mid x),

    and each factor is summed on a grid in log-parameters centred on its own Laplace approximation.
    The trapezoidal rule converges faster than any power of the spacing for such densities.

    :param Tensor x: observed populations, shape ``(num_steps, 2)``; :func:`observed_data` if not
        given.
    :param levels: probabilities of the quantiles.
    :param int num_points: grid points per axis.
    :param float half_width: half the width of the grid in posterior standard deviations.
    :returns: an :class:`ExactPosterior`, float64.
    :raises ValueError: if a level is not a probability.
    """
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels must be strictly between 0 and 1, got {levels}")
    x = (observed_data() if x is None else x).double().cpu()
    prey, predators = _previous(x).unbind(-1)
    increments = (x - _previous(x)).unbind(-1)
    meetings = prey * predators
    designs = (torch.stack([prey, -meetings], -1), torch.stack([-predators, meetings], -1))
    marginals = []
    for design, increment in zip(designs, increments, strict=True):
        marginals += _pair_marginals(design, increment, num_points, half_width)
    rows = [_summarise(log_theta, mass, levels) for log_theta, mass in marginals]
    mean, sd, log_mean, log_sd, *quantiles = torch.tensor(rows, dtype=torch.float64).T
    return ExactPosterior(
        mean=mean,
        sd=sd,
        log_mean=log_mean,
        log_sd=log_sd,
        quantiles=dict(zip(levels, quantiles, strict=True)),
        marginals=tuple(_density(log_theta, mass) for log_theta, mass in marginals),
    )


def _laplace(design: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    Approximate the posterior of one equation by a normal distribution in log-parameters.

    The model is the regression :math:`r = X e^a + N(0, I)` with :math:`a \sim N(-2, 1)`. Newton's
    method from the least-squares solution, which is close when the data say much.

    :param Tensor design: matrix X, shape ``(num_steps, 2)``.
    :param Tensor response: vector r, shape ``(num_steps,)``.
    :returns: mode and marginal standard deviations, each of shape ``(2,)``.
    """
    gram, moment = design.T @ design, design.T @ response
    log_theta = torch.linalg.solve(gram, moment).clamp(min=1e-6).log()
    hessian = torch.eye(2, dtype=design.dtype)
    for _ in range(50):
        theta = log_theta.exp()
        slope = theta * (gram @ theta - moment)
        gradient = slope + (log_theta - PRIOR_LOC) / PRIOR_SCALE**2
        hessian = theta[:, None] * gram * theta + torch.diag(slope + PRIOR_SCALE**-2)
        step = torch.linalg.solve(hessian, gradient)
        log_theta = log_theta - step
        if step.abs().max() < 1e-12:
            break
    return log_theta, torch.linalg.inv(hessian).diagonal().sqrt()


def _pair_marginals(
    design: Tensor, response: Tensor, num_points: int, half_width: float
) -> list[tuple[Tensor, Tensor]]:
    """
    Sum the posterior of one equation on a grid, for each of its log-parameters.

    :returns: for each parameter its grid and the mass at each point, shapes ``(num_points,)``.
    """
    mode, scale = _laplace(design, response)
    unit = torch.linspace(-half_width, half_width, num_points, dtype=design.dtype)
    first, second = mode[0] + scale[0] * unit, mode[1] + scale[1] * unit
    grid = torch.cartesian_prod(first, second)
    theta = grid.exp()
    gram, moment = design.T @ design, design.T @ response
    log_likelihood = theta @ moment - 0.5 * (theta @ gram * theta).sum(-1)
    log_prior = -0.5 * ((grid - PRIOR_LOC) / PRIOR_SCALE).square().sum(-1)
    mass = torch.softmax(log_likelihood + log_prior, 0).reshape(num_points, num_points)
    return [(first, mass.sum(1)), (second, mass.sum(0))]


def _summarise(log_theta: Tensor, mass: Tensor, levels: tuple[float, ...]) -> list[float]:
    """Compute mean, sd, mean and sd of the logarithm, and the quantiles, in this order."""
    summary = []
    for values in (log_theta.exp(), log_theta):
        mean = mass @ values
        summary += [mean.item(), (mass @ (values - mean).square()).sqrt().item()]
    points = log_theta.numpy()
    cdf = CubicSpline(points, mass.numpy()).antiderivative()
    total = cdf(points[-1])
    roots = [brentq(lambda a, p=p: cdf(a) / total - p, points[0], points[-1]) for p in levels]
    return summary + [float(np.exp(root)) for root in roots]


def _density(log_theta: Tensor, mass: Tensor) -> Marginal:
    """Change variables from the logarithm to the parameter itself."""
    theta = log_theta.exp()
    return Marginal(theta, mass / (log_theta[1] - log_theta[0]) / theta)
