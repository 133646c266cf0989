"""Checks of Monte Carlo draws against known answers, and quadrature to get the answers.

Every check demands two things, with a message of its own for each: enough effective draws for
the comparison to mean something, and an error that those draws explain.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import arviz
import numpy as np
import scipy.stats
import torch
from torch import Tensor

__all__ = [
    "Quadrature",
    "assert_distribution",
    "assert_mean",
    "assert_moments",
    "assert_same_mean",
    "effective_sample_size",
    "thin",
]

_MAX_STANDARD_ERRORS = 5.0
_MIN_P_VALUE = 1e-3
_MIN_EXPECTED_COUNT = 10


class Quadrature:
    """
    An unnormalised density on a box, summed on a grid of midpoints.

    :param log_density: called with one coordinate tensor per axis, all of the grid's shape.
    :param axes: ``(low, high, number of points)`` of every axis.
    """

    def __init__(
        self, log_density: Callable[..., Tensor], *axes: tuple[float, float, int]
    ) -> None:
        self.edges = [torch.linspace(low, high, n + 1) for low, high, n in axes]
        middles = [0.5 * (edges[1:] + edges[:-1]) for edges in self.edges]
        self.points = torch.meshgrid(*middles, indexing="ij")
        self.mass = torch.softmax(log_density(*self.points).reshape(-1), 0)
        self.mass = self.mass.reshape(self.points[0].shape)

    def mean(self, function: Callable[..., Tensor] = lambda *x: x[0]) -> float:
        """Expectation of a function of the coordinates, of the first one by default."""
        return float((self.mass * function(*self.points)).sum())

    def sd(self, function: Callable[..., Tensor] = lambda *x: x[0]) -> float:
        """Standard deviation of a function of the coordinates."""
        mean = self.mean(function)
        return math.sqrt(self.mean(lambda *x: (function(*x) - mean) ** 2))

    def cdf(self, axis: int = 0) -> Callable[[np.ndarray], np.ndarray]:
        """Distribution function of one coordinate."""
        others = [i for i in range(len(self.points)) if i != axis]
        mass = self.mass.sum(others) if others else self.mass
        heights = np.concatenate([[0.0], mass.cumsum(0).numpy()])
        edges = self.edges[axis].numpy()
        return lambda x: np.interp(x, edges, heights)


def effective_sample_size(values: Tensor) -> float:
    """
    Effective sample size of a mean, the smaller of ArviZ's bulk and plain estimates.

    :param Tensor values: shape ``(chains, draws)``.
    """
    array = values.detach().numpy()
    return min(float(arviz.ess(array, method=method)) for method in ("bulk", "mean"))


def assert_mean(values: Tensor, truth: float, *, min_ess: float = 400, name: str) -> None:
    """
    Check an expectation.

    :param Tensor values: shape ``(chains, draws)``.
    :param float truth: the exact expectation.
    :param float min_ess: fewest effective draws.
    :param str name: what the values are, for the messages.
    """
    mean, error, ess = _mean_and_error(values)
    _check_ess(ess, min_ess, name)
    assert abs(mean - truth) <= _MAX_STANDARD_ERRORS * error, (
        f"{name} is wrong: {mean:.6g} instead of {truth:.6g}, which is "
        f"{abs(mean - truth) / error:.1f} Monte Carlo standard errors of {error:.2g}"
    )


def assert_moments(
    draws: Tensor,
    mean: Tensor | float,
    sd: Tensor | float | None = None,
    *,
    covariance: Tensor | None = None,
    min_ess: float = 400,
    name: str = "draws",
) -> None:
    """
    Check the mean and the spread of every element, and how elements vary together.

    The spread is checked through squares and products of deviations from the exact mean, each
    with its own effective sample size.

    :param Tensor draws: shape ``(chains, draws, ...)``.
    :param mean: exact mean, of shape ``...``.
    :param sd: exact standard deviation, likewise.
    :param Tensor covariance: exact covariance, ``(d, d)``, of draws of shape
        ``(chains, draws, d)``.
    :param float min_ess: fewest effective draws of any quantity.
    :param str name: what the draws are, for the messages.
    """
    shape = draws.shape[2:]
    mean = torch.as_tensor(mean, dtype=draws.dtype).expand(shape)
    flat = draws.reshape(*draws.shape[:2], -1)
    centred, expected = flat - mean.reshape(-1), mean.reshape(-1)
    labels = [f"{name}[{i}]" for i in range(len(expected))] if shape else [name]
    for i, label in enumerate(labels):
        assert_mean(flat[..., i], float(expected[i]), min_ess=min_ess, name=f"mean of {label}")
    if sd is not None:
        variance = torch.as_tensor(sd, dtype=draws.dtype).expand(shape).square().reshape(-1)
        for i, label in enumerate(labels):
            squares = centred[..., i].square()
            text = f"variance of {label}"
            assert_mean(squares, float(variance[i]), min_ess=min_ess, name=text)
    if covariance is not None:
        for i in range(len(labels)):
            for j in range(i + 1):
                products = centred[..., i] * centred[..., j]
                text = f"covariance of {labels[i]} and {labels[j]}"
                assert_mean(products, float(covariance[i, j]), min_ess=min_ess, name=text)


def assert_same_mean(
    first: Tensor, second: Tensor, *, min_ess: float = 400, name: str = "draws"
) -> None:
    """
    Check that two sets of draws have the same mean.

    :param Tensor first: shape ``(chains, draws)``.
    :param Tensor second: the same of another sampler, of any numbers of chains and draws.
    :param float min_ess: fewest effective draws of either.
    :param str name: what the values are, for the messages.
    """
    (a, a_error, a_ess), (b, b_error, b_ess) = _mean_and_error(first), _mean_and_error(second)
    _check_ess(min(a_ess, b_ess), min_ess, name)
    error = math.hypot(a_error, b_error)
    assert abs(a - b) <= _MAX_STANDARD_ERRORS * error, (
        f"{name} differs: {a:.6g} and {b:.6g} are {abs(a - b) / error:.1f} Monte Carlo standard "
        f"errors of {error:.2g} apart"
    )


def assert_distribution(
    draws: Tensor,
    cdf: Callable[[np.ndarray], np.ndarray],
    *,
    min_ess: float = 400,
    name: str = "draws",
) -> None:
    """
    Check a whole distribution, by chi-square and Kolmogorov-Smirnov tests of thinned draws.

    :param Tensor draws: shape ``(chains, draws)``.
    :param cdf: exact distribution function, from arrays to arrays.
    :param float min_ess: fewest effective draws.
    :param str name: what the draws are, for the messages.
    """
    uniform = torch.as_tensor(cdf(draws.detach().numpy()))
    _check_ess(_smallest_ess(uniform), min_ess, name)
    values = thin(uniform).numpy().reshape(-1)
    num_bins = int(min(50, len(values) // _MIN_EXPECTED_COUNT))
    counts, _ = np.histogram(values, num_bins, (0.0, 1.0))
    results = {
        "chi-square": scipy.stats.chisquare(counts).pvalue,
        "Kolmogorov-Smirnov": scipy.stats.kstest(values, "uniform").pvalue,
    }
    for test, p_value in results.items():
        assert p_value >= _MIN_P_VALUE, (
            f"distribution of {name} is wrong: p-value {p_value:.2g} of the {test} test, with "
            f"{len(values)} nearly independent draws; counts in bins of equal probability: "
            f"{counts.tolist()}"
        )


def thin(values: Tensor) -> Tensor:
    """
    Keep every k-th draw, with k so large that what is left is nearly independent.

    :param Tensor values: shape ``(chains, draws)``.
    """
    every = max(2, math.ceil(2 * values.numel() / _smallest_ess(values)))
    return values[:, ::every]


def _smallest_ess(values: Tensor) -> float:
    """Over the location and the spread."""
    deviations = (values - values.mean()).square()
    return min(effective_sample_size(values), effective_sample_size(deviations))


def _mean_and_error(values: Tensor) -> tuple[float, float, float]:
    """Mean, its Monte Carlo standard error, and the effective sample size."""
    ess = effective_sample_size(values)
    return float(values.mean()), float(values.std()) / math.sqrt(ess), ess


def _check_ess(ess: float, min_ess: float, name: str) -> None:
    # written so that a NaN, from draws that never change, fails too
    assert ess >= min_ess, f"too few effective draws for {name}: {ess:.0f} of {min_ess:.0f}"
