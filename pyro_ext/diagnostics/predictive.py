"""Whether data that the posterior predicts look like the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.infer import Predictive
from torch import Tensor

from .simulation import check_names, simulate
from .simulation_based import Quantity

__all__ = ["PredictiveCheck", "posterior_predictive_check"]


class PredictiveCheck(NamedTuple):
    """Test quantities of data drawn from the posterior, beside those of the data."""

    replicated: dict[str, Tensor]
    """Of replicated data, shape ``(num_draws,) + shape``."""

    realized: dict[str, Tensor]
    """Of the data, with each draw of the latents, the same shape."""

    tail_probability: dict[str, Tensor]
    """Fraction of draws whose replicated quantity exceeds that of the data, ties by half."""


def posterior_predictive_check(
    model: Callable[..., Any],
    draws: Mapping[str, Tensor],
    observation: Mapping[str, Tensor],
    quantities: Mapping[str, Quantity],
    *,
    parallel: bool = False,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> PredictiveCheck:
    r"""
    Compare data with data drawn anew from the posterior.

    For each posterior draw :math:`\theta_l` the model generates :math:`x_l`; of every test
    quantity the tail probability

    .. math:: P(T(x^{rep}, \theta) > T(x, \theta) \mid x)
        + \tfrac12 P(T(x^{rep}, \theta) = T(x, \theta) \mid x)

    is estimated. Near 0 or 1, the model does not generate data like these. It is no p-value: since
    the posterior has seen the data, tail probabilities under the right model gather around 1/2.

    :param model: a Pyro model; values it is given, by ``obs`` or conditioning, are ignored.
    :param draws: posterior draws by site, shape ``(num_draws,) + site shape``, of any engine.
    :param observation: the data by site.
    :param quantities: by name, functions of latents and an observation, both by site and with a
        leading dimension for draws, to numbers with that leading dimension.
    :param bool parallel: run the model once, under a plate, as in
        :class:`pyro.infer.Predictive`.
    :param args: the model's positional arguments.
    :param kwargs: the model's keyword arguments.
    :returns: quantities and tail probabilities; :func:`plot_predictive_check` draws them.
    :raises ValueError: for unknown names or shapes that do not fit.

    Reference: Gelman, Meng and Stern 1996, "Posterior predictive assessment of model fitness via
    realized discrepancies", eq. 6 and 7.

    >>> from pyro_ext.diagnostics import posterior_predictive_check
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 10.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0).expand([20]).to_event(1))
    >>> x = 3 + 5 * torch.randn(20)  # the spread is not the model's
    >>> check = posterior_predictive_check(
    ...     model, {"z": x.mean() + torch.randn(200) / 20**0.5}, {"x": x},
    ...     {"mean": lambda latents, data: data["x"].mean(-1),
    ...      "spread": lambda latents, data: data["x"].std(-1)},
    ... )
    >>> {name: 0.05 < float(p) < 0.95 for name, p in check.tail_probability.items()}
    {'mean': True, 'spread': False}
    """
    if not observation or not quantities:
        raise ValueError("observation and quantities must have at least one entry each.")
    observation = {name: torch.as_tensor(value) for name, value in observation.items()}
    draws = {name: torch.as_tensor(value) for name, value in draws.items()}
    names = list(observation)
    prior = simulate(model, names, args, kwargs)
    check_names(draws, prior.latents, "draws")
    given = {name: draws[name] for name in draws if name in prior.inputs}
    if not given:
        raise ValueError(f"draws has none of the sites that the model draws, {prior.inputs}.")
    numbers = {len(value) for value in draws.values()}
    if len(numbers) > 1:
        raise ValueError(f"draws of the sites differ in number: {sorted(numbers)}.")
    for name, value in observation.items():
        if value.shape != prior.observation[name].shape:
            raise ValueError(
                f"observation of {name!r} has shape {tuple(value.shape)}, but the model generates "
                f"{tuple(prior.observation[name].shape)}."
            )
    generate = Predictive(poutine.uncondition(model), given, return_sites=names, parallel=parallel)
    with torch.no_grad():
        new = generate(*args, **(kwargs or {}))
        (number,) = numbers
        old = {name: value.expand(number, *value.shape) for name, value in observation.items()}
        replicated = _evaluate(quantities, dict(draws), new, number)
        realized = _evaluate(quantities, dict(draws), old, number)
    tails = {
        name: _tail_probability(values, realized[name]) for name, values in replicated.items()
    }
    return PredictiveCheck(replicated, realized, tails)


def _evaluate(
    quantities: Mapping[str, Quantity],
    draws: dict[str, Tensor],
    data: dict[str, Tensor],
    number: int,
) -> dict[str, Tensor]:
    values = {name: quantity(draws, data) for name, quantity in quantities.items()}
    for name, value in values.items():
        if value.shape[:1] != (number,):
            raise ValueError(
                f"quantities[{name!r}] returned shape {tuple(value.shape)}; its first dimension "
                f"must be that of the {number} draws."
            )
    return values


def _tail_probability(replicated: Tensor, realized: Tensor) -> Tensor:
    above, ties = replicated > realized, replicated == realized
    return (above.to(torch.get_default_dtype()) + 0.5 * ties).mean(0)
