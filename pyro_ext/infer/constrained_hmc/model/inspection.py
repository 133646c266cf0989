"""Read the structure of a conditioned Pyro model, and refuse what cannot be sampled exactly."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample, init_to_value
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import biject_to

from ....errors import ModelStructureError
from ....poutine.sites import delta, is_computed, is_subsample
from .enumeration import enumerate_discrete
from .standardize import Calibration, calibrate, is_continuous, is_standard_normal, pull, unmasked

__all__ = [
    "ConstraintSite",
    "LatentSite",
    "ModelStructure",
    "computed_value",
    "inspect_model",
    "is_latent",
]

_MAX_TRIES = 10


class LatentSite(NamedTuple):
    """A continuous latent site and its place in the flat input vector."""

    name: str
    start: int
    stop: int
    input_shape: torch.Size
    calibration: Calibration | None
    is_scaled: bool  # scaled or masked by a handler
    through_support: bool  # its distribution depends on an enumerated site


class ConstraintSite(NamedTuple):
    """A conditioned deterministic site and its place in the flat constraint vector."""

    name: str
    start: int
    stop: int
    observed: Tensor
    num_leading: int  # leading dimensions that plates added to the computed value


class ModelStructure(NamedTuple):
    """Everything about a model that must not change between runs."""

    latents: tuple[LatentSite, ...]
    constraints: tuple[ConstraintSite, ...]
    deterministics: frozenset[str]
    has_discrete: bool
    is_standard_normal: bool
    max_plate_nesting: int
    dtype: torch.dtype
    device: torch.device

    @property
    def dim(self) -> int:
        """Number of inputs."""
        return self.latents[-1].stop

    @property
    def num_constraints(self) -> int:
        """Number of scalar constraints."""
        return self.constraints[-1].stop

    @property
    def log_normalizer(self) -> float:
        """Log normalising constant of a standard normal over all inputs."""
        return 0.5 * self.dim * math.log(2 * math.pi)

    def constraint_name(self, index: int) -> str:
        """Name of an element of the constraint vector, ``x[3, 0]`` say."""
        site = next(site for site in self.constraints if index < site.stop)
        position = torch.unravel_index(torch.tensor(index - site.start), site.observed.shape)
        subscript = ", ".join(str(int(i)) for i in position)
        return f"{site.name}[{subscript}]" if subscript else site.name


def is_latent(msg: Mapping[str, Any]) -> bool:
    """Whether a sample message is a random choice that nothing has fixed or enumerated yet."""
    return not (msg["is_observed"] or msg["done"] or delta(msg["fn"]) is not None)


def computed_value(fn: Any, num_leading: int) -> Tensor:
    """The value a deterministic site computed, without dimensions that plates added."""
    value = delta(fn).v
    for _ in range(num_leading):
        value = value[0]
    return value


def inspect_model(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ModelStructure:
    """
    Run a model twice at prior draws and read its structure.

    :param model: a Pyro model, some of whose deterministic sites are conditioned.
    :param args: the model's positional arguments.
    :param kwargs: the model's keyword arguments.
    :raises ValueError: naming the site, what was seen, and what to do.
    :raises ~pyro_ext.errors.ModelStructureError: if the two runs have different sites.
    """
    plain, condition_keys = _prior_trace(model, args, kwargs)
    second, _ = _prior_trace(model, args, kwargs)
    _check_same_sites(plain, second)
    _check_plates(plain)
    deterministics, constrained = _split_delta_sites(plain)
    _check_condition_keys(condition_keys, plain)
    if not constrained:
        raise ValueError(_no_constraint_message(plain, deterministics))
    enumerated, nesting = _enumerated_trace(model, args, kwargs, plain)
    _check_discrete(model, args, kwargs, plain, enumerated, constrained)
    constraints = _constraint_sites(plain, constrained)
    latents = _latent_sites(plain, enumerated)
    structure = ModelStructure(
        latents=latents,
        constraints=constraints,
        deterministics=deterministics,
        has_discrete=enumerated is not plain,
        is_standard_normal=_is_standard_normal(plain, latents),
        max_plate_nesting=nesting,
        dtype=reduce(torch.promote_types, (site.observed.dtype for site in constraints)),
        device=constraints[0].observed.device,
    )
    if structure.num_constraints >= structure.dim:
        raise ValueError(
            f"{structure.num_constraints} output values are conditioned on "
            f"({_sizes(constraints)}), but the model has only {structure.dim} inputs "
            f"({_sizes(latents)}), so that at most isolated points remain. Condition on fewer "
            "outputs or on summary statistics of them, or give the generator noise inputs "
            "(pyro_ext.lift_observations does so for an observed Normal site)."
        )
    return structure


class _ConditionSpy(Messenger):
    """Collects the names in every ``pyro.condition`` that is active while a model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        for frame in _PYRO_STACK:
            if isinstance(frame, ConditionMessenger) and not isinstance(frame.data, poutine.Trace):
                self.keys.update(k for k, v in frame.data.items() if v is not None)


