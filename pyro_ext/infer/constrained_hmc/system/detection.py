"""Find the structure of the Jacobian under which a step costs least."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ....ops.recording import RecordedFunction, RecordingError, record
from ..jacobian.block_structure import BlockStructure
from ..jacobian.partition import Split, find_splits
from ..jacobian.sparsity import Pattern
from ..jacobian.structure import DenseStructure, Structure, is_small, projection_error
from ..jacobian.triangle import find_triangles
from ..jacobian.triangular_jacobian import TriangularStructure
from .constrained_system import ConstrainedSystem
from .cost import Workload, estimated_cost, least_dense_cost, step_cost, workload

__all__ = [
    "Choice",
    "choose_dense",
    "choose_structure",
    "possible_modes",
    "recorded_system",
    "with_structure",
]

_CLEARLY = 2.0  # times that a structured step has to be cheaper
_BY_FAR = 4.0  # times cheaper than a bound on dense steps, which are not tried then
_MOST_SPLITS = 3
_MOST_RATED = 2  # sound structures whose cost is counted
_FEW_OPERATIONS = 100  # of a constraint: its derivatives are recorded within a moment
# Forward mode takes a product per input, reverse mode one per constraint. Beyond this many inputs
# per constraint forward mode cannot win, and trying it could exhaust memory.
_MOST_INPUTS_PER_CONSTRAINT = 4


class Choice(NamedTuple):
    """A system with a structure, what was found in a line, and the cost of a step."""

    system: ConstrainedSystem
    report: str
    cost: float
    is_certain: bool = True
    """Whether nothing cheaper was unsound at the points at which it was looked for."""


class _Rated(NamedTuple):
    """A structure that was tried, and whether projections with it keep their digits."""

    choice: Choice
    is_sound: bool


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
    is_matrix = not isinstance(system.structure, BlockStructure)
    if is_matrix and not is_small((len(constraint(example)), len(example))):
        return system  # planning what becomes of so many elements takes minutes
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

    Costs are estimated from numbers of products, and counted for the structures that seem
    cheapest; a dense Jacobian that cannot come near is not tried at all.

    :param system: a vectorised system.
    :param pattern: places of the Jacobian that may be nonzero; complete.
    :param Tensor points: inputs at which a structure must be sound, ``(points, dim)``.
    :param int num_chains: chains that a step is for.
    :param str kind: ``"auto"``, which is dense unless structure pays clearly, or
        ``"elementwise"`` or ``"autoregressive"`` for the best structure of this kind.
    :param str jacobian_mode: ``"forward"``, ``"reverse"`` or ``"auto"``.
    :returns: the choice; ``None`` if there is no sound structure of the kind that was asked for.
    """
    shape = (pattern.num_rows, pattern.num_columns)
    load = workload(system.functions[0], points[:2])
    rated: list[_Rated] = []
    if kind != "autoregressive":
        blocks = _block_structures(pattern, points, jacobian_mode, load, num_chains)
        rated += _rated_until_sound(system, blocks, points, num_chains)
    best = _cheapest_sound(rated)
    least = least_dense_cost(load, shape, num_chains)
    is_settled = best is not None and _BY_FAR * best.cost < least
    if kind == "autoregressive" or (kind == "auto" and not is_settled and is_small(shape)):
        triangles = _triangular_structures(pattern, points, jacobian_mode)
        rated += _rated_until_sound(system, triangles, points, num_chains)
        best = _cheapest_sound(rated)
    cheapest = min((each.choice.cost for each in rated), default=math.inf)
    if kind != "auto" or (best is not None and is_settled):
        return best and best._replace(is_certain=best.cost <= cheapest)
    dense = choose_dense(system, shape, points, num_chains, jacobian_mode)
    if best is None or dense.cost <= _CLEARLY * best.cost:
        return dense._replace(is_certain=dense.cost <= _CLEARLY * cheapest)
    return best._replace(is_certain=best.cost <= cheapest)


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
        if is_small(shape):
            choices.append(_rated(system, structure, report, points, num_chains))
        else:
            choices.append(Choice(with_structure(system, structure, points[0]), report, math.inf))
    best = min(choices, key=lambda choice: choice.cost)
    others = {"forward", "reverse"} - set(possible_modes(*shape, jacobian_mode))
    if best.cost == math.inf and others and is_small(shape):
        # the only mode is wrong, or has no derivative of some operation
        mode = others.pop()
        structure = DenseStructure(forward=mode == "forward")
        return _rated(system, structure, f"dense ({mode})", points, num_chains)
    return best


def _block_structures(
    pattern: Pattern, points: Tensor, jacobian_mode: str, load: Workload, num_chains: int
) -> Iterator[BlockStructure]:
    """Structures with local blocks, those first that seem cheapest."""
    modes = ("forward", "reverse", "mixed") if jacobian_mode == "auto" else (jacobian_mode,)
    shape = (pattern.num_rows, pattern.num_columns)
    # of large Jacobians even the index tensors of what is hardly better than dense are too large
    limit = math.inf if is_small(shape) else least_dense_cost(load, shape, num_chains)
    candidates = [
        (split, mode, _estimate(pattern, split, mode, load, num_chains))
        for split in find_splits(pattern)[:_MOST_SPLITS]
        if split.num_blocks > 1 or split.num_global > 0  # else it is the Jacobian as it is
        for mode in modes
    ]
    for split, mode, estimate in sorted(candidates, key=lambda candidate: candidate[2]):
        if estimate < limit:
            yield BlockStructure(pattern, split, mode, dtype=points.dtype, device=points.device)


def _estimate(pattern: Pattern, split: Split, mode: str, load: Workload, num_chains: int) -> float:
    """Cost with as few products as there can be: columns of one row take one each, and so on."""
    is_local = (split.column_blocks >= 0)[pattern.columns]
    most = {"forward": (True, False), "reverse": (False, True), "mixed": (~is_local, is_local)}
    is_forward, is_reverse = (np.broadcast_to(each, is_local.shape) for each in most[mode])
    num_forward = np.bincount(pattern.rows[is_forward], minlength=1).max()
    num_reverse = np.bincount(pattern.columns[is_reverse], minlength=1).max()
    return estimated_cost(load, int(num_forward), int(num_reverse), split.operations, num_chains)


def _triangular_structures(
    pattern: Pattern, points: Tensor, jacobian_mode: str
) -> Iterator[TriangularStructure]:
    shape = (pattern.num_rows, pattern.num_columns)
    for triangle in find_triangles(pattern):
        for mode in possible_modes(*shape, jacobian_mode):
            yield TriangularStructure(pattern, triangle, mode, device=points.device)


def _rated_until_sound(
    system: ConstrainedSystem,
    structures: Iterable[BlockStructure | TriangularStructure],
    points: Tensor,
    num_chains: int,
) -> list[_Rated]:
    """Count the costs of structures, until there are enough sound ones to choose from."""
    rated: list[_Rated] = []
    for structure in structures:
        choice = _rated(system, structure, structure.describe(), points, num_chains)
        if choice.cost < math.inf:
            rated.append(_Rated(choice, _is_sound(choice.system, points)))
        if sum(each.is_sound for each in rated) == _MOST_RATED:
            break
    return rated


def _cheapest_sound(rated: list[_Rated]) -> Choice | None:
    sound = [each.choice for each in rated if each.is_sound]
    return min(sound, key=lambda choice: choice.cost, default=None)


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
