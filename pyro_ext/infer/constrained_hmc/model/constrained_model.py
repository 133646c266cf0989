"""A conditioned Pyro model as pure functions of a flat vector of standardised inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from ....errors import ModelStructureError
from ....poutine.sites import is_subsample
from .enumeration import EnumeratedDensity, enumerate_discrete
from .inspection import (
    LatentSite,
    ModelStructure,
    computed_value,
    inspect_model,
    is_latent,
)
from .standardize import is_continuous, pull, push, unmasked

__all__ = ["ConstrainedModel"]


class ModelRun(NamedTuple):
    """What one run of the model at one input gives."""

    constraint: Tensor  # (num_constraints,) computed minus observed outputs
    log_density: Tensor  # () log density of the inputs and of the observed sample sites
    values: dict[str, Tensor]  # latent sites in the model's own coordinates
    deterministics: dict[str, Tensor]  # deterministic sites that are not conditioned


class ConstrainedModel:
    r"""
    A Pyro model seen as a generator with a constraint :math:`c(u)` and a density :math:`p(u)`.

    The flat vector ``u`` holds every latent site in standardised coordinates; the constraint
    :math:`c(u) = g(u) - y` collects the conditioned deterministic sites, in the order in which
    the model runs them. All methods take one input without a chain axis and are safe under
    :func:`torch.func.vmap` whenever the model is.

    :param model: a Pyro model, some of whose deterministic sites are conditioned.
    :param args: the model's positional arguments.
    :param kwargs: the model's keyword arguments.
    :raises ValueError: if the model is not a differentiable generator conditioned on outputs;
        the message names the site and the cure.
    """

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._model = model
        self._args, self._kwargs = args, dict(kwargs)
        with _quiet():
            self.structure: ModelStructure = inspect_model(model, args, self._kwargs)
        self._latents = {site.name: site for site in self.structure.latents}
        self._constraints = {site.name: site for site in self.structure.constraints}
        self._enumerated_density = (
            self._read_enumeration() if self.structure.has_discrete else None
        )

    @property
    def dim(self) -> int:
        """Number of inputs."""
        return self.structure.dim

    @property
    def num_constraints(self) -> int:
        """Number of scalar outputs that are conditioned on."""
        return self.structure.num_constraints

    def constraint(self, u: Tensor) -> Tensor:
        """
        Computed minus observed outputs.

        :param Tensor u: inputs, shape ``(dim,)``.
        :returns: shape ``(num_constraints,)``.
        """
        return self._run(u, density=False).constraint

    def potential(self, u: Tensor) -> Tensor:
        r"""
        Negative log density :math:`-\log p(u)` of the inputs, with the observed sample sites.

        :param Tensor u: inputs, shape ``(dim,)``.
        :returns: a scalar.
        """
        if self.structure.is_standard_normal:
            # nothing but standard normal inputs: no need to run the simulator
            return 0.5 * u.square().sum() + self.structure.log_normalizer
        return -self._run(u, density=True).log_density

    def values(self, u: Tensor) -> dict[str, Tensor]:
        """Values of the latent sites, in the model's own coordinates, at one input."""
        return self._run(u, density=False).values

    def deterministics(self, u: Tensor) -> dict[str, Tensor]:
        """Values of the deterministic sites that are not conditioned on, at one input."""
        return self._run(u, density=False).deterministics

    def inputs(self, values: Mapping[str, Tensor], init_strategy: Callable[..., Any]) -> Tensor:
        """
        Inputs that give the latent sites some values.

        :param values: values of latent sites, in the model's own coordinates.
        :param init_strategy: a per-site initialisation function of Pyro, used for the latent
            sites that ``values`` leaves out.
        :returns: shape ``(dim,)``.
        """
        unknown = sorted(values.keys() - self._latents.keys())
        if unknown:
            raise ValueError(
                f"Initial values are given for {unknown}, which are not latent sites of the "
                f"model. Its latent sites are {sorted(self._latents)}."
            )
        puller = _PullMessenger(self._latents, values)
        # discrete sites are drawn: enumerated ones would add dimensions to what follows them
        with _quiet(), torch.no_grad(), puller, InitMessenger(init_strategy), _DiscreteDraws():
            self._model(*self._args, **self._kwargs)
        return torch.cat([puller.inputs[site.name].reshape(-1) for site in self.structure.latents])

    def prior_draws(self, number: int) -> Tensor:
        """Inputs of draws from the prior, ``(number, dim)``."""
        structure = self.structure
        if structure.is_standard_normal:  # without running the model
            shape = (number, structure.dim)
            return torch.randn(shape, dtype=structure.dtype, device=structure.device)
        return torch.stack([self.inputs({}, init_to_sample) for _ in range(number)])

    def _run(self, u: Tensor, *, density: bool) -> ModelRun:
        recorder = _PushMessenger(self, u, density=density)
        with _quiet(), recorder:
            if self._enumerated_density is None:
                self._model(*self._args, **self._kwargs)
                log_density = recorder.log_density
            else:
                enumerated = poutine.trace(self._enumerated(self._model))
                trace = enumerated.get_trace(*self._args, **self._kwargs)
                log_density = recorder.log_density
                if density:
                    log_density = log_density + self._enumerated_density.log_prob(trace)
        recorder.check_complete()
        constraint = torch.cat(
            [
                (recorder.computed[site.name] - site.observed).reshape(-1)
                for site in self.structure.constraints
            ]
        )
        return ModelRun(constraint, log_density, recorder.values, recorder.deterministics)

    def _enumerated(self, model: Callable[..., Any]) -> Callable[..., Any]:
        if not self.structure.has_discrete:
            return model
        return enumerate_discrete(model, self.structure.max_plate_nesting)

    def _read_enumeration(self) -> EnumeratedDensity:
        with _quiet(), torch.no_grad():
            trace = poutine.trace(self._enumerated(self._model)).get_trace(
                *self._args, **self._kwargs
            )
        return EnumeratedDensity(trace, self.structure.max_plate_nesting)


