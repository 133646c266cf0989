r"""A noisy neuron of which only the voltage is seen: the simulator, and a check.

The FitzHugh-Nagumo equations with noise in both components,

.. math::

    dv = \frac{1}{\epsilon}\left(v - v^3 - r\right) dt + \sigma_v\, dW_v, \qquad
    dr = (\gamma v - r + \beta)\, dt + \sigma_r\, dW_r,

are solved by the Euler-Maruyama scheme. The voltage v is recorded once every few steps, without
error. What it does in between, and the recovery variable r at all times, is never seen: the
likelihood of a recording is an integral over all of it.

:func:`log_likelihood` estimates that integral by a particle filter, without bias. By it
:func:`importance_posterior` samples the posterior of :func:`neuron_model` in an unrelated way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = [
    "PARAMETER_NAMES",
    "PRIOR_LOC",
    "PRIOR_SCALE",
    "THETA_TRUE",
    "Recording",
    "WeightedDraws",
    "importance_posterior",
    "log_likelihood",
    "neuron_model",
    "parameters",
    "recorded_sites",
    "true_path",
]

PARAMETER_NAMES = ("epsilon", "gamma", "beta", "sigma_r")
THETA_TRUE = (0.2, 1.5, 0.8, 0.3)
# normal priors of log epsilon, log gamma, beta and log sigma_r
PRIOR_LOC = (-1.5, 0.5, 0.5, -1.0)
PRIOR_SCALE = (0.5, 0.5, 0.5, 0.5)
VOLTAGE_NOISE = 0.1
START_VOLTAGE = -0.5
START_RECOVERY = (0.0, 0.5)  # mean and standard deviation


class Recording(NamedTuple):
    """How the voltage is recorded."""

    num_values: int = 30
    steps_between: int = 4
    step: float = 0.05

    @property
    def times(self) -> Tensor:
        """When, in units of the equations' time."""
        return self.step * self.steps_between * torch.arange(1, self.num_values + 1)


RECORDING = Recording()


def parameters(inputs: Tensor) -> Tensor:
    """
    Epsilon, gamma, beta and sigma_r from standard normal inputs.

    :param Tensor inputs: shape ``(..., 4)``.
    """
    raw = inputs.new_tensor(PRIOR_LOC) + inputs.new_tensor(PRIOR_SCALE) * inputs
    return torch.stack([raw[..., 0].exp(), raw[..., 1].exp(), raw[..., 2], raw[..., 3].exp()], -1)


def drift(v: Tensor, r: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rates of change of voltage and recovery."""
    epsilon, gamma, beta, _ = theta
    return (v - v * v * v - r) / epsilon, gamma * v - r + beta


def neuron_model(recording: Recording = RECORDING) -> None:
    """
    Draw parameters and noise, and simulate; nothing here knows the data.

    Every recorded voltage is a deterministic site ``v_0``, ``v_1``, ... After a site that is
    conditioned, the simulation goes on from the voltage that was *recorded*.

    :param Recording recording: what is recorded.
    """
    theta = parameters(pyro.sample("inputs", dist.Normal(0.0, 1.0).expand([4]).to_event(1)))
    pyro.deterministic("theta", theta)
    start = pyro.sample("start", dist.Normal(*START_RECOVERY))
    shape = [recording.num_values, recording.steps_between, 2]
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand(shape).to_event(3))
    matrix, cubic, drive = _euler(theta, noise, recording.step)
    state = torch.stack([torch.full_like(start, START_VOLTAGE), start])
    path = []
    for i, driven in enumerate(drive.unbind(0)):
        for push in driven.unbind(0):
            state = matrix @ state - cubic * state * state * state + push
            path.append(state)
        voltage = pyro.deterministic(f"v_{i}", state[0])
        state = torch.stack([voltage, state[1]])
    pyro.deterministic("path", torch.stack(path))


def _euler(theta: Tensor, noise: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """Write a step as ``matrix @ state - cubic * state**3 + drive``: few operations per step."""
    epsilon, gamma, beta, sigma_r = theta
    rate, zero, one = step / epsilon, torch.zeros_like(beta), torch.ones_like(beta)
    matrix = torch.stack([1 + rate, -rate, step * gamma, (1 - step) * one]).reshape(2, 2)
    cubic = torch.stack([rate, zero])
    scale = math.sqrt(step) * torch.stack([VOLTAGE_NOISE * one, sigma_r])
    return matrix, cubic, scale * noise + torch.stack([zero, step * beta])


def recorded_sites(voltages: Tensor) -> dict[str, Tensor]:
    """
    Name the recorded voltages as the sites of :func:`neuron_model`.

    :param Tensor voltages: shape ``(num_values,)``.
    """
    return {f"v_{i}": v for i, v in enumerate(voltages)}


def true_path(recording: Recording = RECORDING, seed: int = 1) -> Tensor:
    """
    Simulate a neuron with the true parameters.

    :param Recording recording: how long.
    :param int seed: seed of the noise.
    :returns: voltage and recovery after every step, shape ``(num_steps, 2)``, float64.
    """
    generator = torch.Generator().manual_seed(seed)
    num_steps = recording.num_values * recording.steps_between
    noise = torch.randn(num_steps, 2, generator=generator, dtype=torch.float64)
    theta = torch.tensor(THETA_TRUE, dtype=torch.float64).unbind()
    v, r = noise.new_tensor(START_VOLTAGE), noise.new_tensor(START_RECOVERY[0])
    root, path = math.sqrt(recording.step), []
    for noise_v, noise_r in noise:
        dv, dr = drift(v, r, theta)
        v = v + recording.step * dv + root * VOLTAGE_NOISE * noise_v
        r = r + recording.step * dr + root * theta[3] * noise_r
        path.append(torch.stack([v, r]))
    return torch.stack(path)


# ------------------------------------------------------------------------------------------ check


def log_likelihood(
    theta: Tensor,
    voltages: Tensor,
    recording: Recording = RECORDING,
    *,
    num_particles: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""
    Estimate the likelihood of a recording by a particle filter.

    Particles are simulated up to the step before a recorded voltage. The density of that last
    step, a normal one, is the weight, in proportion to which particles are resampled,
    systematically. The product of the mean weights is an unbiased estimate (Del Moral 2004,
    section 7.4.2).

    :param Tensor theta: parameter vectors, shape ``(n, 4)``, each with a filter of its own.
    :param Tensor voltages: what was recorded, shape ``(num_values,)``.
    :param Recording recording: when.
    :param int num_particles: particles of each filter.
    :param torch.Generator generator: source of randomness; torch's global one if not given.
    :returns: logarithms of the estimates, shape ``(n,)``.
    """
    shape = (len(theta), num_particles)
    rates = theta.unsqueeze(1).unbind(-1)
    root = math.sqrt(recording.step)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=theta.dtype)

    v = theta.new_full(shape, START_VOLTAGE)
    r = START_RECOVERY[0] + START_RECOVERY[1] * normal()
    total = theta.new_zeros(len(theta))
    for observed in voltages:
        for k in range(recording.steps_between):
            dv, dr = drift(v, r, rates)
            mean = v + recording.step * dv
            r = r + recording.step * dr + root * rates[3] * normal()
            if k < recording.steps_between - 1:
                v = mean + root * VOLTAGE_NOISE * normal()
        scale = root * VOLTAGE_NOISE
        log_weight = -0.5 * ((observed - mean) / scale).square() - math.log(
            scale * math.sqrt(2 * math.pi)
        )
        log_weight = log_weight.nan_to_num(nan=-math.inf)  # a simulation that overflowed
        total = total + log_weight.logsumexp(-1) - math.log(num_particles)
        r = r.gather(-1, _systematic(log_weight, generator))
        v = torch.full_like(r, float(observed))
    return total


