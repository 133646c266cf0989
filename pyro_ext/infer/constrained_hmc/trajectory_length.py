r"""Adaptation of the trajectory length, pooled over chains, and its jitter.

ChEES, the *change in the estimator of the expected square*, grows with how much a trajectory
decorrelates squared distances from the mean (Hoffman, Radul and Sountsov 2021, eq. 7):

.. math:: \tfrac14\, E\bigl[(|x' - \mu|^2 - |x - \mu|^2)^2\bigr]
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

__all__ = [
    "LengthAdaptation",
    "jitter_factor",
    "length_adaptation_final",
    "length_adaptation_init",
    "length_adaptation_update",
    "plan_trajectory",
]

MODE = "coord"
RATE = False
LR = 0.25
POW = 0.5


class LengthAdaptation(NamedTuple):
    """State of the adaptation of a log trajectory length."""

    log_length: float
    log_length_average: float
    mean: Tensor  # (dim,) of the inputs, over chains and recent draws
    mean_square: float  # of recent gradients
    criterion: float
    num_updates: int


def length_adaptation_init(length: float, inputs: Tensor) -> LengthAdaptation:
    return LengthAdaptation(math.log(length), math.log(length), inputs.mean(0), 0.0, 0.0, 0)


def length_adaptation_update(
    state: LengthAdaptation,
    start: Tensor,
    end: Tensor,
    momentum: Tensor,
    scale: Tensor,
    accept_prob: Tensor,
    length: float,
    smallest: float,
    largest: float,
) -> LengthAdaptation:
    count = state.num_updates + 1
    weight_sum = accept_prob.sum()
    forget = 1 / (1 + count / 8)
    mean = state.mean + forget * ((start * scale).mean(0) - state.mean)
    centred_start, centred_end = start - mean / scale, end - mean / scale
    if MODE == "coord":
        change = centred_end.square() - centred_start.square()
        crit = change.square().sum(-1) / 4
        slopes = (change * centred_end * momentum).sum(-1)
    else:
        change = centred_end.square().sum(-1) - centred_start.square().sum(-1)
        crit = change.square() / 4
        slopes = change * (centred_end * momentum).sum(-1)
    if weight_sum <= 0:
        return state._replace(mean=mean, num_updates=count)
    gradient = float((accept_prob * slopes).sum() / weight_sum) * length
    criterion = float((accept_prob * crit).sum() / weight_sum)
    decay = 0.9
    crit_avg = decay * state.criterion + (1 - decay) * criterion
    if RATE:
        gradient = gradient - crit_avg / (1 - decay**count)
    mean_square = 0.95 * state.mean_square + 0.05 * gradient**2
    corrected = mean_square / (1 - 0.95**count)
    step = LR * count**-POW
    move = step * gradient / (math.sqrt(corrected) + 1e-12)
    log_length = min(max(state.log_length + move, math.log(smallest)), math.log(largest))
    w = min(1.0, count**-0.75)
    average = w * log_length + (1 - w) * state.log_length_average
    return LengthAdaptation(log_length, average, mean, mean_square, crit_avg, count)


def length_adaptation_final(state: LengthAdaptation) -> float:
    return math.exp(state.log_length_average)


def jitter_factor(jitter: float, number: int) -> float:
    return 1 + jitter * (2 * _halton(number + 1) - 1)


def _halton(number: int) -> float:
    value, digit = 0.0, 0.5
    while number:
        value += digit * (number & 1)
        number >>= 1
        digit /= 2
    return value


def plan_trajectory(length: float, step_size: float, max_num_steps: int) -> tuple[float, int]:
    # one step less where the last would be shorter than rounding
    num_steps = min(max(1, math.ceil(length / step_size - 1e-9)), max_num_steps)
    return min(length / num_steps, step_size), num_steps
