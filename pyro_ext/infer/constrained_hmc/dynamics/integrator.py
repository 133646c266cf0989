r"""One step of the geodesic RATTLE integrator (Graham and Storkey 2017, algorithm 1).

Half a momentum update, ``num_inner_steps`` geodesic steps, half a momentum update. Every
geodesic step is retraced from its end; a chain that does not come back to where it started
is marked, because only a reversible step leaves the target invariant when the solver could
have landed on another sheet of the manifold.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..jacobian.structure import Jacobian, LinAlgError
from ..system.chainwise import join_chains, select_chains, split_chains, take_chains
from ..system.constrained_system import Point, System, project_momentum
from .projection import Equations, Projection, Projector, Tolerances
from .status import Status

__all__ = ["IntegratorSettings", "PhaseState", "StepInfo", "leapfrog_step"]


class IntegratorSettings(NamedTuple):
    """How to integrate; the same for all chains."""

    projector: Projector
    fallback: Projector | None
    tolerances: Tolerances
    num_inner_steps: int


class PhaseState(NamedTuple):
    """A batch of points in phase space."""

    point: Point
    momentum: Tensor  # (chains, dim) in the cotangent space


class StepInfo(NamedTuple):
    """What happened to each chain during one step."""

    status: Tensor  # (chains,) values of :class:`Status`
    iterations: Tensor  # (chains,) evaluations of the constraint
    residual: Tensor  # (chains,) largest |c| at the end


def leapfrog_step(
    system: System,
    scale: Tensor,
    settings: IntegratorSettings,
    state: PhaseState,
    step_size: float | Tensor,
    status: Tensor,
) -> tuple[PhaseState, StepInfo]:
    """
    Advance every chain that has not failed by one step.

    :param system: the constrained system.
    :param Tensor scale: scale of each input, ``(dim,)``.
    :param settings: solver, tolerances and number of geodesic sub-steps.
    :param state: where the chains are.
    :param step_size: time step, in standard deviations of the inputs; negative to go back. One
        for all chains, or a tensor ``(chains,)``.
    :param Tensor status: ``(chains,)``; chains whose status is not ``CONVERGED`` stay put.
    :returns: the new state and what happened. The argument is not modified. A chain on whose
        inputs an operation of the model raises stays put, with status ``DIVERGENT``.
    """
    steps = torch.as_tensor(step_size).to(state.point.energy).expand_as(state.point.energy)
    arguments = (system, scale, settings)
    try:
        return _step(*arguments, state, steps, status)
    except LinAlgError:  # which does not say for which chain
        rows = split_chains((state, steps, status))
        return join_chains([_single_step(*arguments, *row) for row in rows])


def _single_step(
    system: System,
    scale: Tensor,
    settings: IntegratorSettings,
    state: PhaseState,
    step_size: Tensor,
    status: Tensor,
) -> tuple[PhaseState, StepInfo]:
    """One chain on its own, to find out whether it is the one for which the model raises."""
    try:
        return _step(system, scale, settings, state, step_size, status)
    except LinAlgError:
        failed = _mark(status, torch.ones_like(status, dtype=torch.bool), Status.DIVERGENT)
        return state, StepInfo(failed, torch.zeros_like(status), torch.zeros_like(step_size))


def _step(
    system: System,
    scale: Tensor,
    settings: IntegratorSettings,
    state: PhaseState,
    step_sizes: Tensor,
    status: Tensor,
) -> tuple[PhaseState, StepInfo]:
    point, momentum = state
    step_size = step_sizes.unsqueeze(-1)
    momentum = project_momentum(point.jacobian, momentum - 0.5 * step_size * point.gradient)
    position, jacobian = point.position, point.jacobian
    iterations = torch.zeros_like(status)
    residual = torch.zeros_like(point.energy)
    inner_step = step_size / settings.num_inner_steps
    new_point = point
    for i in range(settings.num_inner_steps):
        is_last = i == settings.num_inner_steps - 1
        # chains that have failed stay on the manifold, where every solver is done at once
        start = torch.where(_ok(status), position + inner_step * momentum, position)
        forward = _project(system, scale, settings, start, jacobian, status)
        status = _mark(status, ~forward.is_converged, Status.NOT_CONVERGED)
        new_position = torch.where(_ok(status), forward.position, position)
        if is_last:
            new_point = system.point(new_position, scale)
            new_jacobian = new_point.jacobian
        else:
            new_jacobian = system.jacobian(new_position, scale)
        status = _mark(status, ~new_jacobian.half_log_det_gram.isfinite(), Status.DIVERGENT)
        momentum = project_momentum(new_jacobian, (new_position - position) / inner_step)
        start = torch.where(_ok(status), new_position - inner_step * momentum, new_position)
        backward = _project(system, scale, settings, start, new_jacobian, status)
        distance = (backward.position - position).abs().amax(-1)
        is_reversible = backward.is_converged & (distance <= settings.tolerances.reverse)
        status = _mark(status, ~is_reversible, Status.NON_REVERSIBLE)
        iterations = iterations + forward.iterations + backward.iterations
        residual = torch.maximum(residual, forward.residual)
        position, jacobian = new_position, new_jacobian
    momentum = project_momentum(jacobian, momentum - 0.5 * step_size * new_point.gradient)
    new_state = select_chains(status == Status.CONVERGED, PhaseState(new_point, momentum), state)
    return new_state, StepInfo(status, iterations, residual)


def _project(
    system: System,
    scale: Tensor,
    settings: IntegratorSettings,
    start: Tensor,
    jacobian: Jacobian,
    status: Tensor,
) -> Projection:
    """Project with the chosen solver, then the chains it failed on with the fallback."""

    def constraint(position: Tensor) -> Tensor:
        return system.constraint(position, scale)

    def correction(position: Tensor, jacobian: Jacobian) -> tuple[Tensor, Tensor]:
        return system.correction(position, scale, jacobian)

    def slopes(position: Tensor) -> Any:
        return system.slopes(position, scale)

    equations = Equations(constraint, correction, slopes)
    result = settings.projector(equations, start, jacobian, settings.tolerances)
    failed = ((status == Status.CONVERGED) & ~result.is_converged).nonzero().squeeze(-1)
    if settings.fallback is None or len(failed) == 0:
        return result
    subset = take_chains(jacobian, failed)
    retry = settings.fallback(equations, start[failed], subset, settings.tolerances)
    return Projection(
        position=result.position.index_copy(0, failed, retry.position),
        residual=result.residual.index_copy(0, failed, retry.residual),
        iterations=result.iterations.index_add(0, failed, retry.iterations),
        is_converged=result.is_converged.index_copy(0, failed, retry.is_converged),
    )


def _ok(status: Tensor) -> Tensor:
    return (status == Status.CONVERGED).unsqueeze(-1)


def _mark(status: Tensor, mask: Tensor, code: Status) -> Tensor:
    """Give chains without a failure so far the status ``code`` where ``mask`` holds."""
    return torch.where(mask & (status == Status.CONVERGED), int(code), status)
