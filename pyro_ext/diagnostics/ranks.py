"""Ranks of true values among posterior draws, and tests of their uniformity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MIN_SIMULATIONS", "RankCalibration", "calibration_of_ranks", "rank_statistics"]

MIN_SIMULATIONS = 20
_EXPECTED_COUNT = 10  # ranks per bin, at least, where there are enough of them
_MAX_BINS = 20


class RankCalibration(NamedTuple):
    """Ranks of true values among posterior draws, one row per simulation."""

    ranks: dict[str, Tensor]
    """Integers from 0 to ``num_draws`` for every site, shape ``(num_simulations,) + shape``."""

    num_draws: int
    """Posterior draws that each true value was ranked among."""

    num_failed: int
    """Simulations with data that were not finite, which were replaced by others."""

    chi_square: dict[str, Tensor]
    """P-values of Pearson's test that ranks are uniform, the shape of the site."""

    kolmogorov_smirnov: dict[str, Tensor]
    """P-values of Kolmogorov and Smirnov's test, the shape of the site."""

    @property
    def p_value(self) -> float:
        """
        P-value of all ranks together: the smallest one times the number of tests (Bonferroni).

        Below 0.01, say, the posterior is wrong. A large value says only that so many simulations
        do not show it.
        """
        tests = [*self.chi_square.values(), *self.kolmogorov_smirnov.values()]
        values = torch.cat([each.reshape(-1) for each in tests])
        return min(1.0, float(values.min()) * len(values))

    @property
    def location(self) -> dict[str, Tensor]:
        """
        Mean of the ranks as fractions, 1/2 for a right posterior.

        Larger means that the posterior is too low: true values lie above most draws.
        """
        return {name: u.mean(0) for name, u in self._fractions().items()}

    @property
    def spread(self) -> dict[str, Tensor]:
        """
        Mean squared distance of the fractions from 1/2, relative to uniform ones.

        1 for a right posterior, up to 3 for one that is too narrow, near 0 for one too wide.
        """
        uniform = (1 - (self.num_draws + 1) ** -2) / 12
        return {n: (u - 0.5).square().mean(0) / uniform for n, u in self._fractions().items()}

    def summary(self) -> str:
        """A table with a line for every element of every site."""
        rows: list[tuple[str, ...]] = [("", "chi-square", "KS", "location", "spread")]
        columns = (self.chi_square, self.kolmogorov_smirnov, self.location, self.spread)
        for name, ranks in self.ranks.items():
            values = torch.stack([column[name].reshape(-1) for column in columns], -1)
            for index, numbers in enumerate(values.tolist()):
                where = torch.unravel_index(torch.tensor(index), ranks.shape[1:])
                label = f"{name}[{','.join(str(int(i)) for i in where)}]" if where else name
                rows.append((label, *(f"{number:.3f}" for number in numbers)))
        width = max(len(row[0]) for row in rows)
        lines = [row[0].ljust(width) + "".join(f"{each:>12}" for each in row[1:]) for row in rows]
        ending = (
            f"{len(ranks)} simulations, {self.num_draws} draws each; "
            f"p-value of all together {self.p_value:.3g}"
        )
        return "\n".join([*lines, ending])

    def _fractions(self) -> dict[str, Tensor]:
        kind = torch.get_default_dtype()
        return {n: (r.to(kind) + 0.5) / (self.num_draws + 1) for n, r in self.ranks.items()}


def rank_statistics(truth: Tensor, draws: Tensor) -> Tensor:
    r"""
    Rank of each true value among draws, ties broken at random.

    The number of draws below the true value, plus a uniform choice from 0 to the number of draws
    equal to it: uniform on :math:`0, \ldots, L` if the truth and the :math:`L` draws are
    independent draws from one distribution, discrete ones included.

    :param Tensor truth: true values, any shape.
    :param Tensor draws: posterior draws, shape ``(num_draws,) + truth.shape``.
    :returns: integers, the shape of ``truth``.
    :raises ValueError: if the shapes do not fit, or values are NaN.

    >>> from pyro_ext.diagnostics import rank_statistics
    >>> rank_statistics(torch.tensor([0.5, 9.0]), torch.arange(3.0)[:, None].expand(3, 2))
    tensor([1, 3])
    """
    if draws.dim() < 1 or not len(draws) or draws.shape[1:] != truth.shape:
        raise ValueError(
            f"draws have shape {tuple(draws.shape)}, which is not (num_draws,) + "
            f"{tuple(truth.shape)}, the shape of the true values."
        )
    if truth.isnan().any() or draws.isnan().any():
        raise ValueError("There are NaNs among the values to rank.")
    ties = (draws == truth).sum(0)
    chosen = (torch.rand(ties.shape, device=ties.device) * (ties + 1)).long()
    return (draws < truth).sum(0) + chosen.minimum(ties)


