"""Turn observed location-scale sites into noise inputs of a deterministic generator."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .sites import delta, is_subsample

__all__ = ["LiftObservationsMessenger", "lift_observations"]


def lift_observations(
    model: Callable[..., Any], sites: Collection[str] | None = None
) -> Callable[..., Any]:
    r"""
    Write observed location-scale sites as deterministic functions of a noise input.

    An observed site :math:`y \sim F(m(z), s(z))` of a location-scale family becomes a latent
    site ``{name}_noise`` with the family's standard distribution and a deterministic site

    .. math:: g(z, n) = m(z) + s(z) \odot n

    that is conditioned on the observation, the form that
    :class:`~pyro_ext.infer.ConstrainedHMC` works on (Graham and Storkey 2017, section 3).
    The posterior over the model's own latent sites is unchanged.

    :param model: a Pyro model with observed sites.
    :param sites: names of the observed sites to lift; all of them when ``None``.
    :returns: a model with the same arguments.
    :raises ValueError: when the model runs, if a site to lift is not of a location-scale
        family on the real line, is masked or scaled, or if a name in ``sites`` is not an
        observed site.

    Example::

        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z.exp(), 0.1), obs=x)
        >>> lifted = lift_observations(model)
        >>> trace = pyro.poutine.trace(lifted).get_trace(torch.tensor(1.0))
        >>> list(trace.stochastic_nodes)
        ['z', 'x_noise']
    """
    if isinstance(sites, str):
        raise TypeError(f"sites must be a collection of names, got the string {sites!r}.")
    return LiftObservationsMessenger(sites)(model)


class LiftObservationsMessenger(Messenger):
    """Handler behind :func:`lift_observations`."""

    def __init__(self, sites: Collection[str] | None = None) -> None:
        super().__init__()
        self.sites = None if sites is None else frozenset(sites)
        self._lifted: set[str] = set()

    def __enter__(self) -> LiftObservationsMessenger:
        self._lifted = set()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        missing = (self.sites or frozenset()) - self._lifted
        if exc_type is None and missing:
            raise ValueError(
                f"lift_observations was asked to lift {sorted(missing)}, but the model has no "
                "observed sample site of that name. Check the spelling, and that the site has "
                "an observation (obs=... or pyro.condition inside lift_observations)."
            )

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if not msg["is_observed"] or not _is_liftable(msg, self.sites):
            return
        family = _unwrap_independent(fn)
        is_masked = msg["mask"] is not None or isinstance(family, dist.MaskedDistribution)
        if is_masked or not _is_one(msg["scale"]):
            raise ValueError(
                f"Site {name!r} is masked or scaled; a fraction of an observation cannot be "
                "matched exactly. Leave the site out of lift_observations(sites=...)."
            )
        noise = pyro.sample(f"{name}_noise", _standard(family, name).to_event(fn.event_dim))
        value = family.loc + family.scale * noise
        msg["fn"] = dist.Delta(value, event_dim=fn.event_dim).mask(False)
        msg["infer"] = {**(msg["infer"] or {}), "_deterministic": True}
        self._lifted.add(name)


def _is_liftable(msg: Any, sites: frozenset[str] | None) -> bool:
    if sites is not None:
        return msg["name"] in sites
    return delta(msg["fn"]) is None and not is_subsample(msg)


def _is_one(scale: float | Tensor) -> bool:
    return bool(torch.as_tensor(scale == 1).all())


def _unwrap_independent(fn: Any) -> Any:
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    return fn


def _standard(family: Any, name: str) -> Any:
    """The member of a location-scale family with location 0 and scale 1."""
    parameters = set(family.arg_constraints)
    if (
        not {"loc", "scale"} <= parameters
        or family.support is not torch.distributions.constraints.real
    ):
        raise ValueError(
            f"Site {name!r} has distribution {type(family).__name__}, which is not a "
            "location-scale family on the real line (Normal, StudentT, Laplace, ...) and cannot "
            "be lifted to a noise input. Name the sites to lift in lift_observations(sites=...); "
            "other observed sites stay in the likelihood."
        )
    others = {key: getattr(family, key) for key in parameters - {"loc", "scale"}}
    zero = torch.zeros_like(family.loc)
    return type(family)(loc=zero, scale=torch.ones_like(zero), **others)
