r"""An epidemic in a town of fixed size, seen every other day through noisy counts.

The model SIR with a random infection rate (a stochastic differential equation in steps of a day),

.. math::

    f_t = \beta \, s_t \, i_t \, e^{\sigma w_t - \sigma^2/2}, \qquad
    s_{t+1} = s_t e^{-f_t / s_t}, \qquad i_{t+1} = i_t + (s_t - s_{t+1}) - (1 - e^{-\gamma}) i_t,

with the susceptible and infectious fractions s and i, and the logarithm of the count observed with
a normal error, :math:`x_k = \log i_{2k} + \tau v_k`.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["EVERY", "NUISANCE", "NUM_DAYS", "TRUTH", "abc", "epidemic", "observed_data"]

NUM_DAYS, EVERY = 24, 2
FIRST = 0.01  # infectious at the start
WEATHER, ERROR = 0.3, 0.15  # sigma and tau
TRUTH = {"beta": 0.65, "gamma": 0.22}
NUISANCE = ("weather", "error")


def epidemic() -> Tensor:
    """Draw rates and noise, and simulate; written for one epidemic or for many at once."""
    beta = pyro.sample("beta", dist.LogNormal(-0.7, 0.5))
    gamma = pyro.sample("gamma", dist.LogNormal(-1.6, 0.4))
    weather = pyro.sample("weather", dist.Normal(0.0, 1.0).expand([NUM_DAYS]).to_event(1))
    error = pyro.sample("error", dist.Normal(0.0, 1.0).expand([NUM_DAYS // EVERY]).to_event(1))
    susceptible = (1.0 - FIRST) * torch.ones_like(beta)
    infectious = FIRST * torch.ones_like(beta)
    counts: list[Tensor] = []
    for day in range(NUM_DAYS):
        factor = (WEATHER * weather[..., day] - 0.5 * WEATHER**2).exp()
        left = susceptible * (-beta * factor * infectious).exp()
        infectious = infectious * (-gamma).exp() + (susceptible - left)
        susceptible = left
        if (day + 1) % EVERY == 0:
            counts.append(infectious.log())
    counted = torch.stack(counts, -1) + ERROR * error
    return pyro.deterministic("x", counted, event_dim=1)


def observed_data(seed: int = 3) -> Tensor:
    """Counts of one epidemic with the true rates, shape ``(12,)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = pyro.condition(epidemic, {k: torch.tensor(v) for k, v in TRUTH.items()})
        return model().detach()


def abc(latents: dict[str, Tensor], simulated: Tensor, x: Tensor, keep: int) -> dict[str, Tensor]:
    """
    Approximate Bayesian computation: the simulations nearest to the data.

    :param latents: draws from the prior, by site, shape ``(n,)``.
    :param Tensor simulated: what they gave, shape ``(n, d)``.
    :param Tensor x: the data, shape ``(d,)``.
    :param int keep: how many to keep.
    """
    if not 1 <= keep <= len(simulated):
        raise ValueError(f"keep={keep} of {len(simulated)} simulations")
    distance = ((simulated - x) / simulated.std(0)).square().sum(-1)
    nearest = distance.argsort()[:keep]
    return {name: value[nearest] for name, value in latents.items()}