def calibration_of_ranks(
    ranks: Mapping[str, Tensor],
    num_draws: int,
    *,
    num_bins: int | None = None,
    num_failed: int = 0,
) -> RankCalibration:
    """
    Test whether ranks are uniform.

    For ranks from a loop of one's own; :func:`simulation_based_calibration` has the loop, too.

    :param ranks: integers from 0 to ``num_draws`` by name, shape ``(num_simulations,) + shape``.
    :param int num_draws: draws that the true values were ranked among.
    :param int num_bins: neighbouring ranks are counted together in so many bins by the chi-square
        test; chosen by default such that at least 10 are expected in each, at most 20.
    :param int num_failed: how many simulations were replaced, for the record.
    :returns: ranks and p-values. The Kolmogorov-Smirnov test adds uniform noise to the ranks, so
        that its p-values are exact, and vary from call to call.
    :raises ValueError: for fewer than 20 simulations, or ranks out of range.

    >>> from pyro_ext.diagnostics import calibration_of_ranks
    >>> result = calibration_of_ranks({"z": torch.randint(100, (500,))}, 99)
    >>> result.p_value > 0.01
    True
    >>> too_narrow = torch.randint(100, (500,)) // 90 * 99  # the lowest or the highest rank
    >>> calibration_of_ranks({"z": too_narrow}, 99).p_value < 1e-6
    True
    """
    if not ranks:
        raise ValueError("ranks must hold at least one site.")
    for name, values in ranks.items():
        _check_ranks(name, values, num_draws)
    number = len(next(iter(ranks.values())))
    if num_bins is None:
        num_bins = max(2, min(_MAX_BINS, number // _EXPECTED_COUNT))
    if num_bins < 2:
        raise ValueError(f"num_bins must be at least 2, got {num_bins}.")
    num_bins = min(num_bins, num_draws + 1)
    return RankCalibration(
        dict(ranks),
        num_draws,
        num_failed,
        {name: _chi_square(values, num_draws + 1, num_bins) for name, values in ranks.items()},
        {name: _kolmogorov_smirnov(values, num_draws + 1) for name, values in ranks.items()},
    )


def uniform_of_ranks(ranks: Tensor, num_ranks: int) -> Tensor:
    """Spread each rank evenly over its part of the unit interval."""
    noise = torch.rand(ranks.shape, dtype=torch.float64, device=ranks.device)
    return (ranks + noise) / num_ranks


def uniformity_p_value(values: Tensor) -> Tensor:
    """P-values of Kolmogorov and Smirnov's test, one for each column of ``(n,) + shape``."""
    import scipy.stats  # here, since its import adds a filter of warnings

    columns = values.detach().cpu().reshape(len(values), -1).T.numpy()
    results = [float(scipy.stats.kstest(column, "uniform").pvalue) for column in columns]
    return torch.tensor(results).reshape(values.shape[1:])


def _kolmogorov_smirnov(ranks: Tensor, num_ranks: int) -> Tensor:
    return uniformity_p_value(uniform_of_ranks(ranks, num_ranks))


def _chi_square(ranks: Tensor, num_ranks: int, num_bins: int) -> Tensor:
    """Pearson's test; a bin may hold one rank more than another, and more is expected of it."""
    import scipy.stats

    bins = torch.arange(num_ranks) * num_bins // num_ranks
    expected = torch.bincount(bins, minlength=num_bins) * (len(ranks) / num_ranks)
    columns = ranks.cpu().reshape(len(ranks), -1).T
    counts = [torch.bincount(bins[column], minlength=num_bins) for column in columns]
    results = [
        float(scipy.stats.chisquare(count.numpy(), expected.numpy()).pvalue) for count in counts
    ]
    return torch.tensor(results).reshape(ranks.shape[1:])


def _check_ranks(name: str, values: Tensor, num_draws: int) -> None:
    if values.is_floating_point() or values.dim() < 1:
        raise ValueError(
            f"ranks of {name!r} must be integers with a row for each simulation, got "
            f"{values.dtype} of shape {tuple(values.shape)}."
        )
    if len(values) < MIN_SIMULATIONS:
        raise ValueError(
            f"{len(values)} simulations say too little about {name!r}: run at least "
            f"{MIN_SIMULATIONS}, better some hundred."
        )
    low, high = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
    if low < 0 or high > num_draws:
        raise ValueError(
            f"ranks of {name!r} go from {low} to {high}, but with num_draws={num_draws} they are "
            f"between 0 and {num_draws}."
        )
