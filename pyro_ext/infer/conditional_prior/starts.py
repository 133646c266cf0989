"""Where a fit begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .networks import RowMap

__all__ = ["gaussian_starts"]

_NARROW = 0.2  # scale of further starts, relative to that of the prior


def gaussian_starts(
    affine: RowMap,
    start: Tensor,
    noise: Tensor,
    log_joint: Callable[[Tensor], Tensor],
    num: int,
) -> Iterator[Tensor]:
    """
    A given start, and narrow ones at draws from it that agree with the evidence.

    The second start is at the best draw of each row, those after it at draws that are chosen with
    the probability that the evidence gives them.

    :param RowMap affine: an affine map.
    :param Tensor start: its parameters, shape ``(rows, num_parameters)``.
    :param Tensor noise: shape ``(draws, features)``.
    :param log_joint: of what comes out of the map, shape ``(rows, draws, features)``; returns
        shape ``(draws, rows)``.
    :param int num: number of starts.
    """
    yield start
    if num == 1:
        return
    with torch.no_grad():
        latents, _ = affine.to_latents(noise.expand(len(start), -1, -1), start)
        score = torch.nan_to_num(log_joint(latents), nan=-math.inf)
    for i in range(num - 1):
        gumbel = -torch.empty_like(score).exponential_().log()
        chosen = (score if i == 0 else score + gumbel).argmax(0)
        index = chosen[:, None, None].expand(-1, 1, latents.shape[-1])
        yield affine.centred(latents.gather(1, index).squeeze(1), _NARROW)
