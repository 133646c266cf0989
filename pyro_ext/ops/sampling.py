"""Draws from distributions, where there is a faster way than their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent

__all__ = ["draw", "draw_categorical"]


def draw(fn: Any) -> Tensor:
    """
    Draw from a distribution.

    :param fn: the distribution.
    :returns: a value, without gradient to parameters where it is a Categorical.
    """
    if isinstance(fn, Independent):
        return draw(fn.base_dist)
    if isinstance(fn, Categorical):
        return draw_categorical(fn.logits)
    return fn.sample()


def draw_categorical(logits: Tensor) -> Tensor:
    """
    Draw by inverting the cumulative probabilities.

    It takes one random number, where ``Categorical.sample`` takes one for every category and a
    softmax, at ten times the cost for a few categories.

    :param Tensor logits: normalised, shape ``(..., K)``; an impossible category is never drawn.
    :returns: integers, shape ``(...)``.
    """
    cumulative = logits.exp().cumsum(-1)
    total = cumulative[..., -1:]
    # from the half-open interval without its lower end: a category of probability zero, which
    # ends where it begins, is not drawn even where the number or the product is rounded
    uniform = 1 - torch.rand(total.shape, dtype=total.dtype, device=total.device)
    return (uniform * total > cumulative[..., :-1]).sum(-1)
