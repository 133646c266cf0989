"""Find the structure of the Jacobian under which a step costs least."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....ops.recording import RecordedFunction, RecordingError, record
from ..jacobian.block_structure import BlockStructure
from ..jacobian.partition import find_splits
from ..jacobian.sparsity import Pattern
from ..jacobian.structure import DenseStructure, Structure, projection_error
from ..jacobian.triangle import find_triangles
from ..jacobian.triangular_jacobian import TriangularStructure
from .constrained_system import ConstrainedSystem
from .cost import step_cost

__all__ = [
    "Choice",
    "choose_dense",
    "choose_structure",
    "possible_modes",
    "recorded_system",
    "with_structure",
]

_CLEARLY = 2.0  # times that a structured step has to be cheaper
_MOST_SPLITS = 3
_FEW_OPERATIONS = 100  # of a constraint: its derivatives are recorded within a moment
# Forward mode takes a product per input, reverse mode one per constraint. Beyond this many inputs
# per constraint forward mode cannot win, and trying it could exhaust memory.
_MOST_INPUTS_PER_CONSTRAINT = 4
_LARGEST_DENSE = 4 * 10**6  # entries of a Jacobian that is worth trying as a dense matrix


class Choice(NamedTuple):
    """A system with a structure, what was found in a line, and the cost of a step."""

    system: ConstrainedSystem
    report: str
    cost: float
    is_certain: bool = True
    """Whether nothing cheaper was unsound at the points at which it was looked for."""


def with_structure(
    system: ConstrainedSystem, structure: Structure[Any], example: Tensor
) -> ConstrainedSystem:
    """
    The same system with its Jacobians computed in another way.

    Where the constraint is recorded as few operations, so are its derivatives: in forward mode
    most of the time would else be spent outside of tensor operations.

    :param system: a vectorised system.
    :param structure: how to compute Jacobians.
    :param Tensor example: an input at which to record, ``(dim,)``.
    """
    constraint = system.functions[0]
    other = ConstrainedSystem(*system.functions, structure=structure)
    is_short = isinstance(constraint, RecordedFunction) and (
        constraint.num_operations <= _FEW_OPERATIONS
    )
    return recorded_system(other, example) if is_short else other


def recorded_system(system: ConstrainedSystem, example: Tensor) -> ConstrainedSystem:
    """The same system with its derivatives recorded, where its constraint is and they can be."""
    constraint, potential = system.functions
    if system.has_recorded_derivatives or not isinstance(constraint, RecordedFunction):
        return system
    try:
        derivatives = record(system.structure.derivatives(constraint), example)
    except (RecordingError, RuntimeError, NotImplementedError):
        # the last two from operations without a forward derivative, which the caller will see
        return system
    return ConstrainedSystem(
        constraint, potential, structure=system.structure, derivatives=derivatives
    )


def choose_structure(
    system: ConstrainedSystem,
    pattern: Pattern,
    points: Tensor,
    num_chains: int,
    *,
    kind: str,
    jacobian_mode: str,
) -> Choice | None:
    """
    The structure of a Jacobian under which an integrator step is cheapest.

    :param system: a vectorised system.
    :param pattern: places of the Jacobian that may be nonzero.
    :param Tensor points: inputs at which a structure must be sound, ``(points, dim)``.
    :param int num_chains: chains that a step is for.
    :param str kind: ``"auto"``, which is dense unless structure pays clearly, or
        ``"elementwise"`` or ``"autoregressive"`` for the best structure of this kind.
    :param str jacobian_mode: ``"forward"``, ``"reverse"`` or ``"auto"``.
    :returns: the choice; ``None`` if there is no sound structure of the kind that was asked for.
    """
    structures = _structures(pattern, points, kind, jacobian_mode)
    found = [_rated(system, s, s.describe(), points, num_chains) for s in structures]
    found = sorted((c for c in found if c.cost < math.inf), key=lambda choice: choice.cost)
    best = next((c for c in found if _is_sound(c.system, points)), None)
    if kind != "auto":
        return best
    shape = (pattern.num_rows, pattern.num_columns)
    dense = choose_dense(system, shape, points, num_chains, jacobian_mode)
    if best is None or dense.cost <= _CLEARLY * best.cost:
        is_beaten = bool(found) and _CLEARLY * found[0].cost < dense.cost
        return dense._replace(is_certain=not is_beaten)
    return best._replace(is_certain=best is found[0])


def choose_dense(
    system: ConstrainedSystem,
    shape: tuple[int, int],
    points: Tensor,
    num_chains: int,
    jacobian_mode: str,
) -> Choice:
    """
    The cheapest way without structure; its cost is infinite where it is too large to be counted.

    :param shape: numbers of constraints and of inputs. Other arguments as for
        :func:`choose_structure`.
    """
    choices = []
    for mode in possible_modes(*shape, jacobian_mode):
        structure, report = DenseStructure(forward=mode == "forward"), f"dense ({mode})"
        if shape[0] * shape[1] <= _LARGEST_DENSE:
            choices.append(_rated(system, structure, report, points, num_chains))
        else:
            choices.append(Choice(with_structure(system, structure, points[0]), report, math.inf))
    best = min(choices, key=lambda choice: choice.cost)
    others = {"forward", "reverse"} - set(possible_modes(*shape, jacobian_mode))
    if best.cost == math.inf and others and shape[0] * shape[1] <= _LARGEST_DENSE:
        # the only mode is wrong, or has no derivative of some operation
        mode = others.pop()
        structure = DenseStructure(forward=mode == "forward")
        return _rated(system, structure, f"dense ({mode})", points, num_chains)
    return best


def _structures(
    pattern: Pattern, points: Tensor, kind: str, jacobian_mode: str
) -> Iterator[BlockStructure | TriangularStructure]:
    shape, device = (pattern.num_rows, pattern.num_columns), points.device
    if kind in ("auto", "elementwise"):
        modes = ("forward", "reverse", "mixed") if jacobian_mode == "auto" else (jacobian_mode,)
        for split in find_splits(pattern)[:_MOST_SPLITS]:
            if split.num_blocks == 1 and split.num_global == 0:
                continue  # the Jacobian as it is
            for mode in modes:
                yield BlockStructure(pattern, split, mode, dtype=points.dtype, device=device)
    is_small = shape[0] * shape[1] <= _LARGEST_DENSE
    if kind == "autoregressive" or (kind == "auto" and is_small):
        for triangle in find_triangles(pattern):
            for mode in possible_modes(*shape, jacobian_mode):
                yield TriangularStructure(pattern, triangle, mode, device=device)


def _rated(
    system: ConstrainedSystem,
    structure: Structure[Any],
    report: str,
    points: Tensor,
    num_chains: int,
) -> Choice:
    system = with_structure(system, structure, points[0])
    cost = step_cost(system, points[:2], num_chains) if _is_right(system, points[:2]) else math.inf
    return Choice(system, report, cost)


def _is_right(system: ConstrainedSystem, points: Tensor) -> bool:
    """
    Whether Jacobians agree with single products.

    PyTorch batches the derivatives of some operations wrongly (2.13: ``linalg.solve``, ``det``
    and ``slogdet`` in forward mode), without an error.
    """
    scale = torch.ones_like(points[0])
    vector = torch.arange(1.0, 1 + len(scale)).to(points).sin().expand_as(points)
    product = system.product(points, vector, scale)
    try:
        found = system.jacobian(points, scale).apply(vector)
    except (RuntimeError, NotImplementedError):  # an operation without a derivative in this mode
        return True  # for step_cost to rate
    precision = torch.finfo(found.dtype).eps ** 0.5
    is_close = (found - product).abs() <= precision * (1 + found.abs() + product.abs())
    return bool((is_close | ~(found.isfinite() & product.isfinite())).all())


def _is_sound(system: ConstrainedSystem, points: Tensor) -> bool:
    """Whether projections keep half of the digits, at most of the points with finite entries."""
    derivatives = system.derivatives(points)
    derivatives = derivatives[derivatives.flatten(1).isfinite().all(-1)]
    jacobian = system.structure.factorize(derivatives, torch.ones_like(points[0]))
    vectors = torch.randn(len(derivatives), points.shape[-1]).to(points)
    is_accurate = projection_error(jacobian, vectors) <= torch.finfo(points.dtype).eps ** 0.5
    return len(derivatives) > 0 and 2 * int(is_accurate.sum()) > len(derivatives)


def possible_modes(num_rows: int, num_columns: int, jacobian_mode: str) -> list[str]:
    """Modes of differentiation of a dense Jacobian that are worth trying."""
    if jacobian_mode != "auto":
        return [jacobian_mode]
    is_wide = num_columns > _MOST_INPUTS_PER_CONSTRAINT * num_rows
    return ["reverse"] if is_wide else ["forward", "reverse"]
