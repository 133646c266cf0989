"""What a task is, and draws from its exact posterior."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

__all__ = [
    "Reference",
    "SimulatorDistribution",
    "Task",
    "cached_reference",
    "draw_on_grid",
    "effective_draws",
    "resample",
]

_CACHE = Path(__file__).parent.parent / "output" / "simulators"


class Reference(NamedTuple):
    """Draws from the exact posterior."""

    draws: Tensor
    """Shape ``(num_draws, d)``."""

    ess: float
    """Effective number of independent draws that they were made from or amount to."""


class Task(NamedTuple):
    """A simulator, an observation, and what is known about the posterior."""

    name: str
    """Key of the task in ``TASKS``."""

    model: Callable[[], Any]
    """Pyro model of the latent ``theta``, shape ``(d,)``, and the observed ``x``."""

    observation: Callable[[], Tensor]
    """The value of ``x`` that the literature conditions on, or one simulated with a fixed seed."""

    truth: Tensor | None
    """Parameters that the observation was simulated with, where there are any."""

    nuisance: tuple[str, ...] = ()
    """Latents besides ``theta``: noise."""

    log_posterior: Callable[[Tensor, Tensor], Tensor] | None = None
    """From ``theta``, ``(n, d)``, and ``x`` to log-densities ``(n,)`` up to a constant."""

    reference: Callable[[Tensor, int], Reference] | None = None
    """From ``x`` and a number of draws to exact draws; ``None`` where nobody knows how."""


class SimulatorDistribution(TorchDistribution):
    """
    A distribution that can be drawn from, and no more.

    :param simulate: from parameters, shape ``(n, d)``, to outputs, ``(n,) + event_shape``.
    :param Tensor theta: parameters, shape ``batch_shape + (d,)``.
    :param event_shape: shape of one output.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"theta": constraints.real_vector}
    has_rsample = False

    def __init__(
        self,
        simulate: Callable[[Tensor], Tensor],
        theta: Tensor,
        event_shape: torch.Size,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.simulate, self.theta = simulate, theta
        super().__init__(theta.shape[:-1], event_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> Any:
        """All arrays; a simulation that failed is NaN."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> SimulatorDistribution:
        theta = self.theta.expand(*batch_shape, -1)
        return SimulatorDistribution(self.simulate, theta, self.event_shape, validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        theta = self.theta.expand(*sample_shape, *self.theta.shape)
        with torch.no_grad():
            result = self.simulate(theta.reshape(-1, theta.shape[-1]))
        return result.reshape(*theta.shape[:-1], *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError("This simulator has no likelihood in closed form.")


def cached_reference(task: Task, num_draws: int, x: Tensor | None = None) -> Reference:
    """
    Draws from the exact posterior, computed once and kept in ``benchmarks/output``.

    :param Task task: one that has a reference.
    :param int num_draws: number of draws.
    :param Tensor x: observation, the task's own by default.
    :raises ValueError: for a task without reference.
    """
    if task.reference is None:
        raise ValueError(f"Nobody knows how to draw from the posterior of {task.name!r}.")
    x = (task.observation() if x is None else x).double()
    digest = hashlib.sha256(x.numpy().tobytes()).hexdigest()[:12]
    path = _CACHE / f"{task.name}_{digest}_{num_draws}.pt"
    if path.exists():
        return Reference(**torch.load(path, weights_only=True))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        result = task.reference(x, num_draws)
    os.makedirs(_CACHE, exist_ok=True)
    torch.save(result._asdict(), path)
    return result


def draw_on_grid(
    log_density: Callable[[Tensor], Tensor], axes: list[tuple[float, float, int]], num: int
) -> tuple[Tensor, Tensor]:
    """
    Draw from a density in few dimensions by importance sampling from a histogram of it.

    The proposal is constant on the cells of a grid, with the density at their middles.

    :param log_density: from points, ``(n, d)``, to log-densities up to a constant.
    :param axes: ``(low, high, number of cells)`` of each.
    :param int num: number of draws.
    :returns: draws, shape ``(num, d)``, and log-weights up to a constant.
    """
    edges = [torch.linspace(low, high, n + 1, dtype=torch.float64) for low, high, n in axes]
    middles = torch.cartesian_prod(*(0.5 * (e[1:] + e[:-1]) for e in edges))
    middles = middles.reshape(len(middles), len(axes))
    log_mass = torch.cat([log_density(chunk) for chunk in middles.split(100_000)])
    cells = torch.multinomial(torch.softmax(log_mass, 0), num, replacement=True)
    widths = torch.stack([e[1] - e[0] for e in edges])
    draws = middles[cells] + (torch.rand(num, len(axes), dtype=torch.float64) - 0.5) * widths
    return draws, log_density(draws) - log_mass[cells]


def effective_draws(log_weights: Tensor) -> float:
    """Kish's effective number of weighted draws."""
    return float(1 / torch.softmax(log_weights, 0).square().sum())


def resample(draws: Tensor, log_weights: Tensor, num_draws: int) -> Reference:
    """
    Draws of equal weight from many more weighted ones, without repetition, in random order.

    :raises ValueError: if fewer than ten times as many effective draws are there.
    """
    ess = effective_draws(log_weights)
    if ess < 10 * num_draws:
        raise ValueError(f"{ess:.0f} effective draws are too few to choose {num_draws} from.")
    chosen = torch.multinomial(torch.softmax(log_weights, 0), num_draws)
    # those with larger weights tend to be chosen first
    return Reference(draws[chosen[torch.randperm(num_draws)]], ess)
