"""Where the sites of a simulator stand in the vectors that networks see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    IndependentTransform,
    Transform,
    biject_to,
    constraints,
)
from torch.distributions.transforms import identity_transform

__all__ = [
    "LatentSite",
    "ObservedSite",
    "Structure",
    "check_latents",
    "constrain",
    "is_inside",
    "log_abs_det",
    "to_support",
    "unconstrain",
    "without_transforms",
]


class LatentSite(NamedTuple):
    """A latent site to infer, and its place in the vector of unconstrained latents."""

    name: str
    shape: torch.Size
    """Shape of its value in one run of the model."""
    batch_dim: int
    """How many dimensions of it are in plates or independent."""
    unconstrained_shape: torch.Size
    start: int
    stop: int
    transform: Transform
    """From real numbers to the support."""
    support: constraints.Constraint
    frames: tuple[Any, ...]
    """The plates it is in."""


class ObservedSite(NamedTuple):
    """An observed site."""

    name: str
    shape: torch.Size
    """Shape of its value in one run of the model."""
    has_density: bool
    """Whether it is drawn from a distribution, not computed."""


class Structure(NamedTuple):
    """What an estimator knows of its model."""

    latents: tuple[LatentSite, ...]
    observed: tuple[ObservedSite, ...]
    last_latent: str
    """The latent site that is sampled last: what comes after it is the simulator alone."""
    max_plate_nesting: int
    nuisance: tuple[str, ...]
    """Latent sites that are drawn and averaged over."""
    dtype: torch.dtype
    device: torch.device
    may_leak: bool = False
    """Whether vectors are the latents as they are, which may be outside the support."""

    @property
    def features(self) -> int:
        """Number of unconstrained latents."""
        return self.latents[-1].stop

    @property
    def latent_names(self) -> tuple[str, ...]:
        """Names of the latent sites, in the order of the model."""
        return tuple(site.name for site in self.latents)

    @property
    def observed_names(self) -> tuple[str, ...]:
        """Names of the observed sites, in the order they were asked for."""
        return tuple(site.name for site in self.observed)


def to_support(support: constraints.Constraint) -> Transform:
    """
    A map from real numbers to a support.

    For an interval the normal distribution function takes the place of the logistic one of
    ``biject_to``: a uniform prior is then a standard normal, as is the noise of a flow.
    """
    base, event_dim = support, 0
    while isinstance(base, constraints.independent):
        event_dim += base.reinterpreted_batch_ndims
        base = base.base_constraint
    if not isinstance(base, constraints.interval | constraints.half_open_interval):
        return biject_to(support)
    low, high = base.lower_bound, base.upper_bound
    interval = ComposeTransform([_NormalCDF(), AffineTransform(low, high - low)])
    return IndependentTransform(interval, event_dim) if event_dim else interval


class _NormalCDF(Transform):
    """The standard normal distribution function, whose inverse is finite at both ends."""

    domain = constraints.real
    codomain = constraints.unit_interval
    bijective = True
    sign = +1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NormalCDF)

    def _call(self, x: Tensor) -> Tensor:
        return torch.special.ndtr(x)

    def _inverse(self, y: Tensor) -> Tensor:
        eps = torch.finfo(y.dtype).eps
        return torch.special.ndtri(y.clamp(min=eps, max=1.0 - eps))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -0.5 * x.square() - 0.5 * math.log(2 * math.pi)


def without_transforms(structure: Structure) -> Structure:
    """
    The same sites, in vectors of the latents as they are.

    :raises ValueError: if a site has fewer degrees of freedom than elements.
    """
    sites: list[LatentSite] = []
    for site in structure.latents:
        if site.unconstrained_shape != site.shape:
            raise ValueError(
                f"The values of latent site {site.name!r} have {site.shape.numel()} elements with "
                f"{site.unconstrained_shape.numel()} degrees of freedom, and no density over "
                "them. Use support='transform'."
            )
        sites.append(site._replace(transform=identity_transform))
    return structure._replace(latents=tuple(sites), may_leak=True)


def constrain(unconstrained: Tensor, structure: Structure) -> dict[str, Tensor]:
    """
    Map vectors to values of the latent sites, inside their supports by construction.

    :param Tensor unconstrained: shape ``leading + (features,)``.
    :returns: values by name, of shape ``leading + shape`` each.
    """
    leading = unconstrained.shape[:-1]
    values: dict[str, Tensor] = {}
    for site in structure.latents:
        part = unconstrained[..., site.start : site.stop]
        values[site.name] = site.transform(part.reshape(leading + site.unconstrained_shape))
    return values


def unconstrain(values: Mapping[str, Tensor], structure: Structure) -> Tensor:
    """
    Join values of the latent sites to vectors, the inverse of :func:`constrain`.

    :param values: by name, of shape ``leading + shape`` each.
    :returns: shape ``leading + (features,)``.
    """
    parts: list[Tensor] = []
    for site in structure.latents:
        value = values[site.name]
        leading = value.shape[: value.dim() - len(site.shape)]
        parts.append(site.transform.inv(value).reshape((*leading, -1)))
    return torch.cat(parts, -1)


def check_latents(values: Mapping[str, Tensor], structure: Structure) -> dict[str, Tensor]:
    """
    Values of the latent sites alone, as the networks need them.

    :param values: by name, of shape ``leading + shape`` each, where leading dimensions broadcast.
    :returns: the same, with equal leading dimensions, dtype and device.
    :raises ValueError: if a site is missing or has a wrong shape.
    """
    if missing := sorted(set(structure.latent_names) - set(values)):
        raise ValueError(f"Values of the latent sites {missing} are missing.")
    result: dict[str, Tensor] = {}
    leading: dict[str, torch.Size] = {}
    for site in structure.latents:
        value = torch.as_tensor(values[site.name]).to(structure.device, structure.dtype)
        before = value.dim() - len(site.shape)
        if before < 0 or value.shape[before:] != site.shape:
            raise ValueError(
                f"Values of latent site {site.name!r} have shape {tuple(value.shape)}; expected "
                f"was {tuple(site.shape)}, with dimensions for several values on the left."
            )
        result[site.name], leading[site.name] = value, value.shape[:before]
    try:
        common = torch.broadcast_shapes(*leading.values())
    except RuntimeError:
        shapes = {name: tuple(shape) for name, shape in leading.items()}
        raise ValueError(f"The sites have different numbers of values: {shapes}.") from None
    return {s.name: result[s.name].expand(common + s.shape) for s in structure.latents}


def is_inside(values: Mapping[str, Tensor], structure: Structure) -> Tensor:
    """
    Which values are in the support of the prior.

    :param values: by name, of shape ``leading + shape`` each.
    :returns: shape ``leading``.
    """
    inside = torch.ones((), dtype=torch.bool, device=structure.device)
    for site in structure.latents:
        value = values[site.name]
        leading = value.shape[: value.dim() - len(site.shape)]
        inside = inside & site.support.check(value).reshape(*leading, -1).all(-1)
    return inside


def log_abs_det(unconstrained: Tensor, structure: Structure) -> Tensor:
    r"""
    :math:`\log |\det \partial \theta / \partial u|` of :func:`constrain`.

    :param Tensor unconstrained: shape ``leading + (features,)``.
    :returns: shape ``leading``.
    """
    leading = unconstrained.shape[:-1]
    total = unconstrained.new_zeros(leading)
    for site in structure.latents:
        part = unconstrained[..., site.start : site.stop]
        part = part.reshape(leading + site.unconstrained_shape)
        log_det = site.transform.log_abs_det_jacobian(part, site.transform(part))
        extra = range(len(leading), log_det.dim())
        total = total + (log_det.sum(tuple(extra)) if extra else log_det)
    return total
