"""How far the counts of uniform draws stray, all at once."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["UniformBand", "uniform_band"]

_HALVINGS = 20
_Array = NDArray[np.float64]


class UniformBand(NamedTuple):
    """Bounds of an empirical distribution function, shape ``(n,)`` each."""

    points: Tensor
    """Where the function is looked at."""

    lower: Tensor
    """Least value at each point."""

    upper: Tensor
    """Largest value at each point."""


def uniform_band(num_values: int, points: Tensor, *, level: float = 0.95) -> UniformBand:
    r"""
    Band that contains the whole empirical distribution function of uniform draws.

    At each point :math:`z_i` the number of draws below it is binomial, and the band takes the
    central part of that distribution which leaves out :math:`\gamma`, the same at every point. The
    largest :math:`\gamma` is found for which all points are inside together with probability
    ``level``; that probability is exact, by a recursion over the points (Säilynoja, Bürkner and
    Vehtari 2022, "Graphical test for discrete uniformity and its applications in goodness-of-fit
    evaluation and multiple sample comparison", section 2.2).

    :param int num_values: number of draws, at least 1.
    :param Tensor points: increasing numbers between 0 and 1, shape ``(n,)``.
    :param float level: probability that draws from the uniform distribution stay inside.
    :returns: bounds as fractions of the draws.
    :raises ValueError: for points that do not increase, or numbers out of range.

    >>> from pyro_ext.ops.uniform_band import uniform_band
    >>> band = uniform_band(100, torch.tensor([0.25, 0.5, 0.75]))
    >>> band.lower, band.upper
    (tensor([0.1500, 0.3900, 0.6500]), tensor([0.3500, 0.6100, 0.8500]))
    """
    if num_values < 1:
        raise ValueError(f"num_values must be at least 1, got {num_values}.")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}.")
    z = points.detach().cpu().double().numpy()
    if z.ndim != 1 or not len(z) or (np.diff(z) <= 0).any() or z[0] < 0 or z[-1] > 1:
        raise ValueError("points must be increasing numbers between 0 and 1, of shape (n,).")
    # no larger than for one point alone; small enough for any dependence between them
    too_large, gamma = 1 - level, (1 - level) / len(z)
    if _probability_inside(num_values, z, *_bounds(num_values, z, too_large)) >= level:
        gamma = too_large
    for _ in range(_HALVINGS):
        middle = math.sqrt(gamma * too_large)
        inside = _probability_inside(num_values, z, *_bounds(num_values, z, middle))
        gamma, too_large = (middle, too_large) if inside >= level else (gamma, middle)
    lower, upper = (torch.from_numpy(b / num_values) for b in _bounds(num_values, z, gamma))
    return UniformBand(points, lower.to(points), upper.to(points))


def _bounds(num_values: int, z: _Array, gamma: float) -> tuple[_Array, _Array]:
    """Central part of the distribution of the count below each point."""
    import scipy.stats  # here, since its import adds a filter of warnings

    counts = scipy.stats.binom(num_values, z)
    return counts.ppf(0.5 * gamma).clip(min=0), counts.ppf(1 - 0.5 * gamma)


def _probability_inside(num_values: int, z: _Array, lower: _Array, upper: _Array) -> float:
    """
    Probability that the counts below all points are within their bounds.

    Counts of uniform draws are those of a Poisson process given its total, and a Poisson process
    has independent increments: one vector of probabilities moves from point to point.
    """
    import scipy.special

    log_factorial = scipy.special.gammaln(np.arange(num_values + 1) + 1.0)
    steps = num_values * np.diff(z, prepend=0.0, append=1.0)
    lows, highs = [[int(b) for b in each] for each in (lower, upper)]
    counts, mass = np.zeros(1, dtype=int), np.ones(1)
    for rate, low, high in zip(steps, [*lows, num_values], [*highs, num_values], strict=True):
        numbers = np.arange(num_values + 1)
        density = np.exp(scipy.special.xlogy(numbers, rate) - rate - log_factorial)
        following = np.arange(low, high + 1)
        increments = following - counts[:, None]
        mass = mass @ np.where(increments >= 0, density[increments.clip(min=0)], 0.0)
        counts = following
    total = math.exp(num_values * math.log(num_values) - num_values - log_factorial[-1])
    return float(mass[0]) / total
