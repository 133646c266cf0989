"""Read which latents and observations a simulator has, and refuse what cannot be answered."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ...errors import ModelStructureError
from ...poutine.sites import delta, is_subsample
from .handlers import PriorIsDrawn, Recorder, Released
from .sites import LatentSite, ObservedSite, Structure, to_support

__all__ = ["inspect_model"]

_MAX_TRIES = 20
_FAILURES = (ArithmeticError, AssertionError, RuntimeError, ValueError)
"""What simulators raise at parameters that they cannot run at, but not what mistakes raise."""


def inspect_model(
    model: Callable[[], Any],
    observed: Sequence[str],
    latents: Collection[str] | None,
    nuisance: Collection[str],
) -> Structure:
    """
    Run a model twice at draws from its prior, and read its structure.

    :param model: a Pyro model without arguments.
    :param observed: names of the sites that are observed.
    :param latents: names or patterns of the latent sites to infer, ``None`` for all.
    :param nuisance: names or patterns of latent sites that are not inferred.
    :raises ValueError: naming the site, what was seen, and what to do.
    :raises ~pyro_ext.errors.ModelStructureError: if two runs have different sites.
    """
    _check_names(observed, latents, nuisance)
    with torch.no_grad():
        first, second = _run(model, observed), _run(model, observed)
    _check_observed(first, observed)
    chosen = _choose(_latent_nodes(first, observed), latents, nuisance)
    _check_same_shapes(first, second, [*chosen, *observed])
    _check_other_evidence(first, observed)
    _check_order(first, observed, chosen)
    sites: list[LatentSite] = []
    start = 0
    for name, node in chosen.items():
        site = _latent_site(name, node, second.nodes[name], start)
        sites.append(site)
        start = site.stop
    _check_prior_is_free_of_nuisance(model, observed, first, second, chosen)
    value = next(iter(chosen.values()))["value"]
    return Structure(
        latents=tuple(sites),
        observed=tuple(
            ObservedSite(n, _shape(n, first.nodes[n]), delta(first.nodes[n]["fn"]) is None)
            for n in observed
        ),
        last_latent=list(chosen)[-1],
        max_plate_nesting=_plate_nesting(first),
        nuisance=tuple(n for n in _latent_nodes(first, observed) if n not in chosen),
        dtype=value.dtype,
        device=value.device,
    )


def _run(model: Callable[[], Any], observed: Collection[str]) -> poutine.Trace:
    """A simulator may fail at some parameters, but hardly twenty times in a row."""
    num_failed = 0
    while True:
        try:
            with poutine.block(), Released(frozenset(observed), {}):
                return poutine.trace(model).get_trace()
        except _FAILURES:
            num_failed += 1
            if num_failed == _MAX_TRIES:
                raise


def _run_prior(
    model: Callable[[], Any], values: Mapping[str, Tensor], last: str
) -> Mapping[str, Any]:
    """The sites up to the last latent to infer, at given values."""
    prior = Recorder(frozenset(), last)
    with poutine.block(), Released(frozenset(), values), poutine.trace() as tracer, prior:
        with contextlib.suppress(PriorIsDrawn):
            model()
    return _sample_nodes(tracer.trace)


def _sample_nodes(trace: poutine.Trace) -> dict[str, Any]:
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample" and not is_subsample(node)
    }


def _latent_nodes(trace: poutine.Trace, observed: Collection[str]) -> dict[str, Any]:
    return {
        name: node
        for name, node in _sample_nodes(trace).items()
        if not node["is_observed"] and delta(node["fn"]) is None and name not in observed
    }


def _check_names(
    observed: Sequence[str], latents: Collection[str] | None, nuisance: Collection[str]
) -> None:
    for argument, names in (("observed", observed), ("latents", latents), ("nuisance", nuisance)):
        if isinstance(names, str):
            raise TypeError(f"{argument}={names!r}: give a list of names, [{names!r}].")
    if not observed:
        raise ValueError(
            "observed is empty: name the sites that will be observed, observed=['x']."
        )
    if len(set(observed)) < len(observed):
        raise ValueError(f"observed={list(observed)} names a site twice.")
    if latents is not None and nuisance:
        raise ValueError(
            "Give either latents, the sites to infer, or nuisance, the sites not to: the others "
            f"follow. Got latents={list(latents)} and nuisance={list(nuisance)}."
        )


def _check_observed(trace: poutine.Trace, observed: Sequence[str]) -> None:
    nodes = _sample_nodes(trace)
    for name in observed:
        if name not in nodes:
            raise ValueError(f"observed has {name!r}, {_no_such_site(name, nodes)}")
        if not isinstance(nodes[name]["value"], Tensor):
            raise ValueError(
                f"The value of observed site {name!r} is a "
                f"{type(nodes[name]['value']).__name__}, not a tensor."
            )


def _no_such_site(name: str, nodes: Collection[str]) -> str:
    near = difflib.get_close_matches(name, nodes, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"which the model does not have.{hint} Its sites are {sorted(nodes)}."


def _choose(
    found: dict[str, Any], latents: Collection[str] | None, nuisance: Collection[str]
) -> dict[str, Any]:
    patterns = nuisance if latents is None else latents
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            argument = "nuisance" if latents is None else "latents"
            raise ValueError(f"{argument} has {pattern!r}, {_no_such_site(pattern, found)}")
    chosen = {
        name: node
        for name, node in found.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns) == (latents is not None)
    }
    if not chosen:
        raise ValueError(
            f"There is no latent site to infer: of {sorted(found)}, all are excluded by "
            f"nuisance={list(nuisance)}."
        )
    for name, node in chosen.items():
        if node["fn"].support.is_discrete or not node["value"].is_floating_point():
            raise ValueError(
                f"Latent site {name!r} has a discrete distribution, and densities are for "
                f"continuous latents. Leave it out by nuisance=[{name!r}]: its values are then "
                "drawn and averaged over."
            )
    return chosen


def _check_same_shapes(first: poutine.Trace, second: poutine.Trace, names: Sequence[str]) -> None:
    a, b = _sample_nodes(first), _sample_nodes(second)
    for name in names:
        if name not in b:
            raise ModelStructureError(
                f"Site {name!r} occurs in one run of the model and not in another. Latent and "
                "observed sites must be the same in every run."
            )
        shapes = [_shape(name, nodes[name]) for nodes in (a, b)]
        if shapes[0] != shapes[1]:
            raise ModelStructureError(
                f"Site {name!r} had shape {tuple(shapes[0])} in one run of the model and "
                f"{tuple(shapes[1])} in another. Pad what varies in length to one shape, with the "
                "length as an observed site of its own, or observe statistics of it."
            )


def _shape(name: str, node: Mapping[str, Any]) -> torch.Size:
    """The shape of a value; that of a site in a plate may still be missing the plate."""
    value: Tensor = node["value"]
    fn = node["fn"]
    return torch.broadcast_shapes(value.shape, fn.batch_shape + fn.event_shape)


def _check_other_evidence(trace: poutine.Trace, observed: Collection[str]) -> None:
    for name, node in _sample_nodes(trace).items():
        if node["is_observed"] and delta(node["fn"]) is None and name not in observed:
            raise ValueError(
                f"Site {name!r} is observed in the model, but is not among observed="
                f"{list(observed)}: its evidence would be ignored. Add it to observed, whose "
                "values are given to posterior(...), or take the observation out of the model."
            )


def _check_order(trace: poutine.Trace, observed: Collection[str], chosen: Collection[str]) -> None:
    order = list(trace.nodes)
    last = max(order.index(name) for name in chosen)
    for name in observed:
        if order.index(name) < last:
            raise ValueError(
                f"Observed site {name!r} is sampled before latent site {order[last]!r}. Sample "
                "the latents to infer first: what is before the last of them is taken for the "
                f"prior. Or leave it out by nuisance=[{order[last]!r}]."
            )


def _latent_site(
    name: str, node: Mapping[str, Any], other: Mapping[str, Any], start: int
) -> LatentSite:
    transform = to_support(node["fn"].support)
    unconstrained = transform.inv(node["value"])
    again = to_support(other["fn"].support)
    zero = torch.zeros_like(unconstrained)
    if not torch.equal(transform(zero), again(zero)):
        raise ValueError(
            f"The support of latent site {name!r} depends on other latent sites. Sample it on a "
            "fixed support, for example as the difference or the ratio to the other one, and "
            "compute what the simulator needs from it."
        )
    return LatentSite(
        name=name,
        shape=node["value"].shape,
        batch_dim=len(node["fn"].batch_shape),
        unconstrained_shape=unconstrained.shape,
        start=start,
        stop=start + unconstrained.numel(),
        transform=transform,
        support=node["fn"].support,
        frames=tuple(frame for frame in node["cond_indep_stack"] if frame.vectorized),
    )


def _check_prior_is_free_of_nuisance(
    model: Callable[[], Any],
    observed: Collection[str],
    first: poutine.Trace,
    second: poutine.Trace,
    chosen: Mapping[str, Any],
) -> None:
    """The prior density of what is inferred has to be that of its sites alone."""
    found = _latent_nodes(first, observed)
    others = _latent_nodes(second, observed)
    if not any(name not in chosen for name in found):
        return
    values = {name: node["value"] for name, node in chosen.items()}
    values |= {n: others[n]["value"] for n in found if n not in chosen and n in others}
    with torch.no_grad():
        again = _run_prior(model, values, list(chosen)[-1])
    for name, node in chosen.items():
        log_probs = [fn.log_prob(node["value"]) for fn in (node["fn"], again[name]["fn"])]
        if not torch.allclose(log_probs[0], log_probs[1], rtol=1e-4, atol=1e-6):
            excluded = sorted(n for n in found if n not in chosen)
            raise ValueError(
                f"The prior of latent site {name!r} depends on sites that are excluded, among "
                f"{excluded}: without them it has no density in closed form. Infer those too."
            )


def _plate_nesting(trace: poutine.Trace) -> int:
    nodes = _sample_nodes(trace).values()
    dims = [-frame.dim for node in nodes for frame in node["cond_indep_stack"] if frame.vectorized]
    batches = [len(node["fn"].batch_shape) for node in nodes]
    return max([0, *dims, *batches])
