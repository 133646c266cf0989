"""Parameters and data drawn together from a model."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import Tensor

from ..poutine.sites import delta, is_subsample

__all__ = ["Simulation", "check_names", "names_of", "simulate"]


class Simulation(NamedTuple):
    """One run of a model, or several along a leading dimension."""

    latents: dict[str, Tensor]
    """Values of the sites that are not observed, deterministic ones included."""

    observation: dict[str, Tensor]
    """Values of the observed sites."""

    inputs: frozenset[str]
    """Names of the latents that were drawn, not computed."""


def simulate(
    model: Callable[..., Any],
    observed: Sequence[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Simulation:
    """
    Run a model once, drawing also what it observes.

    :param model: a Pyro model; values given to it, by ``obs`` or by conditioning, are ignored.
    :param observed: names of the sites, sampled or deterministic, that are the observation.
    :param args: the model's positional arguments.
    :param kwargs: the model's keyword arguments.
    :raises ValueError: for an unknown name, a model without latents, or one with a factor.
    """
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(poutine.uncondition(model)).get_trace(*args, **(kwargs or {}))
    sites: dict[str, Any] = {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not is_subsample(site)
    }
    factors = [name for name, site in sites.items() if _is_factor(site["fn"])]
    if factors:
        raise ValueError(
            f"The model has the factors {factors}, so that running it does not draw from its "
            "joint distribution: write them as sample sites, or take them out."
        )
    check_names(observed, sites, "observed")
    latents = {name: site["value"] for name, site in sites.items() if name not in observed}
    inputs = frozenset(name for name in latents if delta(sites[name]["fn"]) is None)
    if not inputs:
        raise ValueError(
            f"Nothing is left to infer: observed={list(observed)} names all that the model draws."
        )
    return Simulation(latents, {name: sites[name]["value"] for name in observed}, inputs)


def names_of(observed: str | Sequence[str]) -> list[str]:
    """
    Names as a list, of which one alone may be given without.

    :raises ValueError: if there is none.
    """
    names = [observed] if isinstance(observed, str) else list(observed)
    if not names:
        raise ValueError("observed must name at least one site of the model.")
    return names


def check_names(names: Collection[str], known: Collection[str], what: str) -> None:
    """
    Refuse names that are not known, with the nearest one that is.

    :raises ValueError: naming the first of them.
    """
    for name in names:
        if name in known:
            continue
        near = difflib.get_close_matches(str(name), list(known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {sorted(known)}."
        raise ValueError(f"{what}: the model has no site {name!r}; {hint}")


def _is_factor(fn: Any) -> bool:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return isinstance(fn, dist.Unit)
