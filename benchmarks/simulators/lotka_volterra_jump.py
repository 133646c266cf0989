r"""Lotka-Volterra as a Markov jump process (Papamakarios and Murray 2016): no likelihood.

From 50 predators :math:`X` and 100 prey :math:`Y`, with rates that are exponentials of
:math:`\theta \sim U[-5, 2]^4`:

==========================  ==================
rate                        event
==========================  ==================
:math:`e^{\theta_1} X Y`    one predator more
:math:`e^{\theta_2} X`      one predator fewer
:math:`e^{\theta_3} Y`      one prey more
:math:`e^{\theta_4} X Y`    one prey fewer
==========================  ==================

Populations are recorded at times 0, 0.2, ..., 30 and summarised by nine numbers. A simulation with
more than 10,000 events fails: it is NaN. Nobody can draw from the exact posterior given the
summaries, so that this task has no reference.

Reference: Papamakarios and Murray 2016, "Fast epsilon-free inference of simulation models with
Bayesian conditional density estimation", appendix F.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .task import SimulatorDistribution, Task

__all__ = ["LOTKA_VOLTERRA_JUMP", "model", "simulate", "summaries"]

START = (50.0, 100.0)
INTERVAL, NUM_TIMES = 0.2, 151
MAX_EVENTS = 10_000
LOW, HIGH = -5.0, 2.0
TRUTH = (math.log(0.01), math.log(0.5), 0.0, math.log(0.01))
_SEED = 123
_CHANGES = ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))


def model() -> Tensor:
    """Draw logarithms of rates, and simulate."""
    bound = torch.ones(4)
    theta = pyro.sample("theta", dist.Uniform(LOW * bound, HIGH * bound).to_event(1))
    event = torch.Size([9])
    return pyro.sample("x", SimulatorDistribution(_summarised, theta, event, validate_args=False))


def simulate(theta: Tensor, *, max_events: int = MAX_EVENTS) -> Tensor:
    """
    Populations by Gillespie's algorithm, the next event of every simulation in one step.

    :param Tensor theta: logarithms of rates, shape ``(n, 4)``.
    :param int max_events: a simulation with more events fails.
    :returns: predators and prey at the times, shape ``(n, 151, 2)``, NaN where it failed.
    """
    number = len(theta)
    # one place more than there are times, for what is not to be recorded
    record = theta.new_zeros(number, NUM_TIMES + 1, 2)
    is_recorded = torch.zeros(number, NUM_TIMES + 1, dtype=torch.bool)
    rows, rates = torch.arange(number), theta.exp()
    state = theta.new_tensor(START).repeat(number, 1)
    time, index = theta.new_zeros(number), torch.zeros(number, dtype=torch.long)
    changes = theta.new_tensor(_CHANGES)
    for _ in range(max_events + 1):
        predators, prey = state.unbind(-1)
        meetings = predators * prey
        hazards = torch.stack([meetings, predators, prey, meetings], -1) * rates
        cumulative = hazards.cumsum(-1)
        total = cumulative[:, -1]
        # infinite where everybody has died
        time = time + torch.empty_like(total).exponential_() / total
        # the times between the last event and this one have the state between the two
        following = (time / INTERVAL).ceil().clamp(max=NUM_TIMES).long()
        place = torch.where(following > index, index, NUM_TIMES)
        record[rows, place] = state
        is_recorded[rows, place] = True
        index = torch.maximum(index, following)
        event = (torch.rand_like(total).mul(total)[:, None] >= cumulative[:, :3]).sum(-1)
        state = state + changes[event]
        is_live = index < NUM_TIMES
        if not is_live.all():
            if not is_live.any():
                break
            rows, rates, state, time, index = (
                each[is_live] for each in (rows, rates, state, time, index)
            )
    else:
        record[rows] = torch.nan
    # a state lasts until the next one that was recorded
    last = torch.where(is_recorded, torch.arange(NUM_TIMES + 1), 0).cummax(-1).values
    return record.gather(1, last[:, :NUM_TIMES, None].expand(-1, -1, 2))


def summaries(populations: Tensor) -> Tensor:
    """
    Nine numbers about two series.

    Logarithms of mean plus one and of variance plus one of each series, autocorrelations of
    each at lags 1 and 2, and their correlation; those of a constant series are zero.

    :param Tensor populations: shape ``(n, num_times, 2)``.
    :returns: shape ``(n, 9)``.
    """
    mean, variance = populations.mean(1), populations.var(1)
    centred = populations - mean[:, None]
    scale = variance.sqrt()[:, None]
    standard = torch.where(scale == 0, torch.zeros_like(centred), centred / scale)
    degrees = populations.shape[1] - 1
    lags = [(standard[:, :-k] * standard[:, k:]).sum(1) / degrees for k in (1, 2)]
    correlation = standard.prod(-1).sum(-1, keepdim=True) / degrees
    by_series = torch.stack(lags, -1).flatten(1)
    return torch.cat([mean.log1p(), variance.log1p(), by_series, correlation], -1)


def _summarised(theta: Tensor) -> Tensor:
    return summaries(simulate(theta))


def _observation() -> Tensor:
    """A simulation with the true rates."""
    with torch.random.fork_rng([]):
        torch.manual_seed(_SEED)
        return _summarised(torch.tensor([TRUTH], dtype=torch.float64))[0]


LOTKA_VOLTERRA_JUMP = Task(
    "lotka_volterra_jump", model, _observation, torch.tensor(TRUTH, dtype=torch.float64)
)
