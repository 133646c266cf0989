"""A finished run as ArviZ data, and what the model computes from its draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.func import vmap

from ..poutine.sites import is_computed, is_subsample

__all__ = ["deterministic_values", "to_arviz"]

# Pyro's and our names of per-draw statistics -> ArviZ's
_ARVIZ_NAMES = {
    "accept_prob": "acceptance_rate",
    "num_steps": "n_steps",
    "energy": "energy",
    "step_size": "step_size",
    "projection_iterations": "projection_iterations",
    "constraint_residual": "constraint_residual",
    "status": "status",
}
_CHUNK = 1024  # draws that the model is re-run on at once


def to_arviz(mcmc: Any, *, deterministics: bool = True) -> Any:
    """
    Convert a finished run to ArviZ's container.

    Groups: ``posterior`` (latent sites and, computed anew from them, deterministic sites that
    are not conditioned), ``sample_stats`` (``diverging``, ``acceptance_rate``, ``energy``,
    ``n_steps``, ... where the kernel records them) and ``observed_data`` (observed sample sites
    and conditioned deterministic sites).

    :param mcmc: a :class:`pyro_ext.infer.MCMC` or :class:`pyro.infer.MCMC` after ``run``.
    :param bool deterministics: whether to compute deterministic sites.
    :returns: ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with ArviZ 1.x.
    :raises ImportError: if ArviZ is not installed.
    """
    try:
        import arviz
    except ImportError as error:
        raise ImportError("to_arviz needs ArviZ: pip install arviz.") from error
    samples = mcmc.get_samples(group_by_chain=True)
    model, args, kwargs = mcmc.kernel.model, mcmc._args, mcmc._kwargs
    posterior = dict(samples)
    if deterministics:
        posterior.update(deterministic_values(model, samples, *args, **kwargs))
    groups: dict[str, Any] = {
        "posterior": {name: _numpy(value) for name, value in posterior.items()},
        "sample_stats": _sample_stats(mcmc, next(iter(samples.values())).shape[:2]),
        "observed_data": _observed_data(model, args, kwargs),
    }
    groups = {name: group for name, group in groups.items() if group}
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(groups)
    return arviz.from_dict(**groups)


def deterministic_values(
    model: Callable[..., Any], samples: Mapping[str, Tensor], *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    """
    Compute the deterministic sites of a model from posterior draws of its latent sites.

    :param model: a Pyro model; sites that it conditions are left out of the result.
    :param samples: values of all latent sites, ``(chains, draws, ...)``.
    :param args: the model's positional arguments.
    :param kwargs: the model's keyword arguments.
    :returns: values by name, ``(chains, draws, ...)``.
    :raises ValueError: if draws of a latent site are missing.
    """
    leading = next(iter(samples.values())).shape[:2]
    flat = {name: value.flatten(0, 1) for name, value in samples.items()}

    def compute(latents: dict[str, Tensor]) -> dict[str, Tensor]:
        recorder = _DeterministicRecorder(names)
        conditioned = poutine.condition(model, latents)
        with poutine.block(), pyro.validation_enabled(False), recorder:
            conditioned(*args, **kwargs)
        return recorder.values

    with torch.no_grad():
        names = _deterministic_names(model, {k: v[0] for k, v in flat.items()}, args, kwargs)
        if not names:
            return {}
        chunks = _map_draws(compute, flat)
    values = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return {name: value.unflatten(0, leading) for name, value in values.items()}


class _DeterministicRecorder(Messenger):
    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self._names = names
        self.values: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._names:
            self.values[msg["name"]] = msg["value"]


def _deterministic_names(
    model: Callable[..., Any], latents: Mapping[str, Tensor], args: Any, kwargs: Any
) -> frozenset[str]:
    with poutine.block(), pyro.validation_enabled(False):
        trace = poutine.trace(poutine.condition(model, dict(latents))).get_trace(*args, **kwargs)
    sites = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
    names = frozenset(name for name, node in sites.items() if is_computed(node))
    drawn = [n for n, s in sites.items() if not (s["is_observed"] or is_subsample(s))]
    missing = sorted(set(drawn) - names)
    if names and missing:
        raise ValueError(
            f"The deterministic sites {sorted(names)} cannot be computed: there are no draws of "
            f"{missing}, which were not saved or are discrete and summed out. Save all latent "
            "sites, or leave deterministic sites out: to_arviz(mcmc, deterministics=False)."
        )
    return names


def _map_draws(
    compute: Callable[[dict[str, Tensor]], dict[str, Tensor]], flat: dict[str, Tensor]
) -> list[dict[str, Tensor]]:
    """Apply a function to every draw, vectorised in chunks where the model allows it."""
    number = len(next(iter(flat.values())))
    starts = range(0, number, _CHUNK)
    try:
        return [vmap(compute)({k: v[i : i + _CHUNK] for k, v in flat.items()}) for i in starts]
    except RuntimeError:  # the model cannot run under vmap, which its kernel has warned of
        rows = [compute({k: v[i] for k, v in flat.items()}) for i in range(number)]
        return [{name: torch.stack([row[name] for row in rows]) for name in rows[0]}]


def _sample_stats(mcmc: Any, leading: torch.Size) -> dict[str, Any]:
    diagnostics = mcmc.diagnostics()
    num_chains, num_draws = leading
    stats: dict[str, Any] = {}
    for name, arviz_name in _ARVIZ_NAMES.items():
        if name in diagnostics:
            per_chain = [diagnostics[name][f"chain {i}"] for i in range(num_chains)]
            stats[arviz_name] = _numpy(torch.stack(per_chain)[:, :num_draws])
    if "divergences" in diagnostics:
        diverging = torch.zeros(leading, dtype=torch.bool)
        for i in range(num_chains):
            indices = [d for d in diagnostics["divergences"][f"chain {i}"] if d < num_draws]
            diverging[i, indices] = True
        stats["diverging"] = _numpy(diverging)
    return stats


def _observed_data(model: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    with poutine.block(), pyro.validation_enabled(False), torch.no_grad():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    return {
        name: _numpy(torch.as_tensor(node["value"]))
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and node["is_observed"]
        and not is_subsample(node)
        and not is_computed(node)
    }


def _numpy(value: Tensor) -> Any:
    return value.detach().cpu().numpy()
