"""Slice sampling of many chains at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["slice_sweep"]

_MAX_STEPS_OUT = 8
_MAX_SHRINKS = 100


def slice_sweep(
    x: Tensor,
    log_density_of_x: Tensor,
    log_density: Callable[[Tensor], Tensor],
    widths: Tensor,
) -> tuple[Tensor, Tensor]:
    """
    Update every coordinate of every chain once, leaving the density invariant.

    A level under the density at the point is drawn, an interval of the given width is placed
    around it at random and widened while its ends are above the level, and points of it are
    drawn, which shrink it when they are below.

    Reference: Neal 2003, "Slice sampling", figures 3 and 5.

    :param Tensor x: shape ``(chains, features)``.
    :param Tensor log_density_of_x: shape ``(chains,)``, finite.
    :param log_density: of shape ``(n, features)`` to shape ``(n,)``, up to a constant. What is
        NaN counts as no density.
    :param Tensor widths: first width of the interval in each coordinate, shape ``(features,)``.
    :returns: new points and their log-densities.
    """
    for d in torch.randperm(x.shape[1], device=x.device).tolist():
        x, log_density_of_x = _update(x, log_density_of_x, log_density, d, widths[d])
    return x, log_density_of_x


def _update(
    x: Tensor,
    log_p: Tensor,
    log_density: Callable[[Tensor], Tensor],
    d: int,
    width: Tensor,
) -> tuple[Tensor, Tensor]:
    def at(values: Tensor, rows: Tensor) -> Tensor:
        points = x[rows].clone()
        points[:, d] = values
        return torch.nan_to_num(log_density(points), nan=-torch.inf)

    level = log_p - torch.empty_like(log_p).exponential_()
    now = x[:, d]
    low = now - width * torch.rand_like(now)
    high = low + width
    # Neal's limit on the number of steps is shared between both sides at random
    steps = torch.randint(_MAX_STEPS_OUT + 1, (len(x), 1), device=x.device)
    steps = torch.cat([steps, _MAX_STEPS_OUT - steps], 1)
    for side, (end, step) in enumerate(((low, -width), (high, width))):
        rows = (steps[:, side] > 0).nonzero().squeeze(1)
        while len(rows):
            rows = rows[at(end[rows], rows) > level[rows]]
            end[rows] += step
            steps[rows, side] -= 1
            rows = rows[steps[rows, side] > 0]
    new, log_p_new = now.clone(), log_p.clone()
    rows = torch.arange(len(x), device=x.device)
    for _ in range(_MAX_SHRINKS):
        proposal = low[rows] + (high - low)[rows] * torch.rand_like(low[rows])
        value = at(proposal, rows)
        accepted = value > level[rows]
        new[rows[accepted]], log_p_new[rows[accepted]] = proposal[accepted], value[accepted]
        rows, proposal = rows[~accepted], proposal[~accepted]
        if not len(rows):
            break
        is_left = proposal < now[rows]
        low[rows] = torch.where(is_left, proposal, low[rows])
        high[rows] = torch.where(is_left, high[rows], proposal)
    result = x.clone()
    result[:, d] = new
    return result, log_p_new
