"""Where a fit begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .networks import RowMap

__all__ = ["starting_points"]

_NARROW = 0.2  # scale of further starts, relative to that of the prior


def starting_points(
    row_map: RowMap,
    psi: Tensor,
    noise: Tensor,
    log_joint: Callable[[Tensor], Tensor],
    num: int,
) -> Iterator[Tensor]:
    """
    The present parameters, and narrow ones at draws of them that agree with the evidence.

    The second start is at the best draw of each row, those after it at draws that are chosen with
    the probability that the evidence gives them.

    :param RowMap row_map: the network.
    :param Tensor psi: the present parameters, shape ``(rows, num_parameters)``.
    :param Tensor noise: shape ``(draws, features)``.
    :param log_joint: of what comes out of the network, shape ``(rows, draws, features)``; returns
        shape ``(draws, rows)``.
    :param int num: number of starts.
    :raises ValueError: if the network does not end in an affine map, which could be moved.
    """
    yield psi
    if num == 1:
        return
    with torch.no_grad():
        latents, _ = row_map.to_latents(noise.expand(len(psi), -1, -1), psi)
        score = torch.nan_to_num(log_joint(latents), nan=-math.inf)
    for i in range(num - 1):
        gumbel = -torch.empty_like(score).exponential_().log()
        chosen = (score if i == 0 else score + gumbel).argmax(0)
        index = chosen[:, None, None].expand(-1, 1, latents.shape[-1])
        centred = row_map.centred(psi, latents.gather(1, index).squeeze(1), _NARROW)
        if centred is None:
            raise ValueError(
                f"num_starts={num}: the flow does not end in an affine map, by which another "
                "start could be made. Use num_starts=1."
            )
        yield centred
