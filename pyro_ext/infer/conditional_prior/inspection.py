"""Read the structure of a conditioned model, and refuse what cannot be answered rightly."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ...errors import ModelStructureError, SamplingWarning
from ...poutine.condition_on import FillFreeElements, evidence_of
from ...poutine.frozen import FrozenMessenger
from ...poutine.sites import delta, is_subsample
from .other_evidence import OtherEvidence
from .sites import LatentSite, Structure

__all__ = [
    "Inspection",
    "inspect_model",
    "latent_nodes",
    "observed_nodes",
    "run_model",
    "sample_nodes",
]

_TRIES_TO_DIFFER = 20


class Inspection(NamedTuple):
    """What one look at a model has found."""

    structure: Structure
    trace: poutine.Trace  # a run at a draw from the prior
    learned: frozenset[str]  # parameters that the model shows to an optimizer
    not_guided: tuple[str, ...]  # latent sites that were left out on purpose


def inspect_model(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sites: Collection[str] | None,
) -> Inspection:
    """
    Run a model at draws from its prior, and read its structure.

    :param model: a conditioned Pyro model.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    :param sites: names of the latent sites to guide, ``None`` for all.
    :raises ValueError: naming the site, what was seen, and what to do.
    :raises ~pyro_ext.errors.ModelStructureError: if two runs have different sites.
    """
    handler = FrozenMessenger()
    with torch.no_grad():
        trace = run_model(handler(model), args, kwargs)
    switched, learned = list(handler.switched_modules), frozenset(handler.hidden_params)
    with torch.no_grad():
        second = run_model(model, args, kwargs)
    _check_same_sites(trace, second)
    _check_plates(trace)
    latents = latent_nodes(trace)
    chosen = _choose(latents, sites)
    _check_continuous(chosen)
    structure = _structure(chosen, trace)
    _check_supports(structure, second)
    _check_free_elements(model, args, kwargs, trace)
    _check_no_encoder(model, args, kwargs, trace, chosen)
    _warn_of_training_mode(switched)
    _warn_of_ignored_latents(model, args, kwargs, trace)
    return Inspection(structure, trace, learned, tuple(sorted(latents.keys() - chosen.keys())))


def run_model(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor] | None = None,
) -> poutine.Trace:
    """One run that leaves the model as it is and that nothing around it sees."""
    if values is not None:
        model = poutine.condition(model, dict(values))
    with poutine.block(), FrozenMessenger():
        return poutine.trace(model).get_trace(*args, **kwargs)


def sample_nodes(trace: poutine.Trace) -> dict[str, Any]:
    """All sample sites in a trace but the choices of plates."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample" and not is_subsample(node)
    }


def latent_nodes(trace: poutine.Trace) -> dict[str, Any]:
    """The random choices in a trace that nothing has fixed."""
    return {
        name: node
        for name, node in sample_nodes(trace).items()
        if not (node["is_observed"] or delta(node["fn"]) is not None)
    }


def observed_nodes(trace: poutine.Trace) -> dict[str, Any]:
    """The observed sites of a trace that have a density."""
    return {
        name: node
        for name, node in sample_nodes(trace).items()
        if node["is_observed"] and delta(node["fn"]) is None
    }


def _check_same_sites(first: poutine.Trace, second: poutine.Trace) -> None:
    a, b = sample_nodes(first), sample_nodes(second)
    for name in sorted(a.keys() ^ b.keys()):
        raise ModelStructureError(
            f"Site {name!r} occurs in one run of the model and not in another. The sites of a "
            "model must be the same in every run."
        )
    for name, node in a.items():
        shapes = [getattr(n["value"], "shape", None) for n in (node, b[name])]
        if shapes[0] != shapes[1]:
            raise ModelStructureError(
                f"Site {name!r} had shape {tuple(shapes[0] or ())} in one run of the model and "
                f"{tuple(shapes[1] or ())} in another. Shapes must not depend on random values."
            )


def _check_plates(trace: poutine.Trace) -> None:
    nodes: dict[str, Any] = dict(trace.nodes)
    for name, node in nodes.items():
        if node["type"] != "sample" or not is_subsample(node):
            continue
        if node["fn"].subsample_size not in (None, node["fn"].size):
            raise ValueError(
                f"Plate {name!r} subsamples {node['fn'].subsample_size} of {node['fn'].size} "
                "elements, but every row of evidence has parameters of its own. Remove "
                "subsample_size, and fit as many rows at once as you like."
            )


