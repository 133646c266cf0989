"""Turn a model into a constrained system, vectorised over chains where that is possible."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from ...errors import VectorizationWarning
from .model import ConstrainedModel
from .projection import Tolerances
from .system import ConstrainedSystem

__all__ = ["build_system", "default_tolerances"]

# Forward mode costs a product per input, reverse mode one per constraint. In eager PyTorch a
# reverse product is several times dearer (the backward of an indexing operation fills a whole
# tensor with zeros), so forward mode wins until there are many more inputs than constraints.
_FORWARD_RATIO = 4


def build_system(model: ConstrainedModel, jacobian_mode: str = "auto") -> ConstrainedSystem:
    """
    Batch a model's functions over chains.

    :param model: the conditioned model.
    :param str jacobian_mode: ``"forward"``, ``"reverse"``, or ``"auto"``, which takes forward mode
        unless there are more than four times as many inputs as constraints.
    :returns: the system. Where the model cannot run under ``vmap`` it is run once per chain, with
        a warning that says why.
    """
    # two starts, so that batching is exercised
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
    forward = jacobian_mode == "forward" or (
        jacobian_mode == "auto" and model.dim <= _FORWARD_RATIO * model.num_constraints
    )
    if forward and reason is None and not _differentiates_forward(model, inputs):
        forward = False
    return ConstrainedSystem(
        model.constraint, model.potential, vectorized=reason is None, forward=forward
    )


def _why_not_vectorized(function: Callable[[Tensor], Tensor], inputs: Tensor) -> str | None:
    """First line of the error that ``vmap`` gives, if a plain call gives none."""
    try:
        vmap(function)(inputs)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        function(inputs[0])  # an error of the model's own is the user's to see
        return str(error).strip().split("\n")[0].split(". ")[0] + "."
    return None


def _differentiates_forward(model: ConstrainedModel, inputs: Tensor) -> bool:
    """Whether every operation of the model has a forward derivative."""
    system = ConstrainedSystem(model.constraint, model.potential, forward=True)
    try:
        system.point(inputs, torch.ones_like(inputs[0]))
    except (RuntimeError, NotImplementedError):
        return False
    return True


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
