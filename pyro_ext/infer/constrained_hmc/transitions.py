"""Constrained HMC transitions: draw a momentum, follow the dynamics, accept or reject."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chainwise import join_chains, select_chains, split_chains
from .integrator import IntegratorSettings, PhaseState, leapfrog_step
from .status import Status
from .structure import LinAlgError
from .system import Point, System, project_momentum, total_energy

__all__ = ["TransitionInfo", "hmc_transition"]

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
) -> tuple[Point, TransitionInfo]:
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
    :returns: the new positions and what happened.
    """
    noise, uniform = torch.randn_like(point.position), torch.rand_like(residual)
    arguments = (system, scale, settings, step_size, num_steps)
    try:
        return _transition(*arguments, point, residual, noise, uniform)
    except LinAlgError:  # an operation of the model refused the input of a chain
        chains = split_chains((point, residual, noise, uniform))
        return join_chains([_single_transition(*arguments, *chain) for chain in chains])


def _transition(
    system: System,
    scale: Tensor,
    settings: IntegratorSettings,
    step_size: float,
    num_steps: int,
    point: Point,
    residual: Tensor,
    noise: Tensor,
    uniform: Tensor,
) -> tuple[Point, TransitionInfo]:
    momentum = project_momentum(point.jacobian, noise)
    start = PhaseState(point, momentum)
    start_energy = total_energy(point, momentum)
    status = torch.zeros(len(residual), dtype=torch.long, device=residual.device)
    iterations, end_residual = torch.zeros_like(status), residual
    state, steps = start, torch.zeros_like(status)
    for _ in range(num_steps):
        steps += status == Status.CONVERGED
        state, info = leapfrog_step(system, scale, settings, state, step_size, status)
        status, iterations = info.status, iterations + info.iterations
        end_residual = info.residual
        if not (status == Status.CONVERGED).any():
            break
    change = total_energy(*state) - start_energy
    is_divergent = ~(change.abs() <= _DIVERGENCE_THRESHOLD)
    status = torch.where(
        is_divergent & (status == Status.CONVERGED), int(Status.DIVERGENT), status
    )
    accept_prob = (-change).exp().clamp(max=1.0)
    accept_prob = torch.where(status == Status.CONVERGED, accept_prob, 0.0)
    is_accepted = uniform < accept_prob
    state = select_chains(is_accepted, state, start)
    return state.point, TransitionInfo(
        accept_prob=accept_prob,
        is_accepted=is_accepted,
        status=status,
        num_steps=steps,
        projection_iterations=iterations,
        constraint_residual=torch.where(is_accepted, end_residual, residual),
        energy=total_energy(*state),
    )


def _single_transition(
    system: System,
    scale: Tensor,
    settings: IntegratorSettings,
    step_size: float,
    num_steps: int,
    point: Point,
    residual: Tensor,
    noise: Tensor,
    uniform: Tensor,
) -> tuple[Point, TransitionInfo]:
    """One chain on its own: where the model raises, the proposal is rejected."""
    arguments = (system, scale, settings, step_size, num_steps)
    try:
        return _transition(*arguments, point, residual, noise, uniform)
    except LinAlgError:
        zero = torch.zeros(1, dtype=torch.long, device=residual.device)
        return point, TransitionInfo(
            accept_prob=torch.zeros_like(residual),
            is_accepted=zero.bool(),
            status=zero + int(Status.DIVERGENT),
            num_steps=zero,
            projection_iterations=zero,
            constraint_residual=residual,
            energy=total_energy(point, project_momentum(point.jacobian, noise)),
        )