def _choose(latents: dict[str, Any], sites: Collection[str] | None) -> dict[str, Any]:
    if not latents:
        raise ValueError(
            "The model has no latent site, so there is nothing to infer. A decoder needs its "
            "pyro.sample('z', prior) inside the model, without an observation."
        )
    if sites is None:
        return latents
    for name in sites:
        if name not in latents:
            near = difflib.get_close_matches(name, latents, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"sites has {name!r}, which is no latent site of the model.{hint} Its latent "
                f"sites are {sorted(latents)}."
            )
    return {name: node for name, node in latents.items() if name in sites}


def _check_continuous(chosen: dict[str, Any]) -> None:
    for name, node in chosen.items():
        if node["fn"].support.is_discrete or not node["value"].is_floating_point():
            raise ValueError(
                f"Latent site {name!r} has the discrete distribution {_family(node['fn'])}, which "
                "no invertible map of continuous noise can represent. Sum it out inside the model "
                "(for one of a few values, a mixture by dist.MixtureSameFamily), or leave it out "
                "by sites=[...] and give it a guide of its own."
            )


def _structure(chosen: dict[str, Any], trace: poutine.Trace) -> Structure:
    nodes = [*chosen.values(), *observed_nodes(trace).values()]
    if len(nodes) == len(chosen):
        raise ValueError(
            "The model has no observed site, so there is no evidence: "
            "pyro_ext.poutine.condition_on(model, data={...}, mask={...}) gives it some, also "
            "where no element at all is observed."
        )
    common = set.intersection(*(_vectorized_frames(node) for node in nodes))
    row_frames = tuple(sorted(common, key=lambda frame: frame.dim))
    row_dims = {frame.dim: frame.size for frame in row_frames}
    sites: list[LatentSite] = []
    start = 0
    for name, node in chosen.items():
        fn = node["fn"]
        num_batch = len(fn.batch_shape)
        is_row = tuple(i - num_batch in row_dims for i in range(num_batch))
        transform = biject_to(fn.support)
        unconstrained = transform.inv(node["value"])
        event_shape = unconstrained.shape[num_batch:]
        own = [n for n, row in zip(fn.batch_shape, is_row, strict=True) if not row]
        stop = start + torch.Size([*own, *event_shape]).numel()
        frames = tuple(sorted(_vectorized_frames(node), key=lambda frame: frame.dim))
        sites.append(
            LatentSite(
                name=name,
                start=start,
                stop=stop,
                batch_shape=fn.batch_shape,
                event_shape=event_shape,
                event_dim=fn.event_dim,
                is_row=is_row,
                transform=transform,
                frames=frames,
            )
        )
        start = stop
    nesting = max(len(site.batch_shape) for site in sites)
    value = next(iter(chosen.values()))["value"]
    return Structure(
        sites=tuple(sites),
        row_frames=row_frames,
        row_shape=torch.Size(row_dims.get(i - nesting, 1) for i in range(nesting)),
        dtype=value.dtype,
        device=value.device,
    )


def _vectorized_frames(node: Mapping[str, Any]) -> set[Any]:
    return {frame for frame in node["cond_indep_stack"] if frame.vectorized}


def _check_supports(structure: Structure, other: poutine.Trace) -> None:
    """Bounds that move with other latents would make the constraint another one in every draw."""
    nodes = sample_nodes(other)
    for site in structure.sites:
        node = nodes[site.name]
        u = torch.zeros([*site.batch_shape, *site.event_shape]).to(node["value"])
        values = (site.transform(u), biject_to(node["fn"].support)(u))
        if not torch.equal(*values):
            raise ValueError(
                f"The support of latent site {site.name!r} depends on other latent sites. Sample "
                "it on a fixed support and compute what the model needs from it."
            )


