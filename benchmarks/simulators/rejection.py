"""Draws from a posterior that has no exact sampler, by brute force, for parameters in a box.

Approximate Bayesian computation with so many simulations that its tolerance hardly matters, and
what matters is taken out by regression (Beaumont, Zhang and Balding 2002, "Approximate Bayesian
computation in population genetics"). It is affordable where hundreds of millions of simulations
are, and there are few parameters and few data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .task import Reference, resample

__all__ = ["Box", "Coordinates", "draw_by_rejection"]

_AT_ONCE = 500_000
_PILOT_SIMULATIONS, _PILOT_DRAWS, _PILOTS = 2_000_000, 2_000, 2
_PADDING = 0.25  # of the range of a pilot's draws, on each side of the box


class Coordinates(Protocol):
    """Parameters without bounds, given data."""

    def to_real(self, theta: Tensor, x: Tensor) -> Tensor:
        """From parameters and data, a row for each, to coordinates."""

    def from_real(self, real: Tensor, x: Tensor) -> Tensor:
        """The inverse."""


class Box(NamedTuple):
    """Where parameters are uniform."""

    low: Tensor
    high: Tensor

    def draw(self, num: int) -> Tensor:
        """Draws, shape ``(num, d)``."""
        return self.low + (self.high - self.low) * torch.rand(num, len(self.low)).to(self.low)

    def to_real(self, theta: Tensor, x: Tensor) -> Tensor:
        """Parameters without bounds."""
        return ((theta - self.low) / (self.high - self.low)).logit()

    def from_real(self, real: Tensor, x: Tensor) -> Tensor:
        """The inverse of :meth:`to_real`."""
        return self.low + (self.high - self.low) * real.sigmoid()

    def around(self, theta: Tensor) -> Box:
        """The part of the box around draws, with room on all sides."""
        low, high = theta.amin(0), theta.amax(0)
        room = _PADDING * (high - low)
        return Box((low - room).maximum(self.low), (high + room).minimum(self.high))


class _Nearest(NamedTuple):
    theta: Tensor
    difference: Tensor
    """Data of the simulations less the observed ones."""
    distance: Tensor


def draw_by_rejection(
    simulate: Callable[[Tensor], Tensor],
    prior: Box,
    x: Tensor,
    num_draws: int,
    num_simulations: int,
    num_kept: int,
    coordinates: Coordinates | None = None,
) -> Reference:
    """
    Draws given data: the nearest of many simulations, adjusted.

    Pilot runs find the part of the prior where the posterior is, and a distance in which all the
    data weigh alike. A uniform prior restricted to that part has the same posterior, up to what
    is outside.

    :param simulate: from parameters, shape ``(n, d)``, to data, shape ``(n, k)``.
    :param Box prior: the uniform prior.
    :param Tensor x: observed data, shape ``(k,)``.
    :param int num_draws: number of draws.
    :param int num_simulations: simulations after the pilots.
    :param int num_kept: how many of them to keep; at least some fifteen times ``num_draws``.
    :param coordinates: in which the regression is; those of the prior by default. Where data
        bound parameters, they should know the bounds.
    """
    part, whiten = prior, torch.eye(len(x), dtype=x.dtype)
    for _ in range(_PILOTS):
        pilot = _nearest(simulate, part, x, whiten, _PILOT_SIMULATIONS, _PILOT_DRAWS)
        part, whiten = prior.around(pilot.theta), _whitening(simulate, pilot.theta)
    near = _nearest(simulate, part, x, whiten, num_simulations, num_kept)
    weight = 1 - (near.distance / near.distance.max()).square()
    adjusted = _adjusted(near, weight, x, coordinates or prior)
    return resample(adjusted, weight.log(), num_draws)


def _whitening(simulate: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """A matrix that makes the noise of data at the typical parameters white."""
    middle = theta.median(0).values.expand(10_000, -1)
    factor = torch.linalg.cholesky(simulate(middle).T.cov())
    return torch.linalg.inv(factor).T


def _nearest(
    simulate: Callable[[Tensor], Tensor],
    box: Box,
    x: Tensor,
    whiten: Tensor,
    num_simulations: int,
    num_kept: int,
) -> _Nearest:
    kept: _Nearest | None = None
    for start in range(0, num_simulations, _AT_ONCE):
        theta = box.draw(min(_AT_ONCE, num_simulations - start))
        difference = simulate(theta) - x
        new = _Nearest(theta, difference, (difference @ whiten).norm(dim=-1))
        if kept is not None:
            new = _Nearest(*(torch.cat(pair) for pair in zip(kept, new, strict=True)))
        chosen = new.distance.topk(min(num_kept, len(new.distance)), largest=False).indices
        kept = _Nearest(*(each[chosen] for each in new))
    if kept is None:
        raise ValueError(f"num_simulations={num_simulations}: there must be some.")
    return kept


def _adjusted(near: _Nearest, weight: Tensor, x: Tensor, coordinates: Coordinates) -> Tensor:
    """Parameters less what a weighted regression explains by how far off the data are."""
    real = coordinates.to_real(near.theta, x + near.difference)
    design = torch.cat([torch.ones_like(weight)[:, None], near.difference], -1)
    root = weight.sqrt()[:, None]
    slopes = torch.linalg.lstsq(root * design, root * real).solution[1:]
    return coordinates.from_real(real - near.difference @ slopes, x)
