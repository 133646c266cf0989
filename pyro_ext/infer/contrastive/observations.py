"""From values of the observed sites to the features that networks depend on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import SamplingWarning
from .sites import ObservedSite, Structure

__all__ = ["ObservationEncoder", "flatten", "flatten_one"]

_FAR = 0.1  # of the simulated range
_LIMIT = 5.0  # standard deviations, up to which features are linear
_TRIMMED = 0.005  # of the simulations, on either side


class ObservationEncoder(nn.Module):
    r"""
    Standardise observations, and embed those sites that have a network for it.

    Simulators have outliers. They would decide what the unit is, so that mean and standard
    deviation :math:`\mu, \sigma` are those of the simulations with the outermost half per cent on
    either side moved in; and networks, which extrapolate linearly, would put the posteriors of
    outliers far outside of the prior, so that features grow logarithmically beyond
    :math:`L = 5`: with :math:`z = (x - \mu) / \sigma`,

    .. math:: z \text{ for } |z| \le L, \qquad
        \operatorname{sign}(z) (L + \log(1 + |z| - L)) \text{ otherwise.}

    Networks of the user's own get :math:`z`.

    :param Structure structure: the sites.
    :param embedding: networks by site, or that of the only site. A network gets values of shape
        ``(n, *shape)`` and returns ``(n, features)``.
    :raises ValueError: if there is no site for a network, or it returns another shape.
    """

    loc: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self, structure: Structure, embedding: nn.Module | Mapping[str, nn.Module] | None
    ) -> None:
        super().__init__()
        self.sites = structure.observed
        networks = _by_site(structure, embedding)
        # names of sites may have dots, which those of modules must not
        self.networks = nn.ModuleDict(
            {str(i): networks[s.name] for i, s in enumerate(self.sites) if s.name in networks}
        )
        self.in_features = sum(site.shape.numel() for site in self.sites)
        for name, value in (("loc", 0.0), ("scale", 1.0), ("low", 0.0), ("high", 0.0)):
            self.register_buffer(name, torch.full((self.in_features,), value))
        self.to(structure.device, structure.dtype)
        self.out_features = self._count_features()

    def standardize(self, flat: Tensor) -> None:
        """
        Take location, scale and range from observations.

        :param Tensor flat: shape ``(n, in_features)``.
        """
        loc, scale = _trimmed_moments(flat)
        self.loc.copy_(loc)
        self.scale.copy_(scale)
        self.low.copy_(flat.amin(0))
        self.high.copy_(flat.amax(0))

    def forward(self, flat: Tensor) -> Tensor:
        """
        Features of observations.

        :param Tensor flat: shape ``(n, in_features)``.
        :returns: shape ``(n, out_features)``.
        """
        z = self.standardized(flat)
        if not self.networks:
            return _limited(z)
        parts: list[Tensor] = []
        start = 0
        for i, site in enumerate(self.sites):
            stop = start + site.shape.numel()
            part = z[:, start:stop]
            if str(i) in self.networks:
                parts.append(self.networks[str(i)](part.reshape(-1, *site.shape)))
            else:
                parts.append(_limited(part))
            start = stop
        return torch.cat(parts, -1)

    def standardized(self, flat: Tensor) -> Tensor:
        """
        Observations in units of their spread, an affine map.

        :param Tensor flat: shape ``(n, in_features)``.
        :returns: of the same shape.
        """
        return (flat - self.loc) / self.scale

    def warn_if_far(self, flat: Tensor) -> None:
        """
        Warn of an observation that no simulation comes near to.

        :param Tensor flat: shape ``(in_features,)``.
        """
        extent = torch.where(self.high > self.low, self.high - self.low, self.scale)
        outside = torch.maximum(self.low - flat, flat - self.high) / extent
        worst = int(outside.argmax())
        if float(outside[worst]) <= _FAR:
            return
        site, place = self._site_of(worst)
        warnings.warn(
            f"The observation is far outside of what was simulated: element {place} of site "
            f"{site.name!r} is {float(flat[worst]):.4g}, the simulations are between "
            f"{float(self.low[worst]):.4g} and {float(self.high[worst]):.4g}, which is "
            f"{float(outside[worst]):.2g} of their range away (and {int((outside > 0).sum())} of "
            f"{len(flat)} elements are outside). Networks extrapolate at will: check the model, "
            "or simulate more.",
            SamplingWarning,
            stacklevel=3,
        )

    def _site_of(self, index: int) -> tuple[ObservedSite, tuple[int, ...]]:
        for site in self.sites:
            if index < site.shape.numel():
                break
            index -= site.shape.numel()
        place: list[int] = []
        for size in reversed(site.shape):
            place.insert(0, index % size)
            index //= size
        return site, tuple(place)

    @torch.no_grad()
    def _count_features(self) -> int:
        total = self.in_features
        for i, site in enumerate(self.sites):
            if str(i) not in self.networks:
                continue
            network = self.networks[str(i)]
            was_training = network.training
            network.eval()
            found = network(torch.zeros(2, *site.shape).to(self.loc))
            network.train(was_training)
            if found.dim() != 2 or len(found) != 2:
                raise ValueError(
                    f"The embedding of site {site.name!r} returned shape {tuple(found.shape)} for "
                    f"2 observations of shape {tuple(site.shape)}: expected (2, features)."
                )
            total += found.shape[1] - site.shape.numel()
        return total


def flatten(values: Mapping[str, Tensor], structure: Structure) -> Tensor:
    """
    Join values of the observed sites of many runs.

    :param values: by name, shape ``(runs, *shape)``.
    :returns: shape ``(runs, in_features)``.
    """
    parts = [values[site.name] for site in structure.observed]
    return torch.cat([part.reshape(len(part), -1) for part in parts], -1)


def flatten_one(observations: Tensor | Mapping[str, Tensor], structure: Structure) -> Tensor:
    """
    Check and join the observed values of one run.

    :param observations: values by name, or the value of the only site.
    :returns: shape ``(in_features,)``.
    :raises ValueError: if a site is missing, unknown, of another shape, or not finite.
    """
    names = structure.observed_names
    if not isinstance(observations, Mapping):
        if len(names) > 1:
            raise ValueError(f"Give the values of the sites {list(names)} by name.")
        observations = {names[0]: observations}
    if set(observations) != set(names):
        raise ValueError(
            f"Observed values of {sorted(observations)} were given; needed are {sorted(names)}."
        )
    parts: list[Tensor] = []
    for site in structure.observed:
        value = torch.as_tensor(observations[site.name]).to(structure.device, structure.dtype)
        if value.shape != site.shape:
            raise ValueError(
                f"The observation of site {site.name!r} has shape {tuple(value.shape)}, but the "
                f"model's has {tuple(site.shape)}."
            )
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"The observation of site {site.name!r} has {int((~value.isfinite()).sum())} "
                "values that are not finite."
            )
        parts.append(value.reshape(-1))
    return torch.cat(parts)


def _trimmed_moments(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by column with outliers moved in; 1 for that of a constant."""
    rank = 1 + int(_TRIMMED * len(flat))
    low = flat.kthvalue(rank, 0).values
    high = flat.kthvalue(len(flat) + 1 - rank, 0).values
    trimmed = flat.clamp(low, high)
    # in single precision a constant has a spread of rounding errors
    smallest = 10 * torch.finfo(flat.dtype).eps * flat.abs().amax(0)
    # what is constant but for a few runs, as counts of rare events are, varies by these alone
    is_rare = trimmed.std(0, correction=0) <= smallest
    trimmed = torch.where(is_rare, flat, trimmed)
    scale = trimmed.std(0, correction=0)
    return trimmed.mean(0), torch.where(scale > smallest, scale, torch.ones_like(scale))


def _limited(z: Tensor) -> Tensor:
    """Grow logarithmically beyond the limit, with a continuous slope."""
    return z.clamp(-_LIMIT, _LIMIT) + z.sign() * (z.abs() - _LIMIT).relu().log1p()


def _by_site(
    structure: Structure, embedding: nn.Module | Mapping[str, nn.Module] | None
) -> dict[str, nn.Module]:
    names = structure.observed_names
    if embedding is None:
        return {}
    if isinstance(embedding, nn.Module) and not isinstance(embedding, nn.ModuleDict):
        if len(names) > 1:
            raise ValueError(
                f"There are the observed sites {list(names)}: say which one the network is for, "
                f"embedding={{{names[0]!r}: network}}."
            )
        return {names[0]: embedding}
    if not isinstance(embedding, Mapping | nn.ModuleDict):
        raise TypeError(
            f"embedding must be an nn.Module, or several by site, got {type(embedding).__name__}."
        )
    networks = dict(embedding.items())
    if unknown := sorted(set(networks) - set(names)):
        raise ValueError(f"embedding has networks for {unknown}; observed are {list(names)}.")
    return networks
