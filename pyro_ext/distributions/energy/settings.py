"""What an energy machine is made with and evaluated with, and checks of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Uniform

__all__ = ["Evaluation", "box_of", "check_at_least", "check_proposal"]


class Evaluation(NamedTuple):
    """How densities and draws are computed outside of training."""

    num_importance_samples: int
    exact: bool
    num_proposals: int
    tolerance: float


def check_proposal(proposal: str | Distribution, features: int) -> Distribution | None:
    """
    Check a proposal.

    :param proposal: "gaussian_mixture" or a distribution.
    :param int features: number of features of the data.
    :returns: the distribution, if it is one.
    :raises ValueError: if it is of the wrong shape, or cannot be inverted.
    :raises TypeError: if it is something else.
    """
    if isinstance(proposal, str):
        if proposal != "gaussian_mixture":
            raise ValueError(
                f"proposal={proposal!r} is unknown: give 'gaussian_mixture' or a distribution."
            )
        return None
    if not isinstance(proposal, Distribution):
        raise TypeError(
            f"proposal is a {type(proposal).__name__}: give 'gaussian_mixture' or a distribution."
        )
    shapes: tuple[tuple[int, ...], ...] = ((),)
    if isinstance(proposal, Uniform):
        shapes += ((features,),)
    if tuple(proposal.batch_shape) not in shapes or proposal.event_shape:
        raise ValueError(
            f"proposal has batch_shape {tuple(proposal.batch_shape)} and event_shape "
            f"{tuple(proposal.event_shape)}: give a distribution of one number, or a Uniform "
            f"whose ends have shape ({features},)."
        )
    if not isinstance(proposal, Uniform):
        _check_invertible(proposal)
    return proposal


def _check_invertible(proposal: Distribution) -> None:
    try:
        proposal.cdf(proposal.icdf(torch.full(proposal.batch_shape, 0.5)))
    except NotImplementedError as error:
        raise ValueError(
            f"proposal={proposal} has no `icdf` and `cdf`, which draws in strata need: give "
            "another distribution, or 'gaussian_mixture'."
        ) from error


def box_of(fixed: Distribution | None, features: int) -> tuple[Tensor, Tensor]:
    """Middle and half width of a uniform proposal; location and scale of another."""
    if fixed is None:
        return torch.zeros(features), torch.ones(features)
    if isinstance(fixed, Uniform):
        loc, scale = 0.5 * (fixed.low + fixed.high), 0.5 * (fixed.high - fixed.low)
    else:
        median = fixed.icdf(torch.full(fixed.batch_shape, 0.5))
        quartile = fixed.icdf(torch.full(fixed.batch_shape, 0.75))
        loc, scale = median, (quartile - median) / 0.6745
    dtype = torch.get_default_dtype()
    return loc.to(dtype).expand(features).clone(), scale.to(dtype).expand(features).clone()


def check_at_least(**numbers: tuple[int, int]) -> None:
    """
    Check whole numbers.

    :param numbers: for each name the number and the smallest one allowed.
    :raises ValueError: if one is out of its range.
    """
    for name, (value, smallest) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise ValueError(f"{name}={value!r}: give a whole number of at least {smallest}.")
