"""Turn a model into a constrained system, vectorised over chains where that is possible."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import VectorizationWarning
from ...ops.recording import RecordedFunction, RecordingError, record
from .dynamics.projection import Tolerances
from .guard import GuardedSystem
from .jacobian.forward import forward_product
from .jacobian.sparsity import Pattern, find_pattern, merge_patterns
from .jacobian.structure import is_small
from .model.constrained_model import ConstrainedModel
from .system.constrained_system import ConstrainedSystem, ScalarFunction
from .system.cost import is_cheap_dense, workload
from .system.defects import find_misplaced, has_lost_digits
from .system.detection import (
    choose_dense,
    choose_structure,
    possible_modes,
    recorded_system,
)

__all__ = [
    "STRUCTURES",
    "Assembly",
    "Preferences",
    "assemble",
    "build_system",
    "can_differentiate_forwards",
    "default_tolerances",
    "guarded_system",
    "recorded_values",
    "settle",
]

STRUCTURES = ("auto", "dense", "elementwise", "autoregressive")
_PRIOR_DRAWS = 4
_STARTS = 2  # starting points at which a pattern is read again
_MOST_PRODUCTS = 512  # of one kind, to read the pattern of a large Jacobian
_NEARBY = 0.1  # standard deviations from a starting point


class Assembly(NamedTuple):
    """A system, and why its Jacobians are computed as they are."""

    system: ConstrainedSystem
    report: str
    pattern: Pattern | None  # of the Jacobian, where it was looked for
    is_certain: bool = True  # that other points would not lead to another choice


class Preferences(NamedTuple):
    """What the user wants to be used."""

    num_chains: int
    jacobian_mode: str = "auto"
    structure: str = "auto"


def build_system(
    model: ConstrainedModel,
    num_chains: int,
    jacobian_mode: str = "auto",
    structure: str = "auto",
) -> ConstrainedSystem:
    """The system alone; see :func:`assemble`."""
    return assemble(model, Preferences(num_chains, jacobian_mode, structure)).system


def assemble(model: ConstrainedModel, preferences: Preferences) -> Assembly:
    """
    Batch a model's functions over chains, and choose how to compute Jacobians.

    The functions are recorded, and steps of a loop that are alike run as one, wherever a model
    runs the same operations every time.

    :param model: the conditioned model.
    :param preferences: number of chains that the system will run; ``jacobian_mode``
        ``"forward"``, ``"reverse"``, or ``"auto"``, whichever computes less; ``structure`` one of
        :data:`STRUCTURES`.
    :returns: the system. Where the model cannot run under ``vmap`` it is run once per chain, with
        a warning that says why.
    :raises ValueError: if outputs are not a function of the inputs.
    """
    # two inputs, so that batching is exercised
    inputs = torch.randn(2, model.dim, dtype=model.structure.dtype, device=model.structure.device)
    reason = _why_not_vectorized(model.constraint, inputs)
    reason = reason or _why_not_vectorized(model.potential, inputs)
    _check_repeatable(model, inputs[0])
    if reason is not None:
        warnings.warn(
            f"The model cannot be vectorised over chains and is run once per chain: {reason} "
            "Usual causes: writing into a tensor in place (collect values in a list and "
            "torch.stack them), Python branches on tensor values (use torch.where), .item().",
            VectorizationWarning,
            stacklevel=4,
        )
        looped = ConstrainedSystem(
            model.constraint, model.potential, vectorized=False, forward=False
        )
        _check_differentiable(looped, inputs)
        if preferences.structure in ("elementwise", "autoregressive"):
            raise ValueError(
                f"structure={preferences.structure!r} needs a model that can be vectorised over "
                "chains; the warning above says why this one cannot."
            )
        return Assembly(looped, "dense, one chain at a time", None)
    constraint = _recorded(model.constraint, inputs[0])
    potential: ScalarFunction = model.potential
    if not model.structure.is_standard_normal:
        potential = _recorded(model.potential, inputs[0])
    system = ConstrainedSystem(constraint, potential)
    return _choose(system, None, model.prior_draws(_PRIOR_DRAWS), preferences)


def settle(assembly: Assembly, positions: Tensor, preferences: Preferences) -> Assembly:
    """
    Look for structure again at the starting points, where it was not found from the prior.

    A simulator may explode at prior draws, or be at one side of a branch at all of them.

    :param assembly: what the search for starting points has used.
    :param Tensor positions: starting points of all chains, ``(chains, dim)``.
    :param preferences: as for :func:`assemble`.
    :raises ValueError: if the structure that the user asked for is not there.
    """
    system, pattern = assembly.system, assembly.pattern
    if pattern is None:
        return assembly
    starts = positions[:_STARTS]
    if system.structure.pattern is not None:
        scale, vector = torch.ones_like(positions[0]), torch.randn_like(positions)
        point, product = system.point(positions, scale), system.product(positions, vector, scale)
        misplaced = find_misplaced(system, point, scale, vector, product)
        if misplaced is None and not has_lost_digits(point):
            return assembly
        if misplaced is not None:
            starts = torch.cat([starts, positions[misplaced.chain].unsqueeze(0)])
    elif assembly.is_certain and pattern.is_complete and preferences.structure == "auto":
        return assembly
    points = torch.cat([starts, starts + _NEARBY * torch.randn_like(starts)])
    settled = _choose(system, pattern, points, preferences)
    if preferences.structure != "auto" and settled.system.structure.pattern is None:
        raise ValueError(
            f"structure={preferences.structure!r} was asked for, but the Jacobian of the outputs "
            f"does not have it: {_describe(settled.pattern)}. Use structure='auto'."
        )
    return settled


def guarded_system(
    assembly: Assembly,
    model: ConstrainedModel,
    positions: Tensor,
    preferences: Preferences,
    *,
    check_interval: int,
    compile: bool,
) -> GuardedSystem:
    """
    The system of a run.

    :param assembly: the settled system.
    :param model: the conditioned model.
    :param Tensor positions: starting points of all chains, ``(chains, dim)``.
    :param preferences: as for :func:`assemble`.
    :param int check_interval: points per check of the structure.
    :param bool compile: whether to compile it to native code.
    """
    system, starts, pattern = assembly.system, positions[:_STARTS], assembly.pattern

    def replacement(inputs: Tensor | None) -> tuple[ConstrainedSystem, str]:
        nonlocal pattern
        if inputs is None or pattern is None or is_small((pattern.num_rows, pattern.num_columns)):
            return _without_structure(system, starts, preferences)[:2]
        nearby = inputs + _NEARBY * torch.randn_like(inputs)
        points = torch.cat([torch.stack([inputs, nearby]), starts])
        chosen = _choose(system, pattern, points, preferences)
        pattern = chosen.pattern
        return chosen.system, chosen.report

    return GuardedSystem(
        system,
        assembly.report,
        replacement,
        model.structure,
        len(positions),
        check_interval=check_interval,
        compile=compile,
    )


def _choose(
    system: ConstrainedSystem, known: Pattern | None, points: Tensor, preferences: Preferences
) -> Assembly:
    """Choose a structure by the pattern at some points and what is known from others."""
    num_chains, mode, kind = preferences
    constraint = system.functions[0]
    num_rows = vmap(constraint)(points).shape[-1]
    shape = (num_rows, points.shape[-1])
    load = workload(constraint, points[:2])
    if kind == "dense" or (kind == "auto" and is_cheap_dense(load, shape, num_chains)):
        return _without_structure(system, points, preferences)
    pattern = find_pattern(
        constraint,
        points,
        forward=can_differentiate_forwards(constraint, points[0]),
        most_products=None if is_small(shape) or kind == "autoregressive" else _MOST_PRODUCTS,
    )
    if known is not None:
        pattern = merge_patterns(known, pattern)
    choice = None
    if pattern.is_complete:
        choice = choose_structure(
            system, pattern, points, num_chains, kind=kind, jacobian_mode=mode
        )
    if choice is None:
        return _without_structure(system, points, preferences)._replace(pattern=pattern)
    chosen = recorded_system(choice.system, points[0])
    return Assembly(chosen, choice.report, pattern, choice.is_certain)


def _without_structure(
    system: ConstrainedSystem, points: Tensor, preferences: Preferences
) -> Assembly:
    num_rows = system.constraint(points, torch.ones_like(points[0])).shape[-1]
    shape, (num_chains, mode, _) = (num_rows, points.shape[-1]), preferences
    choice = choose_dense(system, shape, points, num_chains, mode)
    return Assembly(recorded_system(choice.system, points[0]), choice.report, None)


def _describe(pattern: Pattern | None) -> str:
    if pattern is None:
        return "it was not looked for"
    if not pattern.is_complete:
        return "it could not be read, because derivatives are not finite or it is large and dense"
    share = len(pattern.rows) / (pattern.num_rows * pattern.num_columns)
    return (
        f"of its {pattern.num_rows} x {pattern.num_columns} entries {share:.0%} are nonzero, and "
        "its columns do not fall into global ones and local blocks with as many inputs as outputs"
    )


def recorded_values(
    model: ConstrainedModel, system: ConstrainedSystem, example: Tensor
) -> Callable[[Tensor], Any]:
    """
    :meth:`.ConstrainedModel.values`, which every draw needs, without running the model.

    :param model: the conditioned model.
    :param system: its system; what could not be recorded there is not tried again.
    :param Tensor example: an input, ``(dim,)``.
    """
    if not isinstance(system.functions[0], RecordedFunction):
        return model.values
    try:
        return record(model.values, example, differentiable=False)
    except RecordingError:
        return model.values


def _recorded(function: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that runs what it repeats as one; the function itself if that cannot be."""
    with _CheckFinder() as finder:
        function(example)
    if finder.has_check:  # a recording would not raise
        return function
    try:
        return record(function, example)
    except RecordingError:
        return function


