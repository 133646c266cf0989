r"""Adaptation of the trajectory length, pooled over chains, and its jitter.

The best length changes the inputs most for its time. How much one trajectory decorrelates the
inputs, and their squares around the means :math:`\mu`, is seen from

.. math::

    c_1 = \frac{\sum_j E[(x'_j - x_j)^2]}{\sum_j E[y'^2_j + y_j^2]}, \qquad
    c_2 = \frac{\sum_j E[(y'^2_j - y_j^2)^2]}{\sum_j E[y'^4_j + y_j^4]}, \qquad y = x - \mu,

each one minus a correlation, the second up to a factor. The first is the expected squared jump
(Pasarica and Gelman 2010, *Adaptively scaling the Metropolis algorithm using expected squared
jumped distance*), the second the change in the estimator of the expected square (Hoffman, Radul
and Sountsov 2021, *An adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian Monte
Carlo*, eq. 7), taken per input: constraints are often about lengths, and on a sphere :math:`|y|`
never changes. What is maximised over the length :math:`t` is a geometric mean of both per step,

.. math:: c_1^{2/3} c_2^{1/3} \big/ n(t), \qquad n(t) = t / \varepsilon + \tfrac12,

with :math:`n` the number of steps of size :math:`\varepsilon` that a jittered length takes on
average, rounded up. Division by the cost is the idea of Sountsov and Hoffman (2021, *Focusing on
difficult directions for learning HMC trajectory lengths*). Without it a manifold that closes in on
itself has plateaus and second maxima: on a ring one more turn is about as good as the first, and
costs twice as much. Means alone like trajectories to the opposite side, after which squares have
not changed; squares alone are content with short ones.

The exponents suit a single oscillation of unit frequency with lengths jittered by half. The
smaller effective sample size, of means or of squares, is largest for its cost at a length of 1.4
there; the criterion is at 1.44.

The velocity at the end of a trajectory is its momentum, which is tangent to the manifold, so that
with the chain rule the derivatives with respect to the time cost nothing.
"""

from __future__ import annotations

import math
from operator import mul
from typing import NamedTuple

from torch import Tensor

__all__ = [
    "Changes",
    "LengthAdaptation",
    "Trajectories",
    "changes_of",
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
# Changes belong to a length, and are forgotten while it moves by less than a factor of two.
_FORGETTING_POWER = 0.5
_FEWEST_DRAWS = 10  # for a mean that says what is a change
_EXPONENTS = (2 / 3, 1 / 3)  # of the changes of inputs and of their squares


class Changes(NamedTuple):
    """How much trajectories change, relative to how widely their ends are spread."""

    jump: float  # c_1
    jump_slope: float  # its derivative with respect to the log length
    square_jump: float  # c_2
    square_jump_slope: float  # its derivative with respect to the log length


class LengthAdaptation(NamedTuple):
    """State of the adaptation of a log trajectory length."""

    log_length: float
    log_length_average: float
    mean: Tensor  # (dim,) of the inputs, over chains and draws
    changes: Changes  # means over draws, older ones fading away
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
    nothing = Changes(0.0, 0.0, 0.0, 0.0)
    return LengthAdaptation(math.log(length), math.log(length), inputs.mean(0), nothing, 0)


def length_adaptation_update(
    state: LengthAdaptation,
    trajectories: Trajectories,
    scale: Tensor,
    step_size: float,
    longest: float,
) -> LengthAdaptation:
    r"""
    Climb the log of the criterion by one step.

    Its slope has no unit, so that steps need no scaling by earlier slopes, as Adam's in the paper
    do: those of the way to the posterior, far longer than the posterior is wide, would be larger
    by many orders of magnitude. Bounded as it is, one trajectory of a single chain decides only
    the direction.

    :param state: current state.
    :param trajectories: those of the latest draw.
    :param Tensor scale: scale of each input, ``(dim,)``.
    :param float step_size: of the integrator; no length is less than half of it.
    :param float longest: bound on the length.
    """
    if not (trajectories.accept_prob > 0).any():
        return state
    count = state.num_updates + 1
    shift = (trajectories.start * scale).mean(0) - state.mean
    mean = state.mean + shift * _MEAN_POWER / (count - 1 + _MEAN_POWER)
    latest = changes_of(trajectories, mean / scale)
    weight = count**-_FORGETTING_POWER
    changes = Changes(
        *(old + weight * (new - old) for old, new in zip(state.changes, latest, strict=True))
    )
    shortest = step_size / 2
    slope = 0.0
    if count * len(trajectories.start) >= _FEWEST_DRAWS:
        length = math.exp(state.log_length)
        slope = relative_slope(changes) - length / (length + shortest)
    log_length = state.log_length + _RATE / math.sqrt(count) * min(max(slope, -1.0), 1.0)
    log_length = min(max(log_length, math.log(shortest)), math.log(longest))
    weight = count**-_AVERAGING_POWER
    average = weight * log_length + (1 - weight) * state.log_length_average
    return LengthAdaptation(log_length, average, mean, changes, count)


def changes_of(trajectories: Trajectories, mean: Tensor) -> Changes:
    """
    Changes along the trajectories of one draw.

    They are divided by the spread of the ends of the same trajectories: so that those on the way
    to the posterior, far longer than the posterior is wide, do not outweigh all later ones. A
    rejected trajectory changes nothing.

    :param trajectories: one per chain.
    :param Tensor mean: in scaled coordinates, ``(dim,)``.
    """
    is_possible = trajectories.accept_prob > 0  # what diverged need not be finite
    weights = trajectories.accept_prob[is_possible].unsqueeze(-1)
    start, end = trajectories.start[is_possible] - mean, trajectories.end[is_possible] - mean
    velocity = trajectories.length * trajectories.momentum[is_possible]
    changes = []
    for a, b, slope in (
        (start, end, velocity),
        (start.square(), end.square(), 2 * end * velocity),
    ):
        size = float((weights * (b - a).square()).sum())
        rate = float((weights * 2 * (b - a) * slope).sum())
        spread = float((a.square() + b.square()).sum())
        changes += [size / spread, rate / spread] if spread > 0 else [0.0, 0.0]
    return Changes(*changes)


def relative_slope(changes: Changes) -> float:
    r"""Derivative of :math:`\log(c_1^{2/3} c_2^{1/3})` with respect to the log length."""
    sizes = (changes.jump, changes.square_jump)
    rates = (changes.jump_slope, changes.square_jump_slope)
    # nothing has moved where a size is zero
    relative = (rate / size if size > 0 else 0.0 for rate, size in zip(rates, sizes, strict=True))
    return sum(map(mul, _EXPONENTS, relative))


def freeze_length(state: LengthAdaptation) -> LengthAdaptation:
    """Use the averaged length from now on."""
    return state._replace(log_length=state.log_length_average)


def rescale_length(state: LengthAdaptation, factor: float) -> LengthAdaptation:
    """Go on in coordinates in which times are longer by a factor."""
    shift = math.log(factor)
    return state._replace(
        log_length=state.log_length + shift, log_length_average=state.log_length_average + shift
    )


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
