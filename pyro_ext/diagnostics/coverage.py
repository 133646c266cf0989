"""How often credible regions contain the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ranks import RankCalibration, uniform_of_ranks, uniformity_p_value
from .simulation import check_names
from .simulation_based import Posterior, Quantity, simulation_based_calibration

__all__ = [
    "ExpectedCoverage",
    "central_coverage",
    "expected_coverage",
    "highest_density_coverage",
]

_NUM_LEVELS = 101
_LOG_PROB = "log_prob of the posterior"


class ExpectedCoverage(NamedTuple):
    """Fractions of simulations whose true value is in credible regions of every level."""

    levels: Tensor
    """Nominal probabilities of the regions, from 0 to 1, shape ``(num_levels,)``."""

    coverage: dict[str, Tensor]
    """What fraction of them holds the truth, shape ``(num_levels,) + shape``."""

    excess: dict[str, Tensor]
    """Coverage minus level, averaged over levels: negative for over-confident posteriors."""

    p_value: dict[str, Tensor]
    """P-values of Kolmogorov and Smirnov's test that coverage is nominal at all levels."""

    num_simulations: int
    """Number of simulations."""


def expected_coverage(
    model: Callable[..., Any],
    posterior: Posterior,
    log_prob: Quantity,
    *,
    observed: str | Sequence[str],
    num_simulations: int = 200,
    batch_size: int | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    disable_progbar: bool = False,
) -> ExpectedCoverage:
    r"""
    How often regions of highest posterior density contain the parameters behind the data.

    The region of level :math:`1 - \alpha` is the smallest set with that posterior probability; a
    parameter is in it if less than that part of the draws has a higher density,

    .. math:: \theta \in \Theta_{1-\alpha}(x) \iff
        \tfrac1L \#\{l : q(\theta_l \mid x) > q(\theta \mid x)\} \le 1 - \alpha.

    Over parameters from the prior and data from them, the right posterior covers the truth as
    often as it says. Coverage below the level means that the posterior is over-confident. The
    prior in place of the posterior has nominal coverage, too: this says nothing about whether the
    data are used (see ``quantities`` of :func:`simulation_based_calibration`).

    :param model: a Pyro model; values it is given, by ``obs`` or conditioning, are ignored.
    :param posterior: from an observation to draws by site, as in
        :func:`simulation_based_calibration`.
    :param log_prob: logarithm of the posterior's density, up to a constant that may depend on the
        observation: called with latents by site, shape ``(n,) + site shape``, and the observation,
        and returns shape ``(n,)``; ``(n, batch_size)`` with ``batch_size``.
    :param observed: name of the observed site, or names.
    :param int num_simulations: at least 20; some hundred to see much.
    :param int batch_size: give so many observations at once, see
        :func:`simulation_based_calibration`.
    :param args: the model's positional arguments.
    :param kwargs: the model's keyword arguments.
    :param bool disable_progbar: show no progress.
    :returns: the curve, under the name ``"highest density"``; :func:`plot_coverage` draws it.
    :raises ValueError: as :func:`simulation_based_calibration`.

    Reference: Hermans et al. 2022, "A trust crisis in simulation-based inference? Your posterior
    approximations can be unfaithful", eq. 4 and section 2.

    >>> from pyro_ext.diagnostics import expected_coverage
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0))
    >>> def posterior(x):
    ...     return dist.Normal(x / 2, 0.1)  # far too narrow
    >>> result = expected_coverage(
    ...     model,
    ...     lambda observation: {"z": posterior(observation["x"]).sample((99,))},
    ...     lambda latents, observation: posterior(observation["x"]).log_prob(latents["z"]),
    ...     observed="x", disable_progbar=True,
    ... )
    >>> float(result.excess["highest density"]) < -0.3
    True
    """
    ranks = simulation_based_calibration(
        model,
        posterior,
        observed=observed,
        num_simulations=num_simulations,
        batch_size=batch_size,
        quantities={_LOG_PROB: log_prob},
        args=args,
        kwargs=kwargs,
        disable_progbar=disable_progbar,
    )
    return highest_density_coverage(ranks, _LOG_PROB)


def highest_density_coverage(calibration: RankCalibration, log_prob: str) -> ExpectedCoverage:
    """
    Coverage of regions of highest density, from ranks of the density.

    For a run of :func:`simulation_based_calibration` with the logarithm of the posterior's density
    among its ``quantities``; see :func:`expected_coverage`.

    :param RankCalibration calibration: ranks, among them those of the density.
    :param str log_prob: the name of that quantity.
    :returns: one curve, under the name ``"highest density"``.
    :raises ValueError: for an unknown name.
    """
    check_names([log_prob], calibration.ranks, "log_prob")
    uniform = uniform_of_ranks(calibration.ranks[log_prob], calibration.num_draws + 1)
    return _coverage({"highest density": 1 - uniform})


def central_coverage(calibration: RankCalibration) -> ExpectedCoverage:
    r"""
    Coverage of central intervals, for each element of each site, from ranks alone.

    The central interval of level :math:`1 - \alpha` lies between the quantiles
    :math:`\alpha / 2` and :math:`1 - \alpha / 2` of the draws: no density is needed.

    :param RankCalibration calibration: what :func:`simulation_based_calibration` returned.
    :returns: a curve for each element of each site.

    >>> from pyro_ext.diagnostics import calibration_of_ranks, central_coverage
    >>> at_the_ends = calibration_of_ranks({"z": 99 * torch.randint(2, (500,))}, 99)
    >>> curve = central_coverage(at_the_ends)
    >>> float(curve.coverage["z"][curve.levels <= 0.9].max())  # of a posterior far too narrow
    0.0
    """
    number = calibration.num_draws + 1
    uniform = {name: uniform_of_ranks(r, number) for name, r in calibration.ranks.items()}
    return _coverage({name: (2 * u - 1).abs() for name, u in uniform.items()})


def _coverage(smallest_level: Mapping[str, Tensor]) -> ExpectedCoverage:
    """From the level of the smallest region with the truth, ``(num_simulations,) + shape``."""
    levels = torch.linspace(0, 1, _NUM_LEVELS)
    number = len(next(iter(smallest_level.values())))
    coverage = {
        name: torch.stack([(u <= level).to(levels).mean(0) for level in levels])
        for name, u in smallest_level.items()
    }
    # the integral of P(u <= level) over levels is 1 - E[u]
    excess = {name: 0.5 - u.mean(0).to(levels) for name, u in smallest_level.items()}
    p_value = {name: uniformity_p_value(u) for name, u in smallest_level.items()}
    return ExpectedCoverage(levels, coverage, excess, p_value, number)