class _CheckFinder(TorchDispatchMode):
    """Looks for operations that only raise, as after a factorisation that may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.has_check = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.has_check |= not func._schema.returns
        return func(*args, **(kwargs or {}))


def _check_repeatable(model: ConstrainedModel, u: Tensor) -> None:
    """Refuse a model whose outputs are not a function of its inputs."""
    first, second = model.constraint(u), model.constraint(u)
    differs = (first != second) & ~(first.isnan() & second.isnan())
    if differs.any():
        name = model.structure.constraint_name(int(differs.nonzero()[0]))
        raise ValueError(
            f"Output {name!r} is conditioned on, but two runs of the model at the same inputs "
            "give different values: it depends on random numbers outside pyro.sample "
            "(torch.randn, NumPy's, dropout of a network in training mode). Draw them by "
            "pyro.sample, and put networks into evaluation mode: network.eval()."
        )


def _check_differentiable(system: ConstrainedSystem, inputs: Tensor) -> None:
    """Refuse a model that overwrites what its derivative needs."""
    try:
        system.point(inputs[:1], torch.ones_like(inputs[0]))
    except RuntimeError as error:
        if "inplace" not in str(error).replace("-", ""):
            raise
        raise ValueError(
            "The model overwrites a tensor that its derivative needs, so it cannot be "
            "differentiated. Collect the values in a Python list and torch.stack them instead of "
            "writing into a tensor in place."
        ) from error


def can_differentiate_forwards(constraint: ScalarFunction, point: Tensor) -> bool:
    """Whether forward mode has few enough products and a derivative for every operation."""
    u = point.unsqueeze(0)
    num_constraints = vmap(constraint)(u).shape[-1]
    if "forward" not in possible_modes(num_constraints, len(point), "auto"):
        return False
    try:
        vmap(partial(forward_product, constraint))(u, torch.ones_like(u))
    except (RuntimeError, NotImplementedError):  # an operation without a forward derivative
        return False
    return True


def _why_not_vectorized(function: Callable[[Tensor], Tensor], inputs: Tensor) -> str | None:
    """First line of the error that ``vmap`` gives, if a plain call gives none."""
    try:
        vmap(function)(inputs)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        function(inputs[0])  # an error of the model's own is the user's to see
        return str(error).strip().split("\n")[0].split(". ")[0] + "."
    return None


def default_tolerances(
    model: ConstrainedModel, constraint_tol: float | None, max_projection_iters: int
) -> Tolerances:
    """
    Tolerances for the model's precision.

    In float64: residuals of 1e-9 in the output's own units, updates of 1e-8 standard deviations
    of the inputs, so that outputs of any scale are matched; in float32 1e-4 and 3e-4. Rounding
    puts a floor under the residual that grows with the size of the observation.

    :param model: the conditioned model.
    :param constraint_tol: largest residual of an output, or ``None`` for the default.
    :param int max_projection_iters: most iterations of one projection.
    """
    eps = torch.finfo(model.structure.dtype).eps
    observed = torch.cat([site.observed.reshape(-1) for site in model.structure.constraints])
    tolerance = eps**0.575 if constraint_tol is None else constraint_tol
    position = eps**0.51
    return Tolerances(
        constraint=(64 * eps * observed.abs()).clamp(min=tolerance),
        position=position,
        # both projections stop within about one tolerance of their solutions
        reverse=10 * position,
        max_iters=max_projection_iters,
    )
