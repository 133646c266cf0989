"""Where the sites of a simulator stand in the vectors that networks see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.transforms import identity_transform

__all__ = [
    "LatentSite",
    "ObservedSite",
    "Structure",
    "constrain",
    "log_abs_det",
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
