"""Draws of an autoregressive energy machine, feature by feature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...nn import ResMADE
from ...ops.quadrature import halve
from .conditionals import Conditionals
from .proposals import stratified_positions

__all__ = ["choose", "draw", "inverse_of_trapezoids", "resample"]

_ROWS_AT_ONCE = 1024
_HALVINGS = 3  # of the grid, for exact draws


@torch.no_grad()
def draw(
    network: ResMADE,
    conditionals: Callable[[Tensor], Conditionals],
    num_rows: int,
    context: Tensor | None,
    draw_one: Callable[[Conditionals, int, int], Tensor],
) -> Tensor:
    """
    Draw rows, each unit of the network computed once.

    :param ResMADE network: gives the parameters of the next conditional.
    :param conditionals: makes densities from parameters of shape ``(n, size)``.
    :param int num_rows: rows to draw.
    :param Tensor context: what they are conditioned on, shape ``(num_rows, context_features)``.
    :param draw_one: draws from the densities of a feature, whose number it gets, and how many
        draws: one of each density, or all of the only one. Its result has shape ``(draws,)``.
    :returns: shape ``(num_rows, features)``.
    """
    parts = []
    for first in range(0, num_rows, _ROWS_AT_ONCE):
        size = min(_ROWS_AT_ONCE, num_rows - first)
        state = network.start((size,), None if context is None else context[first : first + size])
        x: list[Tensor] = []
        for feature in range(network.features):
            parameters, state = network.step(state, x[-1] if x else None)
            if feature == 0 and context is None:  # all rows are drawn from the same density
                parameters = parameters[:1]
            x.append(draw_one(conditionals(parameters), feature, size))
        parts.append(torch.stack(x, -1))
    if not parts:
        return network.output.weight.new_empty((0, network.features))
    return torch.cat(parts)


def resample(conditionals: Conditionals, num_draws: int, num_proposals: int) -> Tensor:
    """
    Draw by sampling-importance-resampling (Rubin 1988; Nash and Durkan 2019, section 3.3).

    One draw of the proposal in each stratum, of which one is chosen by its weight: exact in the
    limit of many.

    :param Conditionals conditionals: a density for each draw, or one for all.
    :param int num_draws: draws.
    :param int num_proposals: draws of the proposal for each.
    :returns: shape ``(num_draws,)``.
    """
    index = torch.arange(len(conditionals), device=conditionals.context.device)
    conditionals = conditionals.select(index.expand(num_draws))
    positions = stratified_positions((num_draws, num_proposals), conditionals.context)
    nodes = conditionals.proposal.place(positions)
    weights = conditionals.log_weights(nodes).softmax(-1)
    chosen = choose(weights.cumsum(-1))
    return nodes.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


def inverse_of_trapezoids(conditionals: Conditionals, num_draws: int) -> Tensor:
    """
    Draw by inverting the distribution function of the density, linear between grid points.

    :param Conditionals conditionals: a density for each draw, or one for all.
    :param int num_draws: draws.
    :returns: shape ``(num_draws,)``.
    """
    grid = conditionals.proposal.grid()
    for _ in range(_HALVINGS):
        grid = halve(grid, 0.5 * (grid[:, 1:] + grid[:, :-1]))
    log_f = conditionals.log_unnormalized(grid)
    heights = (log_f - log_f.max(-1, keepdim=True).values).exp()
    steps = grid[:, 1:] - grid[:, :-1]
    masses = 0.5 * steps * (heights[:, 1:] + heights[:, :-1])
    grid, heights, steps, cumulative = (
        each.expand(num_draws, -1) for each in (grid, heights, steps, masses.cumsum(-1))
    )
    chosen = choose(cumulative).unsqueeze(-1)
    left, right = heights.gather(-1, chosen), heights.gather(-1, chosen + 1)
    # of the density a + (b - a) s on [0, 1], up to its integral, s has the quantile
    # v (a + b) / (a + sqrt(a^2 + v (b^2 - a^2)))
    level = torch.rand_like(left)
    root = (left.square() + level * (right.square() - left.square())).clamp_min(0.0).sqrt()
    tiny = torch.finfo(left.dtype).tiny
    fraction = (level * (left + right) / (left + root).clamp_min(tiny)).clamp(0.0, 1.0)
    return (grid.gather(-1, chosen) + fraction * steps.gather(-1, chosen)).squeeze(-1)


def choose(cumulative: Tensor) -> Tensor:
    """
    Choose an index by its mass in every row.

    :param Tensor cumulative: sums of the masses up to each index, shape ``(n, m)``.
    :returns: shape ``(n,)``; zero where there is no mass.
    """
    total = cumulative[:, -1:]
    uniform = torch.rand_like(cumulative[:, :1])
    places = (uniform * total).contiguous()
    chosen = torch.searchsorted(cumulative.contiguous(), places, right=True).squeeze(-1)
    # where rounding puts the number at the very end, the last index that has mass
    last = (cumulative < total).sum(-1)
    chosen = torch.minimum(chosen, last)
    # without any mass there is nothing to choose by
    return torch.where(((total > 0.0) & total.isfinite()).squeeze(-1), chosen, 0)
