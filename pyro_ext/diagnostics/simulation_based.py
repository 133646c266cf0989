"""Simulation-based calibration of any posterior of any Pyro model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .ranks import MIN_SIMULATIONS, RankCalibration, calibration_of_ranks, rank_statistics
from .simulation import Simulation, check_names, names_of, simulate

__all__ = ["Posterior", "Quantity", "simulation_based_calibration"]

Values = dict[str, Tensor]
Posterior = Callable[[Values], Mapping[str, Tensor]]
"""From an observation, by site, to posterior draws by site."""
Quantity = Callable[[Values, Values], Tensor]
"""From latents, by site and with leading dimensions, and an observation to numbers."""


def simulation_based_calibration(
    model: Callable[..., Any],
    posterior: Posterior,
    *,
    observed: str | Sequence[str],
    num_simulations: int = 200,
    batch_size: int | None = None,
    quantities: Mapping[str, Quantity] | None = None,
    sites: Sequence[str] | None = None,
    num_bins: int | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    disable_progbar: bool = False,
) -> RankCalibration:
    r"""
    Rank parameters from the prior among posterior draws given the data they generate.

    .. math:: \theta \sim p(\theta), \quad x \sim p(x \mid \theta), \quad
        \theta_1, \ldots, \theta_L \sim q(\theta \mid x): \qquad
        r = \#\{l : \theta_l < \theta\}

    With the right posterior, :math:`\theta` and the draws have one distribution given the data,
    and the rank :math:`r` is uniform on :math:`0, \ldots, L`. Ranks heaped at both ends mean a
    posterior that is too narrow, in the middle one that is too wide, at one end a biased one:
    :func:`plot_ranks` shows it.

    Any engine will do. Draws must be nearly independent: thin a Markov chain until its effective
    sample size is about the number of draws, or ranks gather at the ends. Ranks of parameters
    alone do not see a posterior that ignores the data; ``quantities`` that look at the data, above
    all the likelihood, do (Modrák et al. 2023).

    :param model: a Pyro model; values it is given, by ``obs`` or conditioning, are ignored.
    :param posterior: called with a simulated observation, values by site, and returns draws of
        latent or deterministic sites by name, shape ``(num_draws,) + site shape``.
    :param observed: name of the observed site, or names.
    :param int num_simulations: at least 20; some hundred to see much.
    :param int batch_size: give so many observations at once to ``posterior``, along a leading
        dimension, and get draws of shape ``(num_draws, batch_size) + site shape``: for posteriors
        that were learned for all observations. One at a time by default.
    :param quantities: further numbers to rank, by name: functions of latents, by site with any
        leading dimensions, and the observation, which return a tensor of the leading dimensions.
    :param sites: which of the posterior's sites to rank, all by default.
    :param int num_bins: of the chi-square test, see :func:`calibration_of_ranks`.
    :param args: the model's positional arguments.
    :param kwargs: the model's keyword arguments.
    :param bool disable_progbar: show no progress.
    :returns: ranks, p-values and a summary. Simulations whose data are not finite are replaced,
        which changes no posterior given finite data, and counted.
    :raises ValueError: for unknown names, draws of a wrong shape or that are not finite, too few
        simulations, or when nearly all of them fail.

    References: Talts et al. 2018, "Validating Bayesian inference algorithms with simulation-based
    calibration", algorithm 1; Modrák et al. 2023, "Simulation-based calibration checking for
    Bayesian computation: the choice of test quantities shapes sensitivity".

    >>> from pyro_ext.diagnostics import simulation_based_calibration
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0))
    >>> def posterior(observation):
    ...     return {"z": dist.Normal(observation["x"] / 2, 0.5**0.5).sample((99,))}
    >>> result = simulation_based_calibration(model, posterior, observed="x", disable_progbar=True)
    >>> result.ranks["z"].shape, result.p_value > 0.001
    (torch.Size([200]), True)
    """
    if num_simulations < MIN_SIMULATIONS:
        raise ValueError(
            f"num_simulations={num_simulations} says too little: give at least {MIN_SIMULATIONS}."
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, or None, got {batch_size}.")
    names = names_of(observed)
    runs = _Runs(lambda: simulate(model, names, args, kwargs), num_simulations)
    rows: list[Values] = []
    num_draws: int | None = None
    with tqdm(total=num_simulations, disable=disable_progbar, desc="Calibration") as bar:
        while len(rows) < num_simulations:
            number = min(batch_size or 1, num_simulations - len(rows))
            runs_now = [runs.next() for _ in range(number)]
            stacked = _stack(runs_now) if batch_size else runs_now[0]
            found = posterior(dict(stacked.observation))
            draws = {name: torch.as_tensor(values) for name, values in found.items()}
            chosen = _chosen(draws, stacked, sites)
            num_draws = _check_draws(chosen, stacked, num_draws)
            ranks = {k: rank_statistics(stacked.latents[k], v) for k, v in chosen.items()}
            for name, quantity in (quantities or {}).items():
                ranks[name] = _rank_quantity(name, quantity, stacked, draws, ranks)
            if batch_size:
                rows += [{k: v[i] for k, v in ranks.items()} for i in range(number)]
            else:
                rows.append(ranks)
            bar.update(number)
    return calibration_of_ranks(
        _stack_values(rows), num_draws or 0, num_bins=num_bins, num_failed=runs.num_failed
    )


class _Runs:
    """Runs of a model with finite data, and the count of the others."""

    def __init__(self, run: Callable[[], Simulation], num_wanted: int) -> None:
        self._run = run
        self._max_failed = 10 * num_wanted + 100
        self.num_failed = 0

    def next(self) -> Simulation:
        while True:
            result = self._run()
            if all(torch.isfinite(value).all() for value in result.observation.values()):
                return result
            self.num_failed += 1
            if self.num_failed > self._max_failed:
                raise ValueError(
                    f"{self.num_failed} simulations returned values that are not finite at "
                    f"{list(result.observation)}: the model fails nearly everywhere in its prior."
                )


def _stack(runs: Sequence[Simulation]) -> Simulation:
    """Several runs along a new leading dimension."""
    return Simulation(
        _stack_values([run.latents for run in runs]),
        _stack_values([run.observation for run in runs]),
        runs[0].inputs,
    )


def _stack_values(rows: Sequence[Values]) -> Values:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _chosen(draws: Values, simulation: Simulation, sites: Sequence[str] | None) -> Values:
    if not draws:
        raise ValueError("posterior returned no draws: it must return a dictionary by site.")
    check_names(draws, simulation.latents, "draws of the posterior")
    if sites is None:
        return draws
    check_names(sites, draws, "sites")
    return {name: draws[name] for name in sites}


def _check_draws(draws: Values, simulation: Simulation, num_draws: int | None) -> int:
    """Return how many there are, everywhere and every time the same."""
    for name, values in draws.items():
        shape = simulation.latents[name].shape
        number = values.shape[0] if values.dim() else 0
        if number == 0 or values.shape[1:] != shape:
            raise ValueError(
                f"posterior returned draws of {name!r} of shape {tuple(values.shape)}; expected "
                f"(num_draws,) + {tuple(shape)}."
            )
        num_draws = number if num_draws is None else num_draws
        if number != num_draws:
            raise ValueError(
                f"posterior returned {number} draws of {name!r}, but {num_draws} before: ranks "
                "need the same number every time."
            )
        if not torch.isfinite(values).all():
            raise ValueError(
                f"posterior returned draws of {name!r} that are not finite, for the observation "
                f"{simulation.observation}."
            )
    return num_draws or 0


def _rank_quantity(
    name: str, quantity: Quantity, simulation: Simulation, draws: Values, taken: Values
) -> Tensor:
    if name in taken:
        raise ValueError(f"quantities: {name!r} is the name of a site; give it another.")
    truth = {key: simulation.latents[key].unsqueeze(0) for key in draws}
    true_value = quantity(truth, simulation.observation)
    values = quantity(draws, simulation.observation)
    if true_value.dim() < 1 or values.shape[1:] != true_value.shape[1:] or len(true_value) != 1:
        raise ValueError(
            f"quantities[{name!r}] returned shape {tuple(values.shape)} for draws and "
            f"{tuple(true_value.shape)} for the truth; both must begin with the leading dimension "
            "of the latents, followed by the same dimensions."
        )
    return rank_statistics(true_value[0], values)
