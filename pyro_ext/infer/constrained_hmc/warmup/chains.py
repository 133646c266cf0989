"""Warm-up of all chains together: a step size, a scale per input, and help for stuck chains."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..dynamics.integrator import IntegratorSettings
from ..dynamics.status import Status
from ..dynamics.transitions import TransitionInfo, hmc_transition
from ..system.constrained_system import Point, System, project_momentum
from .adaptation import (
    DualAveraging,
    RunningVariance,
    dual_averaging_final,
    dual_averaging_init,
    dual_averaging_update,
    find_reasonable_step_size,
    input_scale,
    running_variance_init,
    running_variance_update,
    time_scale,
    window_ends,
)
from .trajectory_length import LengthAdaptation, rescale_length

__all__ = [
    "Chains",
    "WarmupSettings",
    "adapt",
    "adaptation_statistic",
    "rescue_factor",
    "restart_step_size",
]

_STUCK_AFTER = 20  # rejections in a row
_RESCUE_AFTER = 5  # rejections in a row: one in a few thousand at the usual acceptance


class Chains(NamedTuple):
    """State of a run, between two draws."""

    point: Point
    residual: Tensor  # (chains,)
    scale: Tensor  # (dim,) of the inputs
    step_size: float
    averaging: DualAveraging
    variances: tuple[RunningVariance, RunningVariance]  # of inputs, and of momenta
    rejections: Tensor  # (chains,) proposals rejected lately
    length: LengthAdaptation | None  # of trajectories, if it is adapted
    iteration: int


class WarmupSettings(NamedTuple):
    """What is adapted, and for how long."""

    num_steps: int
    adapt_step_size: bool
    adapt_mass_matrix: bool
    target_accept_prob: float


def rescue_factor(chains: Chains, num_warmup_steps: int) -> float:
    """
    Factor on the step size of every other trajectory of warm-up while some chain is stuck.

    A chain that starts far out, where the constraint curves more than elsewhere, may reject
    every step that suits the others; shorter and shorter ones lead it back.
    """
    worst = int(chains.rejections.max())
    is_last = chains.iteration >= num_warmup_steps - 1
    if worst < _RESCUE_AFTER or chains.iteration % 2 == 0 or is_last:
        return 1.0
    return 0.5 ** min(worst - _RESCUE_AFTER + 1, 10)


def restart_step_size(
    system: System, settings: IntegratorSettings, target_accept_prob: float, chains: Chains
) -> Chains:
    """Look for a step size whose acceptance after one step is about the target."""

    def accept_prob(step_size: float) -> float:
        _, info, _ = hmc_transition(
            system, chains.scale, settings, chains.point, chains.residual, step_size, 1
        )
        return adaptation_statistic(info, chains.rejections)

    step_size = find_reasonable_step_size(accept_prob, chains.step_size, target_accept_prob)
    return chains._replace(
        step_size=step_size, averaging=dual_averaging_init(step_size, shrinkage=1.0)
    )


def adapt(
    system: System,
    settings: IntegratorSettings,
    warmup: WarmupSettings,
    chains: Chains,
    statistic: float,
) -> Chains:
    """
    Learn from one draw of every chain.

    :param system: the constrained system.
    :param settings: integrator settings, to look for a step size with once the scales change.
    :param warmup: what to adapt.
    :param chains: the chains after the draw.
    :param float statistic: of the draw, see :func:`adaptation_statistic`.
    """
    if warmup.adapt_step_size:
        averaging = dual_averaging_update(
            chains.averaging,
            statistic,
            warmup.target_accept_prob,
            # the mean over many chains is less noisy than one chain's probability, for which
            # 0.05 is right, and would make the step size swing by factors of ten
            gamma=0.05 * math.sqrt(min(len(chains.rejections), 16)),
        )
        is_last = chains.iteration == warmup.num_steps
        final = dual_averaging_final(averaging)
        step_size = final if is_last else math.exp(averaging.log_step_size)
        chains = chains._replace(averaging=averaging, step_size=step_size)
    return _adapt_scale(system, settings, warmup, chains) if warmup.adapt_mass_matrix else chains


def _adapt_scale(
    system: System, settings: IntegratorSettings, warmup: WarmupSettings, chains: Chains
) -> Chains:
    ends = window_ends(warmup.num_steps)
    if not ends or not ends[0] <= chains.iteration <= ends[-1]:
        return chains
    inputs = chains.point.position * chains.scale
    momenta = project_momentum(chains.point.jacobian, torch.randn_like(inputs))
    of_inputs = running_variance_update(chains.variances[0], inputs)
    of_momenta = running_variance_update(chains.variances[1], momenta)
    chains = chains._replace(variances=(of_inputs, of_momenta))
    if chains.iteration not in ends[1:]:
        return chains
    scale = input_scale(of_inputs, of_momenta)
    empty = running_variance_init(len(scale), scale)
    length = chains.length
    if length is not None:  # which is a time in the old coordinates
        length = rescale_length(length, 1 / time_scale(of_inputs, of_momenta, chains.scale))
    chains = chains._replace(
        point=system.point(inputs / scale, scale),
        scale=scale,
        variances=(empty, empty),
        length=length,
    )
    if not warmup.adapt_step_size:
        return chains
    return restart_step_size(system, settings, warmup.target_accept_prob, chains)


def adaptation_statistic(
    info: TransitionInfo, rejections: Tensor, penalty: float | Tensor = 3.0
) -> float:
    """
    Mean acceptance probability, in which a failed trajectory counts as four rejections.

    On a target whose energy hardly changes (the uniform one on a sphere) the step size would
    otherwise grow until failed projections alone bring the acceptance down to its target.
    Never below zero: one step that is too long must not shrink the next by orders of magnitude.
    Chains that do not move are left out while others do: the others should not pay for them.

    :param info: what happened to each chain.
    :param Tensor rejections: of each chain, lately, ``(chains,)``.
    :param penalty: how much a failure takes from the acceptance probability, in which it is zero
        already.
    """
    is_stuck = rejections >= _STUCK_AFTER
    counts = ~is_stuck if bool((~is_stuck).any()) else is_stuck
    failed = (info.status != Status.CONVERGED).to(info.accept_prob)
    return max(0.0, float((info.accept_prob - penalty * failed)[counts].mean()))
