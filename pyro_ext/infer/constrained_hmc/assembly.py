"""Turn a model into a constrained system, vectorised over chains where that is possible."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...errors import VectorizationWarning
from .model import ConstrainedModel
from .projection import Tolerances
from .system import ConstrainedSystem

__all__ = ["build_system", "can_try_forward", "default_tolerances"]

# Forward mode takes a product per input, reverse mode one per constraint. Beyond this many inputs
# per constraint forward mode cannot win, and trying it could exhaust memory.
_MOST_INPUTS_PER_CONSTRAINT = 4
_ELEMENTS_PER_CALL = 10_000  # elements computed in the time that calling an operation takes


def build_system(
    model: ConstrainedModel, num_chains: int, jacobian_mode: str = "auto"
) -> ConstrainedSystem:
    """
    Batch a model's functions over chains.

    :param model: the conditioned model.
    :param int num_chains: chains that the system will run.
    :param str jacobian_mode: ``"forward"``, ``"reverse"``, or ``"auto"``: whichever computes less,
        by the operations and elements counted in one evaluation (a count and not a time, so that
        the same seed gives the same draws).
    :returns: the system. Where the model cannot run under ``vmap`` it is run once per chain, with
        a warning that says why.
    """
    # two inputs, so that batching is exercised
    inputs = torch.randn(2, model.dim, dtype=model.structure.dtype, device=model.structure.device)
    reason = _why_not_vectorized(model.constraint, inputs)
    reason = reason or _why_not_vectorized(model.potential, inputs)
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
        return looped
    reverse = ConstrainedSystem(model.constraint, model.potential, forward=False)
    if jacobian_mode == "reverse" or (
        jacobian_mode == "auto" and model.dim > _MOST_INPUTS_PER_CONSTRAINT * model.num_constraints
    ):
        return reverse
    forward = ConstrainedSystem(model.constraint, model.potential, forward=True)
    if jacobian_mode == "forward":
        return forward
    costs = [_cost(system, inputs, num_chains) for system in (forward, reverse)]
    return forward if costs[0] < costs[1] else reverse


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


def can_try_forward(model: ConstrainedModel) -> bool:
    """Whether there are few enough inputs per constraint for forward-mode differentiation."""
    return model.dim <= _MOST_INPUTS_PER_CONSTRAINT * model.num_constraints


class _OperationCounter(TorchDispatchMode):
    """Counts tensor operations and the elements they compute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        if not func.is_view:
            leaves = tree_leaves(result)
            self.elements += sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))
        return result


def _cost(system: ConstrainedSystem, inputs: Tensor, num_chains: int) -> float:
    """Cost of one evaluation for all chains, in elements; infinite if it cannot be done."""
    try:
        with _OperationCounter() as counter:
            system.point(inputs, torch.ones_like(inputs[0]))
    except (RuntimeError, NotImplementedError):  # an operation without a forward derivative
        return math.inf
    return counter.calls * _ELEMENTS_PER_CALL + counter.elements * num_chains / len(inputs)


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
