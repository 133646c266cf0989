"""Condition on any subset of the elements of a site."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from .sites import delta, is_subsample

__all__ = [
    "ConditionOnMessenger",
    "Evidence",
    "FillFreeElements",
    "condition_on",
    "evidence_of",
    "free_log_prob",
]


class Evidence(NamedTuple):
    """What :func:`condition_on` leaves at a site, as ``site["infer"]["evidence"]``."""

    units: Any
    """Distribution whose batch holds the elements, each observed or free as a whole."""
    mask: Tensor
    """Which of them are observed, a suffix of the batch shape of ``units``."""
    event_dims: int
    """How many dimensions of that batch are events at the site."""
    given: Tensor | None
    """The value that was given, with whatever it has where nothing was observed."""


def condition_on(
    model: Callable[..., Any],
    data: Mapping[str, Any] | None = None,
    mask: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    r"""
    Observe some of the elements of sites, and leave the others free.

    With :math:`t = (x, y)` the elements of a site, those with a true ``mask`` are the evidence
    :math:`x` and the others the query :math:`y`. The log-density of the site is that of the
    evidence alone,

    .. math:: \log p(x \mid z) = \sum_i m_i \log p(t_i \mid z),

    for an ``.to_event`` likelihood as well as in a plate. The value of the site is the evidence
    where there is some, and elsewhere a draw from :math:`p(y \mid z)`. So free elements add no
    latent variables: Pyro's engines see only those of the model, and ``Predictive`` returns
    completed data.

    The free elements are integrated out exactly as long as no later site depends on them, as in
    every autoencoder, whose outputs are independent given the latents. Where a later site does,
    make them latent variables of the model instead.

    :param model: a Pyro model.
    :param data: values by the names of sites. Of the elements that are not observed the value is
        ignored, and may be NaN. A site that is left out keeps its own observation.
    :param mask: boolean tensors by the names of sites, true where the element is observed: of the
        shape of the value, or without some of its first dimensions. Within one event of a
        multivariate distribution all elements must be observed or none. A site that is left out
        is observed as a whole.
    :returns: a model with the same arguments.
    :raises TypeError: if a mask is not boolean, or data or masks are not given by name.
    :raises ValueError: if observed elements are NaN or infinite; when the model runs, if a name
        is no site of the model, or a shape does not match.

    Reference: Wu, Domke and Sanner 2022, "Arbitrary Conditional Inference in Variational
    Autoencoders via Fast Prior Network Training", observation 1.

    >>> from pyro_ext.poutine import condition_on
    >>> def decoder():
    ...     z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     pyro.sample("x", dist.Normal(z, 0.1).to_event(1))
    >>> x = torch.tensor([1.0, float("nan")])
    >>> conditioned = condition_on(decoder, data={"x": x}, mask={"x": ~x.isnan()})
    >>> trace = pyro.poutine.trace(conditioned).get_trace()
    >>> list(trace.stochastic_nodes)
    ['z']
    >>> float(trace.nodes["x"]["value"][0])
    1.0
    """
    handler = ConditionOnMessenger({} if data is None else data, {} if mask is None else mask)
    return handler(model)


class ConditionOnMessenger(Messenger):
    """Handler behind :func:`condition_on`."""

    def __init__(self, data: Mapping[str, Any], mask: Mapping[str, Any]) -> None:
        super().__init__()
        for argument, value in (("data", data), ("mask", mask)):
            if not isinstance(value, Mapping):
                raise TypeError(
                    f"condition_on takes {argument} by the names of sites, as in "
                    f"{argument}={{'x': ...}}, but got a {type(value).__name__}."
                )
        self.mask = {name: _check_mask(name, value) for name, value in mask.items()}
        self.data = {name: torch.as_tensor(value) for name, value in data.items()}
        for name, tensor in self.data.items():
            _check_finite(name, tensor, self.mask.get(name))
        self._visited: set[str] = set()

    def __enter__(self) -> ConditionOnMessenger:
        self._visited = set()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is None:
            for name in sorted((self.data.keys() | self.mask.keys()) - self._visited):
                raise ValueError(_no_such_site(name, self._visited))

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if is_subsample(msg):
            return
        self._visited.add(name)
        if name not in self.data and name not in self.mask:
            return
        fn = msg["fn"]
        if delta(fn) is not None:
            raise ValueError(
                f"Site {name!r} is deterministic: it has no density to condition with. Condition "
                "on the pyro.sample site that it is computed from, or use "
                "pyro_ext.infer.ConstrainedHMC."
            )
        given = self.data.get(name, msg["value"] if msg["is_observed"] else None)
        units, event_dims = _unwrap_events(fn)
        own_shape = _own_shape(msg)
        mask = self.mask.get(name, torch.tensor(True))
        mask = _mask_of_units(name, mask, fn, units, own_shape)
        if given is None and bool(mask.any()):
            raise ValueError(
                f"Site {name!r} has observed elements in its mask, but no value. Give it one: "
                f"condition_on(model, data={{{name!r}: ...}}, ...), or obs= in the model."
            )
        if given is not None:
            _check_shape(name, given, fn.shape(), own_shape)
            if name not in self.data and is_validation_enabled():
                _check_finite(name, given, self.mask.get(name))
            mask = mask.to(given.device)
        msg["value"] = _complete(name, fn, given, mask, units.event_dim)
        mask = mask.to(msg["value"].device)
        msg["is_observed"] = True
        msg["fn"] = units.mask(mask).to_event(event_dims)
        evidence = Evidence(units, mask, event_dims, given)
        msg["infer"] = {**(msg["infer"] or {}), "evidence": evidence}


class FillFreeElements(Messenger):
    """
    Give the free elements of :func:`condition_on` values, instead of drawing them.

    It may be inside or outside of ``condition_on``.

    :param values: by name of the site, of the shape of its value. Elements that are observed
        are ignored.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values