class _PushMessenger(Messenger):
    """Outermost handler: feeds slices of the input to the latent sites and records outputs."""

    def __init__(self, model: ConstrainedModel, u: Tensor, *, density: bool) -> None:
        super().__init__()
        self._latents, self._constraints = model._latents, model._constraints
        self._structure = model.structure
        self._u = u
        self._density = density
        self.computed: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.deterministics: dict[str, Tensor] = {}
        self.log_density = u.new_zeros(())

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            return
        site = self._latents.get(msg["name"])
        if site is not None:
            u = self._u[site.start : site.stop].reshape(site.input_shape)
            value, log_density = _push_site(site, msg, u, self._structure.has_discrete)
            msg["value"], msg["done"] = value, True
            self.values[site.name] = value
            if self._density:
                self.log_density = self.log_density + log_density
        elif msg["name"] in self._constraints:
            msg["mask"] = False  # a constraint and not a factor of the enumerated density
        elif is_latent(msg):
            raise ModelStructureError(
                f"Latent site {msg['name']!r} did not exist when the model was first run. "
                "The sites of a model must be the same in every run; replace Python branches "
                "that depend on random values by torch.where."
            )

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        constraint = self._constraints.get(name)
        if constraint is not None:
            self.computed[name] = computed_value(msg["fn"], constraint.num_leading)
        elif name in self._structure.deterministics:
            self.deterministics[name] = msg["value"]
        elif self._density and msg["is_observed"] and not self._structure.has_discrete:
            self.log_density = self.log_density + _score(msg, msg["value"])

    def check_complete(self) -> None:
        """Raise if a site of the first run did not occur in this one."""
        seen = self.values.keys() | self.computed.keys()
        for name in (*self._latents, *self._constraints):
            if name not in seen:
                raise ModelStructureError(
                    f"Site {name!r} was there when the model was first run and is missing "
                    "now. The sites of a model must be the same in every run; replace Python "
                    "branches that depend on random values by torch.where."
                )


class _PullMessenger(Messenger):
    """Outermost handler: sets latent sites to given values and records their inputs."""

    def __init__(self, latents: dict[str, LatentSite], values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._latents = latents
        self._values = values
        self.inputs: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        site = self._latents.get(msg["name"])
        if site is None:
            return
        fn = msg["fn"]
        if site.name in self._values:
            msg["value"] = _given_value(site, fn, self._values[site.name])
        msg["done"] = True
        if site.through_support:
            self.inputs[site.name] = biject_to(fn.support).inv(msg["value"])
        else:
            self.inputs[site.name] = pull(fn, msg["value"], site.calibration)


class _DiscreteDraws(Messenger):
    """Innermost handler: draws discrete sites, which initialisation strategies may not know."""

    def _pyro_sample(self, msg: Any) -> None:
        if not is_subsample(msg) and is_latent(msg) and not is_continuous(msg["fn"]):
            msg["value"], msg["done"] = msg["fn"].sample(), True


def _given_value(site: LatentSite, fn: Any, value: Tensor) -> Tensor:
    """An initial value that the site can take; whole numbers stand for real ones."""
    if not value.is_floating_point():
        value = value.to(torch.get_default_dtype())
    if value.shape != fn.shape():
        raise ValueError(
            f"The initial value of site {site.name!r} has shape {tuple(value.shape)}; the site "
            f"has shape {tuple(fn.shape())}."
        )
    if not fn.support.check(value).all():
        raise ValueError(
            f"The initial value of site {site.name!r} lies outside the support "
            f"({fn.support}) of its distribution {type(unmasked(fn)).__name__}."
        )
    return value


def _push_site(site: LatentSite, msg: Any, u: Tensor, enumerated: bool) -> tuple[Tensor, Tensor]:
    """
    Value of a latent site and the term it adds to the log density.

    A site under a scale or a mask has the density ``p(value)^scale``, so that the input's
    density is corrected by the difference. With enumerated discrete sites the trace evaluator
    adds the site's ``log_prob`` itself, and the term is the log-Jacobian alone.
    """
    fn = msg["fn"]
    if site.through_support:
        transform = biject_to(fn.support)
        value = transform(u)
        return value, transform.log_abs_det_jacobian(u, value).sum()
    value, log_density = push(fn, u, site.calibration)
    if not (enumerated or site.is_scaled):
        return value, log_density
    log_jacobian = log_density - unmasked(fn).log_prob(value).sum()
    if enumerated:
        return value, log_jacobian
    return value, log_jacobian + _score(msg, value)


def _score(msg: Any, value: Tensor) -> Tensor:
    """Log probability of a site's value, under its scale and mask, summed."""
    log_prob = msg["fn"].log_prob(value, *msg["args"], **msg["kwargs"])
    total: Tensor = scale_and_mask(log_prob, msg["scale"], msg["mask"]).sum()
    return total


@contextmanager
def _quiet() -> Iterator[None]:
    with poutine.block(), pyro.validation_enabled(False):
        yield
