r"""Adaptation during warm-up, on explicit state, pooled over chains.

Step sizes by dual averaging (Nesterov 2009; Hoffman and Gelman 2014, section 3.2), input scales
by running variances (Welford 1962; Chan et al. 1979 for merging batches).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DualAveraging",
    "RunningVariance",
    "dual_averaging_final",
    "dual_averaging_init",
    "dual_averaging_update",
    "find_reasonable_step_size",
    "input_scale",
    "running_variance_init",
    "running_variance_update",
    "time_scale",
    "window_ends",
]


class DualAveraging(NamedTuple):
    """State of the dual averaging of a log step size."""

    log_step_size: float
    log_step_size_average: float
    error_average: float
    shrinkage_point: float
    num_updates: int


def dual_averaging_init(step_size: float, shrinkage: float = 10.0) -> DualAveraging:
    """
    Start at a step size.

    :param float step_size: where to start.
    :param float shrinkage: early iterations are drawn towards this multiple of it; Stan and Pyro
        draw towards ten times it, to try long steps first.
    """
    log_step = math.log(step_size)
    return DualAveraging(log_step, log_step, 0.0, log_step + math.log(shrinkage), 0)


def dual_averaging_update(
    state: DualAveraging,
    accept_prob: float,
    target: float,
    *,
    gamma: float = 0.05,
    t0: float = 10.0,
    kappa: float = 0.75,
) -> DualAveraging:
    r"""
    One update of the log step size (Hoffman and Gelman 2014, eq. 6).

    :param state: current state.
    :param float accept_prob: mean acceptance probability over the chains.
    :param float target: acceptance probability to aim at.
    :param float gamma: strength of the shrinkage.
    :param float t0: stabilises early iterations.
    :param float kappa: how fast early iterations are forgotten, in (0.5, 1].
    """
    count = state.num_updates + 1
    weight = 1.0 / (count + t0)
    error = (1 - weight) * state.error_average + weight * (target - accept_prob)
    log_step = state.shrinkage_point - math.sqrt(count) / gamma * error
    average_weight = count**-kappa
    average = average_weight * log_step + (1 - average_weight) * state.log_step_size_average
    return DualAveraging(log_step, average, error, state.shrinkage_point, count)


def dual_averaging_final(state: DualAveraging) -> float:
    """The averaged step size, to be used after adaptation."""
    return math.exp(state.log_step_size_average)


def find_reasonable_step_size(
    accept_prob: Callable[[float], float],
    step_size: float,
    target: float,
    *,
    smallest: float = 1e-6,
    largest: float = 4.0,
) -> float:
    """
    Double or halve a step size until the acceptance of one step crosses the target.

    :param accept_prob: mean acceptance probability over the chains of one step of a size.
    :param float step_size: where to start.
    :param float target: acceptance probability to cross.
    :param float smallest: never go below; chains that cannot move even so are left alone.
    :param float largest: never go above; inputs have unit scale, so that longer steps are
        unstable for any target.
    :returns: a step size within a factor of two of the crossing.
    """
    is_above = accept_prob(step_size) > target
    factor = 2.0 if is_above else 0.5
    while smallest <= step_size * factor <= largest:
        step_size *= factor
        if (accept_prob(step_size) > target) != is_above:
            break
    return step_size


class RunningVariance(NamedTuple):
    """Running mean and sum of squares of the inputs over chains and draws."""

    mean: Tensor  # (dim,)
    sum_squares: Tensor  # (dim,)
    num_inputs: int


def running_variance_init(dim: int, like: Tensor) -> RunningVariance:
    """An empty accumulator with the dtype and device of ``like``."""
    return RunningVariance(like.new_zeros(dim), like.new_zeros(dim), 0)


def running_variance_update(state: RunningVariance, inputs: Tensor) -> RunningVariance:
    """Merge a batch of inputs, shape ``(chains, dim)``."""
    count = state.num_inputs + len(inputs)
    batch_mean = inputs.mean(0)
    shift = batch_mean - state.mean
    within = (inputs - batch_mean).square().sum(0)
    between = shift.square() * (state.num_inputs * len(inputs) / count)
    return RunningVariance(
        state.mean + shift * (len(inputs) / count), state.sum_squares + within + between, count
    )


def input_scale(inputs: RunningVariance, momenta: RunningVariance) -> Tensor:
    r"""
    Scale of each input at which it varies as much as its momentum.

    .. math:: s_j^2 = \operatorname{var} u_j \big/ \operatorname{var} p_j,

    regularised towards one as Stan does its variances. Without a constraint momenta have variance
    one, and this is the posterior standard deviation. On a manifold they are projected: where the
    noise of a hundred outputs moves with one parameter, all of them vary little, and so do their
    momenta. Their standard deviations alone would make the posterior, a standard normal along the
    manifold, as wide as the root of a hundred.

    :param inputs: of the inputs, over chains and draws.
    :param momenta: of the momenta, in coordinates scaled as they are so far.
    :returns: shape ``(dim,)``.
    """
    count = inputs.num_inputs
    variance, of_momenta = _variance(inputs), _variance(momenta)
    # an input that the outputs determine does not move; what rounding makes of it says nothing
    moves = of_momenta > torch.finfo(variance.dtype).eps ** 0.5
    ratio = torch.where(moves, variance / of_momenta, 1.0)
    return ((count * ratio + 5.0) / (count + 5.0)).sqrt()


def time_scale(inputs: RunningVariance, momenta: RunningVariance, scale: Tensor) -> float:
    """
    How long a trajectory takes to cross the posterior, by what moves most; one where all is ideal.

    :param Tensor scale: of the inputs, so far, ``(dim,)``. Others as for :func:`input_scale`.
    """
    positions = (_variance(inputs) / scale.square()).sum()
    return math.sqrt(float(positions / _variance(momenta).sum()))


def _variance(state: RunningVariance) -> Tensor:
    return state.sum_squares / max(state.num_inputs - 1, 1)


def window_ends(warmup_steps: int) -> tuple[int, ...]:
    """
    Warm-up iterations after which the scales are set from the window just finished.

    Two windows, the second twice as long, between a first 15% in which chains travel to the
    typical set and a last 25% that is left to the step size.
    """
    start, end = int(0.15 * warmup_steps), int(0.75 * warmup_steps)
    middle = start + (end - start) // 3
    return (start, middle, end) if warmup_steps >= 20 else ()