def _prior_trace(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[poutine.Trace, set[str]]:
    """One run with Pyro's validation on; prior draws that fail it are drawn again."""
    for _ in range(_MAX_TRIES - 1):
        try:
            return _traced(model, args, kwargs)
        except ValueError:
            continue
    return _traced(model, args, kwargs)


def _traced(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[poutine.Trace, set[str]]:
    spy = _ConditionSpy()
    with pyro.validation_enabled(True), torch.no_grad(), spy:
        trace = poutine.trace(InitMessenger(init_to_sample)(model)).get_trace(*args, **kwargs)
    return trace, spy.keys


def _sample_nodes(trace: poutine.Trace) -> dict[str, Any]:
    return {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}


def _split_delta_sites(trace: poutine.Trace) -> tuple[frozenset[str], list[str]]:
    """Names of the deterministic sites that were computed, and of those that were given."""
    computed: list[str] = []
    given: list[str] = []
    for name, node in _sample_nodes(trace).items():
        if not is_subsample(node) and delta(node["fn"]) is not None:
            (computed if is_computed(node) else given).append(name)
    return frozenset(computed), given


def _check_same_sites(first: poutine.Trace, second: poutine.Trace) -> None:
    a, b = _sample_nodes(first), _sample_nodes(second)
    for name in sorted(a.keys() ^ b.keys()):
        raise ModelStructureError(
            f"Site {name!r} occurs in one run of the model and not in another. The sites of a "
            "model must be the same in every run; replace Python branches that depend on random "
            "values by torch.where."
        )
    for name, node in a.items():
        shapes = [getattr(t[name]["value"], "shape", None) for t in (a, b)]
        if not is_subsample(node) and shapes[0] != shapes[1]:
            raise ModelStructureError(
                f"Site {name!r} had shape {_shape(shapes[0])} in one run of the model and "
                f"{_shape(shapes[1])} in another. Shapes must not depend on random values."
            )


def _check_plates(trace: poutine.Trace) -> None:
    for name, node in _sample_nodes(trace).items():
        if is_subsample(node) and node["fn"].subsample_size not in (None, node["fn"].size):
            raise ValueError(
                f"Plate {name!r} subsamples {node['fn'].subsample_size} of {node['fn'].size} "
                "elements. An exact posterior needs all of them: remove subsample_size."
            )


def _check_condition_keys(keys: set[str], trace: poutine.Trace) -> None:
    names = _sample_nodes(trace).keys()
    for key in sorted(keys - names):
        by_lower = {name.lower(): name for name in names}
        near = difflib.get_close_matches(key.lower(), by_lower, n=1)
        hint = f" Did you mean {by_lower[near[0]]!r}?" if near else ""
        raise ValueError(
            f"The model is conditioned on {key!r}, but has no site of that name.{hint} "
            f"Its sites are {sorted(names)}."
        )


def _no_constraint_message(trace: poutine.Trace, deterministics: frozenset[str]) -> str:
    nodes = _sample_nodes(trace)
    observed = sorted(n for n, v in nodes.items() if v["is_observed"] and n not in deterministics)
    message = (
        "No output of the model is conditioned on. ConstrainedHMC needs at least one "
        "deterministic site with a given value: pyro.deterministic('x', ...) in the model and "
        "pyro.condition(model, {'x': x_obs}) around it. "
    )
    if deterministics:
        message += f"The model's deterministic sites are {sorted(deterministics)}. "
    if observed:
        message += (
            f"Observed sample sites {observed} have a density: use pyro.infer.NUTS, or "
            "pyro_ext.lift_observations(model) to turn location-scale ones into outputs."
        )
    return message.strip()


def _enumerated_trace(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plain: poutine.Trace,
) -> tuple[poutine.Trace, int]:
    """A run with discrete latent sites enumerated; the plain run where there are none."""
    nodes = _sample_nodes(plain)
    dims = [f.dim for n in nodes.values() for f in n["cond_indep_stack"] if f.vectorized]
    nesting = -min(dims, default=0)
    discrete = [name for name, node in nodes.items() if _is_random(node) and not _continuous(node)]
    if not discrete:
        return plain, nesting
    for name in discrete:
        if not nodes[name]["fn"].has_enumerate_support:
            raise ValueError(
                f"Latent site {name!r} has the discrete distribution "
                f"{type(nodes[name]['fn']).__name__}, which cannot be enumerated. Replace it by "
                "a continuous approximation or by a distribution with finite support."
            )
    # continuous sites keep their values: drawn anew, they would follow the enumerated ones
    values = {n: node["value"] for n, node in nodes.items() if _is_random(node)}
    return _trace_at(values, enumerate_discrete(model, nesting), args, kwargs), nesting


def _trace_at(
    values: Mapping[str, Tensor],
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> poutine.Trace:
    with torch.no_grad():
        replayed = InitMessenger(init_to_value(values=dict(values)))(model)
        return poutine.trace(replayed).get_trace(*args, **kwargs)


def _check_discrete(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plain: poutine.Trace,
    enumerated: poutine.Trace,
    outputs: list[str],
) -> None:
    """Refuse outputs that depend on discrete sites."""
    if enumerated is plain:
        return
    random = {name: node for name, node in _sample_nodes(plain).items() if _is_random(node)}
    runs = [enumerated]
    # a sum over a plate, say, hides the dimensions that enumeration adds, but not the values
    for index in (0, -1):
        values = {
            name: node["value"]
            if _continuous(node)
            else node["fn"].enumerate_support(expand=True)[index]
            for name, node in random.items()
        }
        runs.append(_trace_at(values, model, args, kwargs))
    for name in outputs:
        expected = delta(plain.nodes[name]["fn"]).v
        for run in runs:
            computed = delta(run.nodes[name]["fn"]).v
            if computed.shape == expected.shape and _is_same(computed, expected):
                continue
            raise ValueError(
                f"Site {name!r} is conditioned on, but its value depends on a discrete latent "
                "site, and no derivative exists through a discrete choice. Condition on outputs "
                "that depend on continuous sites only; discrete sites may enter observed "
                "pyro.sample sites, where they are summed out."
            )


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two values agree but for rounding; those that are no numbers tell nothing."""
    if not a.is_floating_point():
        return bool((a == b).all())
    is_close = torch.isclose(a, b, rtol=torch.finfo(a.dtype).eps ** 0.75, atol=0.0)
    return bool((is_close | a.isnan() | b.isnan()).all())


def _is_random(node: Mapping[str, Any]) -> bool:
    return not (node["is_observed"] or is_subsample(node) or delta(node["fn"]) is not None)


def _continuous(node: Mapping[str, Any]) -> bool:
    return is_continuous(node["fn"])


def _constraint_sites(plain: poutine.Trace, names: list[str]) -> tuple[ConstraintSite, ...]:
    sites: list[ConstraintSite] = []
    start = 0
    for name in names:
        node = plain.nodes[name]
        computed = delta(node["fn"]).v
        observed, num_leading = _check_observed(name, node, computed)
        stop = start + observed.numel()
        sites.append(ConstraintSite(name, start, stop, observed, num_leading))
        start = stop
    return tuple(sites)


def _check_observed(name: str, node: Mapping[str, Any], computed: Tensor) -> tuple[Tensor, int]:
    """The observation as a tensor, and how many plate dimensions to strip from the output."""
    if not computed.is_floating_point():
        raise ValueError(
            f"Site {name!r} is conditioned on, but computes values of type {computed.dtype}, "
            "which have no derivative. Condition on a floating-point output."
        )
    given = node["value"]
    observed = given if isinstance(given, Tensor) else computed.new_tensor(given)
    if observed.dtype != computed.dtype:
        raise ValueError(
            f"Site {name!r} computes {computed.dtype} values but is conditioned on "
            f"{observed.dtype} ones. Convert the observation: {name}.to({computed.dtype})."
        )
    if observed.device != computed.device:
        raise ValueError(
            f"Site {name!r} computes values on {computed.device} but is conditioned on a tensor "
            f"on {observed.device}. Move the observation: {name}.to({str(computed.device)!r})."
        )
    num_leading = _num_leading(node["fn"], computed, observed)
    expected = computed.shape[num_leading:]
    if observed.shape != expected:
        raise ValueError(
            f"Site {name!r} computes a value of shape {_shape(expected)} but is conditioned on "
            f"one of shape {_shape(observed.shape)}. Reshape the observation."
        )
    if not observed.isfinite().all():
        count = int((~observed.isfinite()).sum())
        raise ValueError(
            f"Site {name!r} is conditioned on a value with {count} NaN or infinite elements of "
            f"{observed.numel()}. Remove them from the output that the site registers."
        )
    return observed.detach(), num_leading


def _num_leading(fn: Any, computed: Tensor, observed: Tensor) -> int:
    """
    Count leading dimensions that plates broadcast onto a computed value.

    ``pyro.deterministic`` takes the whole value as one event, so an enclosing plate repeats it;
    the repeats have stride 0 (or size 1) and are not constraints of their own.
    """
    count = 0
    while count < len(fn.batch_shape) and computed.stride(count) == 0:
        count += 1
    while (
        count < len(fn.batch_shape)
        and computed.shape[count] == 1
        and computed.dim() - count > observed.dim()
    ):
        count += 1
    return count


def _latent_sites(plain: poutine.Trace, enumerated: poutine.Trace) -> tuple[LatentSite, ...]:
    sites: list[LatentSite] = []
    start = 0
    enumerated_nodes = _sample_nodes(enumerated)
    for name, node in _sample_nodes(plain).items():
        if not _is_random(node) or not _continuous(node):
            continue
        fn = node["fn"]
        through_support = enumerated_nodes[name]["fn"].shape() != fn.shape()
        try:
            calibration = None if through_support else calibrate(fn)
            if through_support:
                shape = biject_to(fn.support).inv(node["value"]).shape
            else:
                shape = pull(fn, node["value"], calibration).shape
        except NotImplementedError as error:  # from biject_to
            raise ValueError(
                f"Latent site {name!r} has the distribution {type(unmasked(fn)).__name__}, whose "
                f"support PyTorch cannot map to unconstrained space ({error}). Write it by sites "
                "of other distributions: a mixture, for one, as a discrete site for the "
                "component, which is summed out, and a site whose parameters it chooses."
            ) from error
        stop = start + shape.numel()
        is_scaled = _is_scaled(node)
        sites.append(LatentSite(name, start, stop, shape, calibration, is_scaled, through_support))
        start = stop
    if not sites:
        raise ValueError(
            "The model has no continuous latent site, so nothing can vary to match the "
            "conditioned outputs. Every source of randomness must be a pyro.sample site."
        )
    return tuple(sites)


def _is_scaled(node: Mapping[str, Any]) -> bool:
    scale_is_one = bool(torch.as_tensor(node["scale"] == 1).all())
    is_masked = node["mask"] is not None or _has_mask(node["fn"])
    return is_masked or not scale_is_one


def _has_mask(fn: Any) -> bool:
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    return isinstance(fn, dist.MaskedDistribution)


def _is_standard_normal(trace: poutine.Trace, latents: tuple[LatentSite, ...]) -> bool:
    """Whether the inputs are standard normal and no observed site has a density."""
    nodes = _sample_nodes(trace)
    simple = {s.name for s in latents if not (s.is_scaled or s.through_support)}
    return all(
        is_subsample(node)
        or delta(node["fn"]) is not None
        or (name in simple and is_standard_normal(node["fn"]))
        for name, node in nodes.items()
    )


def _shape(shape: torch.Size | None) -> tuple[int, ...]:
    return tuple(shape or ())


def _sizes(sites: tuple[LatentSite, ...] | tuple[ConstraintSite, ...]) -> str:
    return ", ".join(f"{site.name}: {site.stop - site.start}" for site in sites)