def _systematic(log_weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw indices of the particles to go on with, evenly spread over the weights."""
    n, num_particles = log_weight.shape
    is_lost = log_weight.amax(-1, keepdim=True) == -math.inf
    cumulative = torch.where(is_lost, 0.0, log_weight).softmax(-1).cumsum(-1)
    offset = torch.rand(n, 1, generator=generator, dtype=log_weight.dtype)
    places = (torch.arange(num_particles) + offset) / num_particles
    return torch.searchsorted(cumulative, places).clamp(max=num_particles - 1)


class WeightedDraws(NamedTuple):
    """
    Draws from a proposal and their weights.

    ``inputs``
        standard normal inputs of the parameters, shape ``(n, 4)``.
    ``weights``
        shape ``(n,)``, which add up to one.
    """

    inputs: Tensor
    weights: Tensor

    @property
    def effective_size(self) -> float:
        """How many draws of equal weight say as much about an average."""
        return float(1 / self.weights.square().sum())

    def mean_and_error(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """
        Estimate expectations.

        :param Tensor values: a function of the draws, shape ``(n, ...)``.
        :returns: the weighted mean, and its standard error by the delta method.
        """
        w = self.weights.reshape(-1, *[1] * (values.dim() - 1))
        mean = (w * values).sum(0)
        return mean, (w * (values - mean)).square().sum(0).sqrt()


def importance_posterior(
    voltages: Tensor,
    near: Tensor,
    recording: Recording = RECORDING,
    *,
    num_draws: int = 1000,
    num_particles: int = 1000,
    batch_size: int = 200,
) -> WeightedDraws:
    """
    Sample the posterior of the parameters by importance, with estimated likelihoods.

    As the estimates are unbiased, the weighted draws are those of the exact posterior, however the
    proposal was found (Tran, Scharth, Pitt and Kohn 2013, arXiv:1309.3339). The proposal is a
    multivariate Student distribution with 5 degrees of freedom.

    :param Tensor voltages: what was recorded, shape ``(num_values,)``.
    :param Tensor near: draws of the inputs of the parameters, shape ``(m, 4)``, whose mean and
        twice whose covariance the proposal takes.
    :param Recording recording: when.
    :param int num_draws: draws from the proposal.
    :param int num_particles: particles for each.
    :param int batch_size: filters that run at once.
    """
    ridge = 1e-4 * torch.eye(near.shape[-1], dtype=near.dtype)  # few draws span no volume
    covariance = 2 * torch.cov(near.T) + ridge
    proposal = dist.MultivariateStudentT(
        torch.tensor(5.0, dtype=near.dtype), near.mean(0), torch.linalg.cholesky(covariance)
    )
    inputs = proposal.sample((num_draws,))
    estimates = [
        log_likelihood(parameters(part), voltages, recording, num_particles=num_particles)
        for part in inputs.split(batch_size)
    ]
    log_prior = -0.5 * inputs.square().sum(-1)
    log_weight = torch.cat(estimates) + log_prior - proposal.log_prob(inputs)
    return WeightedDraws(inputs, log_weight.softmax(0))
