"""Where the prior of a model lies, so that a guide starts from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import ComposeTransform, IndependentTransform, Transform

from .inspection import run_model, sample_nodes
from .sites import Structure, pack

__all__ = ["prior_loc_scale"]

_RUNS = 30
_DRAWS = 200
_MIN_SCALE = 1e-6


def prior_loc_scale(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    structure: Structure,
    trace: poutine.Trace,
) -> tuple[Tensor, Tensor]:
    """
    Mean and standard deviation of the unconstrained latents under the prior.

    Exact where a site on real numbers knows them and does not depend on other latents, otherwise
    from draws.

    :param model: the model.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    :param Structure structure: the sites.
    :param trace: a run at a draw from the prior.
    :returns: two tensors of shape ``(rows, features)``.
    """
    runs = [_moments(trace, structure), _moments(run_model(model, args, kwargs), structure)]
    if not all(torch.equal(a, b) for a, b in zip(*runs, strict=True)):
        for _ in range(_RUNS - len(runs)):
            runs.append(_moments(run_model(model, args, kwargs), structure))
    means = torch.stack([mean for mean, _ in runs])
    variances = torch.stack([variance for _, variance in runs])
    loc = means.mean(0)
    scale = (variances.mean(0) + means.var(0, unbiased=False)).sqrt()
    scale = torch.where(scale.isfinite(), scale, torch.ones_like(scale)).clamp(min=_MIN_SCALE)
    return torch.where(loc.isfinite(), loc, torch.zeros_like(loc)), scale


@torch.no_grad()
def _moments(trace: poutine.Trace, structure: Structure) -> tuple[Tensor, Tensor]:
    """Means and variances given what the sites depend on in this run."""
    means: dict[str, Tensor] = {}
    variances: dict[str, Tensor] = {}
    nodes = sample_nodes(trace)
    for site in structure.sites:
        fn = nodes[site.name]["fn"]
        moments = _exact(fn) if _is_identity(site.transform) else None
        if moments is None:
            draws = site.transform.inv(fn.sample((_DRAWS,)))
            moments = draws.mean(0), draws.var(0)
        shape = site.batch_shape + site.event_shape
        means[site.name], variances[site.name] = (m.expand(shape) for m in moments)
    mean, variance = pack(means, structure), pack(variances, structure)
    rows_and_features = (structure.num_rows, structure.features)
    return mean.reshape(rows_and_features), variance.reshape(rows_and_features)


def _exact(fn: Any) -> tuple[Tensor, Tensor] | None:
    try:
        mean, variance = fn.mean, fn.variance
    except (NotImplementedError, AttributeError):
        return None
    is_finite = mean.isfinite().all() and variance.isfinite().all()
    return (mean, variance) if is_finite else None


def _is_identity(transform: Transform) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return isinstance(transform, ComposeTransform) and not transform.parts