def _check_free_elements(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    trace: poutine.Trace,
) -> None:
    """Given the latents, nothing may depend on what was not observed (observation 1)."""
    free: dict[str, Tensor] = {}
    nodes = sample_nodes(trace)
    for name, node in nodes.items():
        evidence = evidence_of(node)
        if evidence is not None and not bool(evidence.mask.all()):
            whole = evidence.units.to_event(evidence.event_dims)
            other = node["value"].clone()
            with torch.no_grad():
                for _ in range(_TRIES_TO_DIFFER):
                    other = torch.where(other == node["value"], whole.sample(), other)
            free[name] = other
    if not free:
        return
    values = {name: node["value"] for name, node in latent_nodes(trace).items()}
    with FillFreeElements({name: nodes[name]["value"] for name in free}):
        first = sample_nodes(run_model(model, args, kwargs, values))
    with FillFreeElements(free):
        second = sample_nodes(run_model(model, args, kwargs, values))
    for name, node in first.items():
        if delta(node["fn"]) is None and not _same_log_prob(node, second[name]):
            raise ValueError(
                f"Site {name!r} depends on elements of {sorted(free)} that are not observed, "
                "beside the latents: these would have to be inferred too. Make them latent sites "
                "of the model."
            )


def _check_no_encoder(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    trace: poutine.Trace,
    chosen: dict[str, Any],
) -> None:
    """The prior must not see the evidence, as it does where an encoder is left in the model."""
    given = [_given(node) for node in observed_nodes(trace).values()]
    values = {name: node["value"] for name, node in latent_nodes(trace).items()}
    with OtherEvidence([value for value in given if value is not None]):
        others = sample_nodes(run_model(model, args, kwargs, values))
    for name, node in chosen.items():
        if not _same_log_prob(node, others[name]):
            raise ValueError(
                f"The distribution of latent site {name!r} depends on the evidence itself: an "
                "encoder is left in the model. Give a model in which it has its prior, as in the "
                "model that the autoencoder was trained with."
            )


def _given(node: Mapping[str, Any]) -> Tensor | None:
    evidence = evidence_of(node)
    return node["value"] if evidence is None else evidence.given


def _same_log_prob(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    # both at the value of the first: only the distributions are compared
    first, second = (node["fn"].log_prob(a["value"]) for node in (a, b))
    return torch.allclose(first, second, rtol=1e-4, atol=1e-6, equal_nan=True)


def _warn_of_training_mode(switched: list[nn.Module]) -> None:
    layers = {type(m).__name__ for m in switched if isinstance(m, _BatchNorm | _DropoutNd)}
    if layers:
        warnings.warn(
            f"The model has layers in training mode ({', '.join(sorted(layers))}), through which "
            "rows and draws influence each other. This guide runs it in evaluation mode; SVI and "
            "Predictive do so if you give them pyro_ext.poutine.frozen(model), or after .eval().",
            SamplingWarning,
            stacklevel=4,
        )


def _warn_of_ignored_latents(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    trace: poutine.Trace,
) -> None:
    values = {
        name: node["value"].detach().requires_grad_(node["value"].is_floating_point())
        for name, node in latent_nodes(trace).items()
    }
    variables = [value for value in values.values() if value.requires_grad]
    names = []
    with torch.enable_grad():
        run = run_model(model, args, kwargs, values)
        for name, node in observed_nodes(run).items():
            evidence = evidence_of(node)
            nothing = evidence is not None and not bool(evidence.mask.any())
            if name in values or nothing:
                continue
            names.append(name)
            if _depends_on(_log_prob(name, node), variables):
                return
    if names:
        warnings.warn(
            f"The evidence at {names} does not depend on any latent site: the posterior is the "
            "prior. Does the decoder use its input, or detach it?",
            SamplingWarning,
            stacklevel=4,
        )


def _log_prob(name: str, node: Mapping[str, Any]) -> Tensor:
    try:
        return node["fn"].log_prob(node["value"])
    except ValueError as error:
        raise ValueError(
            f"The evidence at site {name!r} has no density under its distribution "
            f"{_family(node['fn'])}: {error}"
        ) from error


def _depends_on(value: Tensor, variables: list[Tensor]) -> bool:
    if not value.requires_grad:
        return False
    gradients = torch.autograd.grad(value.sum(), variables, allow_unused=True)
    return any(gradient is not None and bool((gradient != 0).any()) for gradient in gradients)


def _family(fn: Any) -> str:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return type(fn).__name__
