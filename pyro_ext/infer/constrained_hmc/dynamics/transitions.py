"""Constrained HMC transitions: draw a momentum, follow the dynamics, accept or reject."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..system.chainwise import select_chains
from ..system.constrained_system import Point, System, project_momentum, total_energy
from .integrator import IntegratorSettings, PhaseState, leapfrog_step
from .status import Status

__all__ = ["TransitionInfo", "draw_momentum", "hmc_transition", "mark_divergent"]

_DIVERGENCE_THRESHOLD = 1e3


class TransitionInfo(NamedTuple):
    """What happened to each chain during one transition; all tensors are ``(chains,)``."""

    accept_prob: Tensor
    is_accepted: Tensor
    status: Tensor
    num_steps: Tensor
    projection_iterations: Tensor
    constraint_residual: Tensor
    energy: Tensor


def hmc_transition(
    system: System,
    scale: Tensor,
    settings: IntegratorSettings,
    point: Point,
    residual: Tensor,
    step_size: float,
    num_steps: int,
) -> tuple[Point, TransitionInfo, PhaseState]:
    r"""
    One transition that leaves the target on the manifold invariant.

    A trajectory is accepted with probability :math:`\min(1, \exp(H - H'))`, and rejected
    if any of its steps failed (Graham and Storkey 2017, algorithm 1, lines 1-8).

    :param system: the constrained system.
    :param Tensor scale: scale of each input, ``(dim,)``.
    :param settings: integrator settings.
    :param point: current positions, on the manifold.
    :param Tensor residual: their largest residuals, ``(chains,)``.
    :param float step_size: time step.
    :param int num_steps: integrator steps, the same for all chains.
    :returns: the new positions, what happened, and the ends of the trajectories, accepted or not
        (where a step failed, the end is the last point before it).
    """
    start = draw_momentum(point)
    start_energy = total_energy(*start)
    uniform = torch.rand_like(residual)
    status = torch.zeros(len(residual), dtype=torch.long, device=residual.device)
    iterations, end_residual = torch.zeros_like(status), residual
    end, steps = start, torch.zeros_like(status)
    for _ in range(num_steps):
        steps += status == Status.CONVERGED
        end, info = leapfrog_step(system, scale, settings, end, step_size, status)
        status, iterations = info.status, iterations + info.iterations
        end_residual = info.residual
        if not (status == Status.CONVERGED).any():
            break
    change = total_energy(*end) - start_energy
    status = mark_divergent(status, change)
    accept_prob = (-change).exp().clamp(max=1.0)
    accept_prob = torch.where(status == Status.CONVERGED, accept_prob, 0.0)
    is_accepted = uniform < accept_prob
    state = select_chains(is_accepted, end, start)
    info_of_draw = TransitionInfo(
        accept_prob=accept_prob,
        is_accepted=is_accepted,
        status=status,
        num_steps=steps,
        projection_iterations=iterations,
        constraint_residual=torch.where(is_accepted, end_residual, residual),
        energy=total_energy(*state),
    )
    return state.point, info_of_draw, end


def draw_momentum(point: Point) -> PhaseState:
    """Standard normal momenta in the cotangent spaces (algorithm 1, lines 2-3)."""
    return PhaseState(point, project_momentum(point.jacobian, torch.randn_like(point.position)))


def mark_divergent(status: Tensor, energy_change: Tensor) -> Tensor:
    """Give chains without a failure so far whose energy is far off the status ``DIVERGENT``."""
    # comparisons with NaN are false
    is_divergent = ~(energy_change.abs() <= _DIVERGENCE_THRESHOLD)
    is_divergent &= status == Status.CONVERGED
    return torch.where(is_divergent, int(Status.DIVERGENT), status)
