r"""The probability-flow equation, which turns data into noise without randomness.

.. math:: \frac{dx}{dt} = f(t) \, x - \tfrac12 g(t)^2 \, s(x, t), \qquad
    \log p(x) = \log \pi(x_T) + \int_\epsilon^T \nabla \cdot \left( f(t) \, x
    - \tfrac12 g(t)^2 s(x, t) \right) dt

(Song, Durkan, Murray and Ermon 2021, eq. 6-7). It is solved on the natural scale u of the
diffusion, on which :math:`dt / du = Z \sigma^2 / g^2`: the score is multiplied by
:math:`-\tfrac12 Z \sigma^2`, which takes away its growth towards :math:`t = 0`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import PyroExtError
from ...ops.ode import EXCEEDED, OK, ROWWISE, OdeSolution, integrate_jointly, integrate_rows
from .score import Score, column
from .sde import SDE
from .settings import OdeSettings

__all__ = ["Flowed", "divergence", "draw_probes", "flow"]


class Flowed(NamedTuple):
    """Rows at the other end of the flow."""

    value: Tensor
    """Shape ``(n,) + event_shape``."""

    log_det: Tensor | None
    """Logarithm of the Jacobian determinant of the map, shape ``(n,)``; if it was asked for."""

    num_evaluations: Tensor
    """Evaluations of the score for each row, shape ``(n,)``."""


def flow(
    score: Score,
    sde: SDE,
    x: Tensor,
    settings: OdeSettings,
    *,
    to_noise: bool,
    with_log_det: bool,
    parameters: tuple[Tensor, ...] = (),
) -> Flowed:
    """
    Carry rows along the flow.

    :param Score score: the score.
    :param SDE sde: the diffusion.
    :param Tensor x: shape ``(n,) + event_shape``.
    :param OdeSettings settings: solver and trace.
    :param bool to_noise: from ``start`` to ``end``, or back.
    :param bool with_log_det: whether the log-determinant is needed.
    :param parameters: what the adjoint equation gives gradients to.
    :returns: the rows at the other end.
    :raises PyroExtError: if a row needs too many evaluations, or scores are not finite.
    """
    flat = x.flatten(1)
    num_dimensions = flat.shape[1]
    probes = None
    state = flat
    if with_log_det:
        if not settings.is_exact(num_dimensions):
            probes = draw_probes(x, settings)
        state = torch.cat([flat, flat.new_zeros(len(flat), 1)], -1)

    def field(u: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        value = state[:, :num_dimensions].reshape(-1, *x.shape[1:])
        t = sde.time(u)
        slope = sde.natural_length * (sde.std(t) / sde.diffusion(t)).square()
        linear = slope * sde.drift_rate(t)
        factor = -0.5 * sde.natural_length * sde.std(t).square()
        if not with_log_det:
            found = score(value, t, rows)
            return (column(linear, value) * value + column(factor, value) * found).flatten(1)
        some = None if probes is None else probes[:, rows]
        found, trace = divergence(score, value, t, rows, some)
        velocity = column(linear, value) * value + column(factor, value) * found
        change = linear * num_dimensions + factor * trace
        return torch.cat([velocity.flatten(1), change.unsqueeze(-1)], -1)

    ends = (0.0, 1.0) if to_noise else (1.0, 0.0)
    tolerances = {"rtol": settings.rtol, "atol": settings.atol}
    if settings.solver == ROWWISE:
        solution = integrate_rows(
            field, state, *ends, **tolerances, max_evaluations=settings.max_evaluations
        )
    else:
        solution = integrate_jointly(
            field,
            state,
            *ends,
            **tolerances,
            method=settings.solver,
            num_steps=settings.num_steps,
            max_evaluations=settings.max_evaluations,
            adjoint_parameters=parameters if settings.adjoint else None,
        )
    _check(solution, sde, settings)
    value = solution.state[:, :num_dimensions].reshape(x.shape)
    log_det = solution.state[:, -1] if with_log_det else None
    return Flowed(value, log_det, solution.num_evaluations)


def divergence(
    score: Score, x: Tensor, t: Tensor, rows: Tensor, probes: Tensor | None
) -> tuple[Tensor, Tensor]:
    r"""
    A score, and its divergence :math:`\nabla \cdot s`.

    Exactly, by one product with the transposed Jacobian for each dimension, or estimated from
    random vectors v with :math:`\mathbb E \, v v^\top = I` (Skilling 1989; Hutchinson 1990):

    .. math:: \nabla \cdot s = \mathbb E \, v^\top \frac{\partial s}{\partial x} v .

    :param Score score: the score.
    :param Tensor x: shape ``(n,) + event_shape``.
    :param Tensor t: times, shape ``(n,)``.
    :param Tensor rows: numbers of the rows.
    :param Tensor probes: shape ``(k, n) + event_shape``; ``None`` for the exact divergence.
    :returns: the scores, and the divergences of shape ``(n,)``.
    """
    keeps_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # a view, so that the gradient is that of these rows alone
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        found = score(x, t, rows)
        if not found.requires_grad:  # a score that does not depend on x
            return found, x.new_zeros(len(x))
        if probes is None:
            identity = torch.eye(x[:1].numel(), dtype=x.dtype, device=x.device)
            probes, weight = identity.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape), 1.0
        else:
            weight = 1 / len(probes)
        # One after the other: not all layers, attention for one, have a vectorised derivative.
        trace = x.new_zeros(len(x))
        for vector in probes:
            product = torch.autograd.grad(
                found,
                x,
                vector,
                create_graph=keeps_graph,
                retain_graph=True,
                materialize_grads=True,
            )[0]
            trace = trace + weight * (product * vector).flatten(1).sum(-1)
    return (found, trace) if keeps_graph else (found.detach(), trace.detach())


def draw_probes(x: Tensor, settings: OdeSettings) -> Tensor:
    """
    Draw the vectors of Hutchinson's estimate.

    :param Tensor x: rows, shape ``(n,) + event_shape``.
    :param OdeSettings settings: their distribution, number and seed.
    :returns: shape ``(num_probes, n) + event_shape``.
    """
    generator = None
    if settings.seed is not None:
        generator = torch.Generator(x.device).manual_seed(settings.seed)
    shape = (settings.num_probes, *x.shape)
    noise = torch.randn(shape, dtype=x.dtype, device=x.device, generator=generator)
    return torch.where(noise < 0, -1.0, 1.0).to(x) if settings.probe == "rademacher" else noise


def _check(solution: OdeSolution, sde: SDE, settings: OdeSettings) -> None:
    failed = solution.status != OK
    if not bool(failed.any()):
        return
    u = solution.time[failed][:1].detach().double().clamp(0, 1)
    first = f"the first of them at t={float(sde.time(u)):.6g}"
    where = f"{int(failed.sum())} of {len(failed)} rows, {first}"
    if int(solution.status[failed][0]) == EXCEEDED:
        raise PyroExtError(
            f"The probability-flow equation needs more than max_evaluations="
            f"{settings.max_evaluations} evaluations for {where}: loosen rtol={settings.rtol:g} "
            f"and atol={settings.atol:g}, start the diffusion later than start={sde.start:g}, "
            "allow more evaluations, or take solver='rk4' with a fixed num_steps."
        )
    raise PyroExtError(
        f"Scores are NaN or infinite for {where}: check the values, and the score network there; "
        f"a diffusion that starts later than start={sde.start:g} has smaller scores."
    )