def evidence_of(site: Mapping[str, Any]) -> Evidence | None:
    """What is known of a site of a trace that :func:`condition_on` has split, else ``None``."""
    return (site["infer"] or {}).get("evidence")


def free_log_prob(site: Mapping[str, Any]) -> Tensor:
    r"""
    The log-density :math:`\log p(y \mid z)` of the free elements of a site, at its value.

    What the model itself masks by ``poutine.mask``, such as padding, counts for nothing.

    :param site: a node of a trace of a model in :func:`condition_on`.
    :returns: one number for each element of the batch of the site.
    :raises ValueError: if the site is not one that ``condition_on`` has split.
    """
    evidence = evidence_of(site)
    if evidence is None:
        raise ValueError(
            f"Site {site['name']!r} has no free elements: it is not one of condition_on(...)."
        )
    free = evidence.units.mask(~evidence.mask).to_event(evidence.event_dims)
    return scale_and_mask(free.log_prob(site["value"]), mask=site["mask"])


def _own_shape(msg: Mapping[str, Any]) -> torch.Size:
    """
    The shape that evidence of a site must have at least.

    Dimensions to the left of it are of plates around the whole model, such as that of the
    particles of an objective, which the evidence knows nothing of.
    """
    num_own = max((-f.dim for f in msg["cond_indep_stack"] if f.vectorized), default=0)
    full = msg["fn"].shape()
    return full[len(full) - num_own - msg["fn"].event_dim :]


def _check_shape(name: str, value: Tensor, full: torch.Size, own_shape: torch.Size) -> None:
    if value.dim() < len(own_shape) or not _is_suffix(value.shape, full):
        raise ValueError(
            f"Site {name!r} has values of shape {tuple(own_shape)}, but is conditioned on one of "
            f"shape {tuple(value.shape)}."
        )


def _mask_of_units(name: str, mask: Tensor, fn: Any, units: Any, own_shape: torch.Size) -> Tensor:
    """A mask with one element for each unit of a distribution, from one for each number."""
    full = fn.shape()
    if _is_suffix(mask.shape, full):
        for _ in range(min(units.event_dim, mask.dim())):
            if not torch.equal(mask.all(-1), mask.any(-1)):
                raise ValueError(
                    f"Site {name!r} has the multivariate distribution {type(units).__name__}, of "
                    "which all elements are observed or none. Give a mask that is the same for "
                    "all elements of an event."
                )
            mask = mask.all(-1)
        return mask
    if _is_suffix(mask.shape, units.batch_shape):
        return mask
    raise ValueError(
        f"Site {name!r} has values of shape {tuple(own_shape)}, but a mask of shape "
        f"{tuple(mask.shape)}. Give it the shape of the value, or leave out some of the first "
        "dimensions to use the same mask for all of them."
    )


def _complete(name: str, fn: Any, given: Any, mask: Tensor, unit_event_dim: int) -> Tensor:
    """The evidence, with something else in the place of the elements that are free."""
    if given is not None and bool(mask.all()):
        return given
    free = next(
        (
            frame.values[name]
            for frame in reversed(_PYRO_STACK)
            if isinstance(frame, FillFreeElements) and name in frame.values
        ),
        None,
    )
    if free is None:
        with torch.no_grad():
            free = fn.sample()
    if given is None:
        return free
    return torch.where(mask.reshape(mask.shape + (1,) * unit_event_dim), given, free)


def _unwrap_events(fn: Any) -> tuple[Any, int]:
    """The distribution of the smallest independent elements, and the events taken off."""
    event_dims = 0
    while isinstance(fn, dist.Independent):
        event_dims += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    return fn, event_dims


def _is_suffix(shape: torch.Size, full: torch.Size) -> bool:
    return len(shape) <= len(full) and shape == full[len(full) - len(shape) :]


def _check_mask(name: str, mask: Any) -> Tensor:
    if isinstance(mask, bool):
        mask = torch.tensor(mask)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"The mask of site {name!r} is {kind}. Give a boolean tensor, true where the element "
            "is observed: torch.as_tensor(mask).bool()."
        )
    return mask


def _check_finite(name: str, value: Tensor, mask: Tensor | None) -> None:
    if not value.is_floating_point():
        return
    wrong = ~value.isfinite()
    if mask is not None:
        if mask.dim() > wrong.dim() or not _is_suffix(mask.shape, wrong.shape):
            return  # the shapes are checked against the site's when the model runs
        wrong = wrong & mask.to(wrong.device)
    if bool(wrong.any()):
        raise ValueError(
            f"{int(wrong.sum())} of {value.numel()} elements that are observed at site {name!r} "
            "are NaN or infinite. Set the mask to false where nothing was observed: "
            f"mask={{{name!r}: value.isfinite()}}."
        )


def _no_such_site(name: str, names: set[str]) -> str:
    by_lower = {other.lower(): other for other in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    hint = f" Did you mean {by_lower[near[0]]!r}?" if near else ""
    return (
        f"condition_on was given {name!r}, but the model has no sample site of that name.{hint} "
        f"Its sites are {sorted(names)}."
    )
