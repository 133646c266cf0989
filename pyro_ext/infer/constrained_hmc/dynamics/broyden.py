r"""Broyden's updates, by which an iteration with a fixed inverse Jacobian converges faster.

To solve :math:`f(u) = 0` where the Jacobian of :math:`f` is near the identity, the plain
iteration steps by :math:`-f(u)`. Broyden's first update corrects the inverse Jacobian by a matrix
of rank one after every step :math:`s_k`, so that it maps the change of :math:`f` to the step that
caused it. The products of these corrections need the steps alone (Kelley 1995, section 7.3):

.. math:: \Big(\prod_j \big(I + s_{j+1}s_j^\top/|s_j|^2\big)\Big)(-f(u)).

References: C. G. Broyden, *A class of methods for solving nonlinear simultaneous equations*
(1965); C. T. Kelley, *Iterative Methods for Linear and Nonlinear Equations* (1995).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Steps", "broyden_step"]

# Steps that are kept; the oldest are forgotten.
_MEMORY = 8
# An update that would lengthen a step by more than the inverse of this is left out.
_SMALLEST_DENOMINATOR = 0.2


class Steps(NamedTuple):
    """The latest steps of every chain, the oldest first."""

    steps: tuple[Tensor, ...] = ()  # each (chains, dim)
    squares: tuple[Tensor, ...] = ()  # each (chains, 1), the squared lengths


def broyden_step(history: Steps, value: Tensor) -> tuple[Tensor, Steps]:
    """
    The next step of every chain, and the history with it.

    :param history: the steps so far; an empty one gives the plain step ``-value``.
    :param Tensor value: :math:`f` where the chains are, ``(chains, dim)``.
    """
    steps, squares = history
    step = -value
    for before, after, square in zip(steps, steps[1:], squares, strict=False):
        step = step + after * ((before * step).sum(-1, keepdim=True) / square)
    if steps:
        # the newest correction involves the step that is looked for
        denominator = 1 - (steps[-1] * step).sum(-1, keepdim=True) / squares[-1]
        step = step / torch.where(denominator > _SMALLEST_DENOMINATOR, denominator, 1.0)
    square = step.square().sum(-1, keepdim=True).clamp(min=torch.finfo(step.dtype).tiny)
    return step, Steps((*steps, step)[-_MEMORY:], (*squares, square)[-_MEMORY:])
