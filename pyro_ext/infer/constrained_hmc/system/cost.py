"""What an integrator step costs, by counting what it computes.

A count and not a time, so that the same seed gives the same choices and the same draws on a busy
machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..jacobian.partition import dense_operations
from .constrained_system import ConstrainedSystem

__all__ = [
    "Workload",
    "estimated_cost",
    "is_cheap_dense",
    "least_dense_cost",
    "step_cost",
    "workload",
]

_ELEMENTS_PER_CALL = 5_000  # elements computed in the time that calling an operation takes
_MULTIPLICATIONS_PER_ELEMENT = 4  # done by a matrix product in the time of one element
_CALLS_OF_STRUCTURE = 100  # that a structured Jacobian adds to a step, at least
_CALLS_OF_ALGEBRA = 500  # that factorising and solving takes in a step, about
_SOLUTIONS_PER_STEP = 10  # minimum-norm solutions: momenta, and projections there and back


def step_cost(system: ConstrainedSystem, inputs: Tensor, num_chains: int) -> float:
    """
    Cost of what a step computes for all chains, in elements.

    :param system: the system.
    :param Tensor inputs: a few inputs to count at, ``(points, dim)``.
    :param int num_chains: chains that the system is to run.
    :returns: the cost; infinite if it cannot be done, for want of a derivative say.
    """
    scale = torch.ones_like(inputs[0])
    try:
        with _Counter() as point_counter:
            jacobian = system.point(inputs, scale).jacobian
        residual = system.constraint(inputs, scale)
        with _Counter() as solution_counter:
            jacobian.minimum_norm(residual)
    except (RuntimeError, NotImplementedError):  # an operation without a forward derivative
        return math.inf
    counters = ((point_counter, 1), (solution_counter, _SOLUTIONS_PER_STEP))
    share = num_chains / len(inputs)
    return sum(
        times * (counter.calls * _ELEMENTS_PER_CALL + counter.work * share)
        for counter, times in counters
    )


class Workload(NamedTuple):
    """What one evaluation of a constraint takes."""

    calls: int
    """Tensor operations, of however many points."""

    work: float
    """Elements that they compute per point."""


def workload(constraint: Callable[[Tensor], Tensor], inputs: Tensor) -> Workload:
    """
    Count what a constraint computes.

    :param constraint: maps one input to the residuals.
    :param Tensor inputs: a few inputs, ``(points, dim)``.
    """
    with _Counter() as counter:
        vmap(constraint)(inputs)
    return Workload(counter.calls, counter.work / len(inputs))


def estimated_cost(
    load: Workload, num_forward: int, num_reverse: int, multiplications: float, num_chains: int
) -> float:
    """
    What :func:`step_cost` might say, without running anything.

    :param load: of the constraint.
    :param int num_forward: products per Jacobian in forward mode.
    :param int num_reverse: products in reverse mode.
    :param float multiplications: to factorise a Jacobian.
    :param int num_chains: chains that a step is for.
    """
    # a product takes two to three evaluations, the gradient of the determinant as much twice more
    calls = _CALLS_OF_ALGEBRA + 6 * load.calls * ((num_forward > 0) + (num_reverse > 0))
    work = 6 * (num_forward + num_reverse) * load.work
    work += multiplications / _MULTIPLICATIONS_PER_ELEMENT
    return calls * _ELEMENTS_PER_CALL + work * num_chains


def least_dense_cost(load: Workload, shape: tuple[int, int], num_chains: int) -> float:
    """
    Bound below the cost of a step with dense Jacobians.

    :param load: of the constraint.
    :param shape: numbers of constraints and of inputs.
    :param int num_chains: chains that a step is for.
    """
    products = 3 * min(shape) * load.work
    return num_chains * (products + dense_operations(*shape) / _MULTIPLICATIONS_PER_ELEMENT)


def is_cheap_dense(load: Workload, shape: tuple[int, int], num_chains: int) -> bool:
    """
    Whether a dense Jacobian is so cheap that the calls of a structured one alone cost more.

    Arguments as for :func:`least_dense_cost`.
    """
    return least_dense_cost(load, shape, num_chains) < _CALLS_OF_STRUCTURE * _ELEMENTS_PER_CALL


class _Counter(TorchDispatchMode):
    """Counts tensor operations and their work, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.work = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        if not func.is_view:
            leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            elements = sum(leaf.numel() for leaf in leaves)
            self.work += elements + _multiplications(func, args) / _MULTIPLICATIONS_PER_ELEMENT
        return result


def _multiplications(func: Any, args: Any) -> float:
    """Of operations that do more than a few per element, to leading order."""
    name = func.overloadpacket.__name__
    if name in ("mm", "bmm"):
        return float(args[0].numel() * args[1].shape[-1])
    if name in ("linalg_cholesky_ex", "linalg_qr", "cholesky_inverse"):
        return float(args[0].numel() * args[0].shape[-1])
    if name in ("cholesky_solve", "linalg_solve_triangular"):
        sides = {"cholesky_solve": (0, 1), "linalg_solve_triangular": (1, 0)}[name]
        unknowns, matrix = args[sides[0]], args[sides[1]]
        return float(unknowns.numel() * matrix.shape[-1])
    return 0.0
