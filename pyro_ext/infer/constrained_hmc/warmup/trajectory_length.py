r"""Adaptation of the trajectory length, pooled over chains, and its jitter.

A trajectory is long enough when squares decorrelate along it, which for a mean :math:`\mu` the
*change in the estimator of the expected square* measures (Hoffman, Radul and Sountsov 2021, *An
adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian Monte Carlo*, eq. 7):

.. math:: \tfrac14\, E\bigl[(|x' - \mu|^2 - |x - \mu|^2)^2\bigr].

Where inputs are independent the mixed terms of this square of a sum have mean zero, and here they
are left out:

.. math:: \tfrac14 \sum_j E\bigl[((x'_j - \mu_j)^2 - (x_j - \mu_j)^2)^2\bigr].

Constraints are often about lengths: on a sphere :math:`|x - \mu|` never changes, and the first
form has nothing to say. The second does, and its gradient is much less noisy when there are many
inputs.

Along a single oscillation of unit frequency the most is at a quarter turn, 1.57, and with lengths
jittered by half not far from it: there means and squares have about equal effective sample sizes.
Longer oscillations have more such maxima. Lengths therefore grow from about one step, as in the
paper: the first maximum is the one to find.

The velocity at the end of a trajectory is its momentum, which is tangent to the manifold, so that
with the chain rule the derivative with respect to the time costs nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "LengthAdaptation",
    "Trajectories",
    "freeze_length",
    "jitter_factor",
    "length_adaptation_init",
    "length_adaptation_update",
    "plan_trajectory",
    "relative_slope",
    "rescale_length",
]

# Steps in the log length are at most 0.5 / sqrt(n), so that warm-ups of a few dozen draws, which
# suffice for many chains, can change it by a factor of a hundred. The paper's constant 0.025 could
# not.
_RATE = 0.5
_AVERAGING_POWER = 0.5  # so that the average is not far behind after a short warm-up
_MEAN_POWER = 3  # the mean forgets where the chains came from with this power of their draws
_FEWEST_DRAWS = 10  # for a mean that says what is a change


class LengthAdaptation(NamedTuple):
    """State of the adaptation of a log trajectory length."""

    log_length: float
    log_length_average: float
    mean: Tensor  # (dim,) of the inputs, over chains and draws
    num_updates: int


class Trajectories(NamedTuple):
    """One trajectory of every chain, in scaled coordinates."""

    start: Tensor  # (chains, dim)
    end: Tensor  # (chains, dim)
    momentum: Tensor  # (chains, dim) at the end
    accept_prob: Tensor  # (chains,)
    length: float


def length_adaptation_init(length: float, inputs: Tensor) -> LengthAdaptation:
    """
    Start at a length.

    :param float length: where to start.
    :param Tensor inputs: of all chains, ``(chains, dim)``.
    """
    return LengthAdaptation(math.log(length), math.log(length), inputs.mean(0), 0)


def length_adaptation_update(
    state: LengthAdaptation,
    trajectories: Trajectories,
    scale: Tensor,
    shortest: float,
    longest: float,
) -> LengthAdaptation:
    r"""
    Climb the log of the criterion by one step.

    Its slope has no unit, so that steps need no scaling by earlier slopes, as Adam's in the paper
    do: those of the way to the posterior, far longer than the posterior is wide, would be larger
    by many orders of magnitude. Bounded as it is, one trajectory of a single chain decides only
    the direction.

    The mean is one over chains and draws, older draws fading away, so that few chains are enough.

    :param state: current state.
    :param trajectories: those of the latest draw.
    :param Tensor scale: scale of each input, ``(dim,)``.
    :param float shortest: bound on the length.
    :param float longest: bound on the length.
    """
    count = state.num_updates + 1
    shift = (trajectories.start * scale).mean(0) - state.mean
    mean = state.mean + shift * _MEAN_POWER / (count - 1 + _MEAN_POWER)
    slope = relative_slope(trajectories, mean / scale)
    if slope is None or count * len(trajectories.start) < _FEWEST_DRAWS:
        slope = 0.0
    log_length = state.log_length + _RATE / math.sqrt(count) * min(max(slope, -1.0), 1.0)
    log_length = min(max(log_length, math.log(shortest)), math.log(longest))
    weight = count**-_AVERAGING_POWER
    average = weight * log_length + (1 - weight) * state.log_length_average
    return LengthAdaptation(log_length, average, mean, count)


def freeze_length(state: LengthAdaptation) -> LengthAdaptation:
    """Use the averaged length from now on."""
    return state._replace(log_length=state.log_length_average)


def rescale_length(state: LengthAdaptation, factor: float) -> LengthAdaptation:
    """Go on in coordinates in which times are longer by a factor."""
    shift = math.log(factor)
    return state._replace(
        log_length=state.log_length + shift, log_length_average=state.log_length_average + shift
    )


def relative_slope(trajectories: Trajectories, mean: Tensor) -> float | None:
    r"""
    Derivative of the log of the criterion with respect to the log length.

    With :math:`d_j = (x'_j - \mu_j)^2 - (x_j - \mu_j)^2`,

    .. math:: 4t\, \sum_j E\bigl[d_j\, (x'_j - \mu_j)\,p'_j\bigr] \Big/ \sum_j E\bigl[d_j^2\bigr].

    :param trajectories: one per chain; means over them are weighted by ``accept_prob``, with
        which failed ones drop out.
    :param Tensor mean: in scaled coordinates, ``(dim,)``.
    :returns: ``None`` if no trajectory can be accepted, or none has moved.
    """
    start, end = trajectories.start - mean, trajectories.end - mean
    change = end.square() - start.square()
    slopes = 4 * trajectories.length * (change * end * trajectories.momentum).sum(-1)
    weights = trajectories.accept_prob
    # what diverged need not be finite
    slope = float(torch.where(weights > 0, weights * slopes, 0.0).sum())
    size = float(torch.where(weights > 0, weights * change.square().sum(-1), 0.0).sum())
    return slope / size if size > 0 else None


def jitter_factor(jitter: float, number: int) -> float:
    """
    Factor on the length of a trajectory, from a sequence that fills an interval evenly.

    :param float jitter: half the width of the interval around one.
    :param int number: of the draw, from zero.
    """
    return 1 + jitter * (2 * _halton(number + 1) - 1)


def plan_trajectory(length: float, step_size: float, max_num_steps: int) -> tuple[float, int]:
    """
    Fewest equal steps, none longer than the step size, that cover a length.

    :param float length: time to cover; less is covered where it takes too many steps.
    :param float step_size: longest step.
    :param int max_num_steps: most steps.
    :returns: size and number of the steps.
    """
    # one step less where the last would be shorter than rounding
    num_steps = min(max(1, math.ceil(length / step_size - 1e-9)), max_num_steps)
    return min(length / num_steps, step_size), num_steps


def _halton(number: int) -> float:
    """Van der Corput's sequence, Halton's in base two: binary digits mirrored at the point."""
    value, digit = 0.0, 0.5
    while number:
        value += digit * (number & 1)
        number >>= 1
        digit /= 2
    return value
