"""Put every chain of a model on the manifold, or say why that is impossible."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from ...errors import InitializationError, SamplingWarning
from .assembly import can_differentiate_forwards
from .dynamics.projection import BatchFunction, Tolerances
from .jacobian.block_structure import BlockStructure
from .jacobian.structure import DenseStructure, LinAlgError
from .model.constrained_model import ConstrainedModel
from .model.differentiability import check_dependence, check_rank
from .search.initialization import InitialPoints, find_initial_points
from .search.linearization import Linearize, block_linearization
from .search.local_start import solve_local_blocks
from .system.constrained_system import ConstrainedSystem
from .system.detection import with_structure

__all__ = ["initial_positions", "values_per_chain"]

_PRIOR_DRAWS = 4
_RANK_CHECKS = 4


def initial_positions(
    model: ConstrainedModel,
    system: ConstrainedSystem,
    tolerances: Tolerances,
    init_strategy: Callable[..., Any],
    values: Sequence[Mapping[str, Tensor]],
) -> Tensor:
    """
    Find inputs that reproduce the conditioned outputs, for every chain.

    :param model: the conditioned model.
    :param system: its constrained system.
    :param tolerances: when an output counts as reproduced.
    :param init_strategy: where a chain starts before it is moved onto the manifold.
    :param values: per chain, initial values of some latent sites that take its place.
    :returns: positions, ``(chains, dim)``. Chains that find none of their own start from those
        of others, with a warning.
    :raises ValueError: if outputs do not depend on the inputs, or depend on each other.
    :raises ~pyro_ext.errors.InitializationError: if no chain finds any.
    """
    structure = model.structure
    one = torch.ones(structure.dim, dtype=structure.dtype, device=structure.device)

    searcher = _searcher(system, model.prior_draws(1)[0])
    num_outputs = (structure.num_constraints,)

    def constraint(position: Tensor) -> Tensor:
        return _nan_where_raised(system.constraint, position, one, num_outputs)

    def jacobian_matrix(position: Tensor) -> Tensor:
        shape = (*num_outputs, structure.dim)
        return _nan_where_raised(searcher.jacobian_matrix, position, one, shape)

    def draw(number: int) -> Tensor:
        # given values are used in the first try; chains that they fail are drawn anew
        given = values if number == len(values) else [{}] * number
        if init_strategy is init_to_sample and not any(given):
            return model.prior_draws(number)
        return torch.stack([model.inputs(chain, init_strategy) for chain in given])

    linearize, solve_blocks = _by_blocks(searcher, constraint, one, tolerances)
    if linearize is None:  # outputs of blocks depend on inputs of their own
        prior = model.prior_draws(_PRIOR_DRAWS)
        check_dependence(structure, jacobian_matrix(prior), constraint(prior), at="prior draws")
    points = find_initial_points(
        constraint,
        jacobian_matrix,
        draw,
        len(values),
        tolerances,
        linearize=linearize,
        solve_blocks=solve_blocks,
    )
    if not points.is_found.any():
        raise InitializationError(_no_start_message(model, points))
    if linearize is None:
        found = points.position[points.is_found]
        check_rank(structure, jacobian_matrix(found[:_RANK_CHECKS]))
    return _fill_lost(points)


def _by_blocks(
    searcher: ConstrainedSystem, constraint: BatchFunction, one: Tensor, tolerances: Tolerances
) -> tuple[Linearize | None, BatchFunction | None]:
    """How to search, and to solve for local inputs, where the Jacobian has local blocks."""
    structure = searcher.structure
    if not isinstance(structure, BlockStructure):
        return None, None
    size = (len(structure.compression.product_places),)

    def derivatives(position: Tensor) -> Tensor:
        return _nan_where_raised(
            lambda position, _: searcher.derivatives(position), position, one, size
        )

    def solve_blocks(start: Tensor) -> Tensor:
        return solve_local_blocks(constraint, derivatives, structure, start, tolerances)

    return block_linearization(structure, derivatives), solve_blocks


def _nan_where_raised(
    function: Callable[[Tensor, Tensor], Tensor],
    position: Tensor,
    scale: Tensor,
    shape: tuple[int, ...],
) -> Tensor:
    """Values of a batched function; NaN for chains at which an operation of the model raises."""
    try:
        return function(position, scale)
    except LinAlgError:
        if len(position) == 1:
            return position.new_full((1, *shape), torch.nan)
    rows = [_nan_where_raised(function, row, scale, shape) for row in position.split(1)]
    return torch.cat(rows)


def _searcher(system: ConstrainedSystem, example: Tensor) -> ConstrainedSystem:
    """
    The system to search with: one that differentiates forwards, where there is one.

    Where some outputs overflow, reverse mode multiplies their infinite derivatives by zero and
    spoils the rows of all outputs; forward mode leaves the rows of finite outputs finite.
    """
    if not system.is_vectorized:
        return system
    structure = system.structure
    if structure.mode == "forward" or not can_differentiate_forwards(system.functions[0], example):
        return system
    if isinstance(structure, BlockStructure):
        return with_structure(system, structure.with_mode("forward"), example)
    return with_structure(system, DenseStructure(forward=True), example)


def values_per_chain(
    values: Mapping[str, Tensor], num_chains: int | None
) -> list[dict[str, Tensor]]:
    """
    Split initial values by chain.

    :param values: values by site, with a leading chain dimension unless ``num_chains`` is
        ``None``.
    :param num_chains: number of chains, or ``None`` for one chain without a chain dimension.
    :raises ValueError: naming the site whose first dimension is not the number of chains.
    """
    if num_chains is None:
        return [dict(values)]
    for name, value in values.items():
        if value.shape[:1] != (num_chains,):
            raise ValueError(
                f"initial_params[{name!r}] has shape {tuple(value.shape)}; with {num_chains} "
                f"chains its first dimension must be {num_chains}."
            )
    return [{name: value[i] for name, value in values.items()} for i in range(num_chains)]


def _fill_lost(points: InitialPoints) -> Tensor:
    """Start chains without a point of their own from those of other chains."""
    lost = (~points.is_found).nonzero().squeeze(-1)
    if len(lost) == 0:
        return points.position
    warnings.warn(
        f"Chains {lost.tolist()} found no inputs of their own that reproduce the conditioned "
        "outputs, and start from those of other chains.",
        SamplingWarning,
        stacklevel=2,
    )
    found = points.is_found.nonzero().squeeze(-1)
    source = found[torch.arange(len(lost), device=found.device) % len(found)]
    return points.position.index_copy(0, lost, points.position[source])


def _no_start_message(model: ConstrainedModel, points: InitialPoints) -> str:
    residual = points.residual.abs().nan_to_num(torch.inf)
    best = residual[residual.amax(-1).argmin()]
    worst = int(best.argmax())
    name = model.structure.constraint_name(worst)
    off = float(best[worst])
    what = f"{name!r} is off by {off:.3g}" if math.isfinite(off) else f"{name!r} overflows"
    return (
        "No inputs that reproduce the conditioned outputs were found from the prior draws of "
        f"{len(residual)} chain(s): at the best of them {what}. Check that the observed value can "
        "be produced by the model at all; start closer by initial_params or "
        "init_strategy=init_to_value(values={...})."
    )
