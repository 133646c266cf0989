r"""Trajectories on the manifold that end where they turn back (no-U-turn), many chains at once.

A trajectory doubles, forwards or backwards, until its two ends move towards each other; the draw
is one of its points, by their densities (Hoffman and Gelman 2014; multinomial sampling as in
Betancourt 2017, appendix A). With :math:`\rho` the sum of the momenta of a stretch of trajectory,
the stretch turns back when

.. math:: p_\text{first} \cdot \rho \le 0 \quad\text{or}\quad p_\text{last} \cdot \rho \le 0

(Betancourt 2017, appendix A.4.2, with an identity metric). On a manifold the momenta are tangent
at points of their own, and their sum is tangent nowhere. What counts at an end is its projection
:math:`P\rho` onto the cotangent space there; as the end's momentum :math:`p = Pp` lies in that
space, :math:`p \cdot P\rho = p \cdot \rho` and the projection need not be computed.

The new half of a trajectory grows point by point, not recursively, so that the chains share every
step: instead of a tree there is a list of checkpoints, one per level, each at the start of a
sub-tree that is not finished (Phan, Pradhan and Jankowiak 2019, appendix A; Lao et al. 2020).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..system.chainwise import select_chains
from ..system.constrained_system import Point, System, total_energy
from .integrator import IntegratorSettings, PhaseState, leapfrog_step
from .status import Status
from .transitions import TransitionInfo, draw_momentum, mark_divergent

__all__ = ["no_u_turn_transition"]


class _Leaf(NamedTuple):
    """Points of trajectories that may become draws."""

    point: Point
    energy: Tensor  # (chains,) with the kinetic part
    residual: Tensor  # (chains,)


class _Counts(NamedTuple):
    """What the steps of a transition came to; all tensors are ``(chains,)``."""

    accept_probs: Tensor  # sum over steps
    num_steps: Tensor
    iterations: Tensor
    status: Tensor


class _Tree(NamedTuple):
    """Whole trajectories so far."""

    first: PhaseState  # the end back in time
    last: PhaseState
    draw: _Leaf
    momentum_sum: Tensor  # (chains, dim)
    log_weight: Tensor  # (chains,) of the sum of exp(H_0 - H)
    depth: Tensor  # (chains,)
    is_growing: Tensor  # (chains,)


class _Subtree(NamedTuple):
    """The new halves of trajectories; "first" is the point next to the old half."""

    last: PhaseState
    first_momentum: Tensor
    draw: _Leaf
    momentum_sum: Tensor
    log_weight: Tensor
    is_growing: Tensor  # false where a step failed or a part turned back


class _Checkpoint(NamedTuple):
    """The first point of a sub-tree, and what preceded it in the new half."""

    momentum: Tensor
    momentum_sum: Tensor  # with that point
    previous_momentum: Tensor


def no_u_turn_transition(
    system: System,
    scale: Tensor,
    settings: IntegratorSettings,
    point: Point,
    residual: Tensor,
    step_size: float,
    max_tree_depth: int,
) -> tuple[Point, TransitionInfo, Tensor]:
    r"""
    One transition that leaves the target on the manifold invariant.

    A step that fails ends the trajectory, and the half that it was to become part of is dropped:
    no point of that half could have produced the same trajectory. Its status is reported.

    :param system: the constrained system.
    :param Tensor scale: scale of each input, ``(dim,)``.
    :param settings: integrator settings.
    :param point: current positions, on the manifold.
    :param Tensor residual: their largest residuals, ``(chains,)``.
    :param float step_size: time step.
    :param int max_tree_depth: most doublings; a trajectory has at most
        ``2**max_tree_depth`` points.
    :returns: the new positions; what happened, where ``accept_prob`` is the mean of
        :math:`\min(1, \exp(H_0 - H))` over all steps with failed ones as zeros, and
        ``is_accepted`` says whether the chain moved; and the number of doublings, ``(chains,)``.
    """
    start = draw_momentum(point)
    energy = total_energy(*start)
    zero = torch.zeros_like(residual)
    none = torch.zeros(len(residual), dtype=torch.long, device=residual.device)
    tree = _Tree(
        first=start,
        last=start,
        draw=_Leaf(point, energy, residual),
        momentum_sum=start.momentum,
        log_weight=zero,
        depth=none,
        is_growing=none == 0,
    )
    counts = _Counts(accept_probs=zero, num_steps=none, iterations=none, status=none)
    has_moved = none != 0
    for depth in range(max_tree_depth):
        is_forward = torch.rand_like(residual) < 0.5
        steps = torch.where(is_forward, step_size, -step_size)
        edge = select_chains(is_forward, tree.last, tree.first)
        subtree, counts = _grow(
            system, scale, settings, edge, tree.is_growing, energy, steps, depth, counts
        )
        # biased towards the new half (Betancourt 2017, appendix A.3.2)
        log_odds = subtree.log_weight - tree.log_weight
        is_chosen = (torch.rand_like(residual).log() < log_odds) & subtree.is_growing
        has_moved = has_moved | is_chosen
        tree = _join(tree, subtree, edge, is_forward, is_chosen)
        if not tree.is_growing.any():
            break
    info = TransitionInfo(
        accept_prob=counts.accept_probs / counts.num_steps,
        is_accepted=has_moved,
        status=counts.status,
        num_steps=counts.num_steps,
        projection_iterations=counts.iterations,
        constraint_residual=tree.draw.residual,
        energy=tree.draw.energy,
    )
    return tree.draw.point, info, tree.depth


def _grow(
    system: System,
    scale: Tensor,
    settings: IntegratorSettings,
    edge: PhaseState,
    is_growing: Tensor,
    start_energy: Tensor,
    step_sizes: Tensor,
    depth: int,
    counts: _Counts,
) -> tuple[_Subtree, _Counts]:
    """Follow ``2**depth`` steps from an end of each trajectory that still grows."""
    state, momentum_sum = edge, torch.zeros_like(edge.momentum)
    first_momentum = edge.momentum
    draw = _Leaf(edge.point, start_energy, torch.zeros_like(start_energy))
    log_weight = torch.full_like(start_energy, -torch.inf)
    checkpoints: list[_Checkpoint] = []
    for number in range(2**depth):
        previous = state
        halted = torch.where(is_growing, int(Status.CONVERGED), int(Status.DIVERGENT))
        state, info = leapfrog_step(system, scale, settings, previous, step_sizes, halted)
        energy = total_energy(*state)
        change = energy - start_energy
        status = mark_divergent(info.status, change)
        is_good = is_growing & (status == Status.CONVERGED)
        accept_prob = torch.where(is_good, (-change).exp().clamp(max=1.0), 0.0)
        counts = _Counts(
            accept_probs=counts.accept_probs + accept_prob,
            num_steps=counts.num_steps + is_growing,
            iterations=counts.iterations + torch.where(is_growing, info.iterations, 0),
            status=torch.where(is_growing, status, counts.status),
        )
        new_log_weight = torch.where(is_good, torch.logaddexp(log_weight, -change), log_weight)
        is_chosen = is_good & (torch.rand_like(change).log() < -change - new_log_weight)
        draw = select_chains(is_chosen, _Leaf(state.point, energy, info.residual), draw)
        log_weight = new_log_weight
        momentum_sum = momentum_sum + state.momentum
        first_momentum = state.momentum if number == 0 else first_momentum
        # Sub-trees that start here, or end here, by the binary digits of the point's number. The
        # smallest one that is not finished starts where the last digit was zero last.
        level = (number >> 1).bit_count()
        if number % 2 == 0:
            checkpoint = _Checkpoint(state.momentum, momentum_sum, previous.momentum)
            checkpoints[level:] = [checkpoint]
            is_growing = is_good
        else:
            num_ending = (number ^ (number + 1)).bit_length() - 1  # ones at the end of the digits
            ending = checkpoints[level + 1 - num_ending :]
            is_growing = is_good & ~_any_turns(ending, state.momentum, momentum_sum)
        if not is_growing.any():
            break
    return _Subtree(state, first_momentum, draw, momentum_sum, log_weight, is_growing), counts


def _any_turns(starts: list[_Checkpoint], momentum: Tensor, momentum_sum: Tensor) -> Tensor:
    """
    Whether any of the sub-trees that end at one point turns back.

    :param starts: their first points, the largest sub-tree first; each is the second half of the
        one before it.
    :param Tensor momentum: at the end, ``(chains, dim)``.
    :param Tensor momentum_sum: of the new half up to and with the end.
    """
    smallest = starts[-1]
    rho = momentum_sum - smallest.momentum_sum + smallest.momentum
    turns = _turns(smallest.momentum, momentum, rho)
    for start, middle in zip(starts[-2::-1], starts[:0:-1], strict=True):
        first_sum = middle.momentum_sum - middle.momentum - start.momentum_sum + start.momentum
        second_sum = momentum_sum - middle.momentum_sum + middle.momentum
        turns |= _halves_turn(
            (start.momentum, middle.previous_momentum),
            first_sum,
            (middle.momentum, momentum),
            second_sum,
        )
    return turns


def _halves_turn(
    first: tuple[Tensor, Tensor],
    first_sum: Tensor,
    second: tuple[Tensor, Tensor],
    second_sum: Tensor,
) -> Tensor:
    """
    Whether two neighbouring halves turn back when they are joined.

    Beside the whole, each half together with the nearest point of the other is looked at: where
    both halves are nearly half a turn long and of opposite momentum, the whole alone shows
    nothing (the additional checks of Stan 2.21).

    :param first: momenta at the ends of the first half, in time or against it.
    :param second: momenta at the ends of the second half, in the same direction.
    """
    return (
        _turns(first[0], second[1], first_sum + second_sum)
        | _turns(first[0], second[0], first_sum + second[0])
        | _turns(first[1], second[1], second_sum + first[1])
    )


def _turns(first: Tensor, last: Tensor, rho: Tensor) -> Tensor:
    """Betancourt's criterion, from the momenta at the ends and the sum of all."""
    return ((first * rho).sum(-1) <= 0) | ((last * rho).sum(-1) <= 0)


def _join(
    tree: _Tree, subtree: _Subtree, edge: PhaseState, is_forward: Tensor, is_chosen: Tensor
) -> _Tree:
    """Append the new halves that are whole; the others, and what turns back, grow no more."""
    is_whole = subtree.is_growing
    far = torch.where(is_forward.unsqueeze(-1), tree.first.momentum, tree.last.momentum)
    turns = _halves_turn(
        (far, edge.momentum),
        tree.momentum_sum,
        (subtree.first_momentum, subtree.last.momentum),
        subtree.momentum_sum,
    )
    return _Tree(
        first=select_chains(is_whole & ~is_forward, subtree.last, tree.first),
        last=select_chains(is_whole & is_forward, subtree.last, tree.last),
        draw=select_chains(is_chosen, subtree.draw, tree.draw),
        momentum_sum=tree.momentum_sum + subtree.momentum_sum,
        log_weight=torch.logaddexp(tree.log_weight, subtree.log_weight),
        depth=tree.depth + is_whole,
        is_growing=is_whole & ~turns,
    )
