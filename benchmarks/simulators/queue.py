r"""M/G/1 queue (Papamakarios and Murray 2016): when customers leave, seen through five quantiles.

.. math:: \theta_1 \sim U[0, 10], \quad \theta_2 \sim U[0, 10], \quad \theta_3 \sim U[0, \tfrac13]

50 customers arrive with exponential gaps of rate :math:`\theta_3`, and each is served for a time
uniform on :math:`[\theta_1, \theta_1 + \theta_2]`. The data are logarithms of the minimum, the
quartiles and the maximum of the times between departures,

.. math:: D_i = s_i + \max(D_{i-1}, A_i), \qquad \delta_i = D_i - D_{i-1}.

The noise is a latent site and the output a deterministic one. The reference is brute force, with
a tolerance: the known exact samplers need all times, not their quantiles, and conditioning on the
quantiles with ConstrainedHMC is exact but hopelessly slow, since the density on the manifold jumps
wherever two times change places in the order.

Reference: Papamakarios and Murray 2016, "Fast epsilon-free inference of simulation models with
Bayesian conditional density estimation", appendix E; there the quantiles are whitened.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .rejection import Box, draw_by_rejection
from .task import Reference, Task

__all__ = ["QUEUE", "departure_gaps", "model", "quantiles"]

NUM_CUSTOMERS = 50
HIGH = (10.0, 10.0, 1 / 3)
TRUTH = (1.0, 4.0, 0.2)
_SEED = 123
_SIMULATIONS_PER_DRAW, _KEPT_PER_DRAW = 100_000, 20


def model() -> Tensor:
    """Draw parameters and noise, and run the queue."""
    high = torch.tensor(HIGH)
    theta = pyro.sample("theta", dist.Uniform(torch.zeros(3), high).to_event(1))
    unit = torch.zeros(NUM_CUSTOMERS), torch.ones(NUM_CUSTOMERS)
    service = pyro.sample("service", dist.Uniform(*unit).to_event(1))
    arrival = pyro.sample("arrival", dist.Exponential(unit[1]).to_event(1))
    gaps = departure_gaps(theta, service, arrival)
    return pyro.deterministic("x", quantiles(gaps).log(), event_dim=1)


def departure_gaps(theta: Tensor, service: Tensor, arrival: Tensor) -> Tensor:
    """
    Times between departures.

    :param Tensor theta: shape ``batch_shape + (3,)``.
    :param Tensor service: uniform noise of the times of service, ``batch_shape + (customers,)``.
    :param Tensor arrival: exponential noise of the gaps between arrivals, likewise.
    :returns: shape ``batch_shape + (customers,)``.
    """
    shortest, width, rate = theta.unsqueeze(-1).unbind(-2)
    services = (shortest + width * service).unbind(-1)
    arrivals = (arrival / rate).cumsum(-1).unbind(-1)
    departure = torch.zeros_like(arrivals[0])
    gaps = []
    for time, come in zip(services, arrivals, strict=True):
        gaps.append(time + (come - departure).clamp(min=0))
        departure = departure + gaps[-1]
    return torch.stack(gaps, -1)


def quantiles(values: Tensor) -> Tensor:
    """
    Minimum, quartiles and maximum along the last dimension, interpolated linearly.

    :param Tensor values: shape ``batch_shape + (n,)``.
    :returns: shape ``batch_shape + (5,)``.
    """
    ordered = values.sort(-1).values
    place = torch.linspace(0, values.shape[-1] - 1, 5, dtype=torch.float64)
    low = place.floor().long().clamp(max=values.shape[-1] - 2)
    weight = (place - low).to(values)
    return ordered[..., low] * (1 - weight) + ordered[..., low + 1] * weight


def _observation() -> Tensor:
    """A run with the true parameters."""
    with torch.random.fork_rng([]):
        torch.manual_seed(_SEED)
        theta = torch.tensor(TRUTH, dtype=torch.float64)
        service = torch.rand(NUM_CUSTOMERS, dtype=torch.float64)
        arrival = torch.empty(NUM_CUSTOMERS, dtype=torch.float64).exponential_()
        return quantiles(departure_gaps(theta, service, arrival)).log()


def _simulate(theta: Tensor) -> Tensor:
    """Data of many runs, in single precision: the quantiles are not that sensitive."""
    noise = torch.rand(2, NUM_CUSTOMERS, len(theta), dtype=torch.float32)
    service, arrival = noise[0].T, -torch.log1p(-noise[1]).T
    return quantiles(departure_gaps(theta.float(), service, arrival)).log().to(theta)


class _BelowMinimum:
    """Coordinates that know that no gap is shorter than the shortest service."""

    def to_real(self, theta: Tensor, x: Tensor) -> Tensor:
        # rounding may make them equal
        fraction = (theta / self._high(x)).clamp(max=1 - 1e-6)
        return fraction.logit()

    def from_real(self, real: Tensor, x: Tensor) -> Tensor:
        return real.sigmoid() * self._high(x)

    def _high(self, x: Tensor) -> Tensor:
        high = torch.tensor(HIGH, dtype=x.dtype).expand(*x.shape[:-1], 3)
        shortest = torch.minimum(high[..., 0], x[..., 0].exp())
        return torch.cat([shortest.unsqueeze(-1), high[..., 1:]], -1)


def _reference(x: Tensor, num_draws: int) -> Reference:
    """
    The nearest 0.02 % of 100,000 simulations for every draw.

    For the task's observation, 1,000 draws are at most 1.0 standard deviation of the noise off in
    the five data together. A classifier cannot tell them from those within three quarters of that
    (C2ST 0.49); without the regression it can a little (0.55).
    """
    prior = Box(torch.zeros(3, dtype=x.dtype), torch.tensor(HIGH, dtype=x.dtype))
    return draw_by_rejection(
        _simulate,
        prior,
        x,
        num_draws,
        num_simulations=_SIMULATIONS_PER_DRAW * num_draws,
        num_kept=_KEPT_PER_DRAW * num_draws,
        coordinates=_BelowMinimum(),
    )


QUEUE = Task(
    "queue",
    model,
    _observation,
    torch.tensor(TRUTH, dtype=torch.float64),
    nuisance=("service", "arrival"),
    reference=_reference,
)
