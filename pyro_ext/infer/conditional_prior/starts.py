"""Where a fit begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ...ops.rows import RowsResult
from .networks import RowMap

__all__ = ["all_starts"]

_NARROW = 0.2  # scale of further starts, relative to that of the prior


def all_starts(
    network: RowMap,
    psi: Tensor,
    noise: Tensor,
    log_joint: Callable[[Tensor], Tensor],
    num: int | None,
    best_of: Callable[[RowMap, Iterable[Tensor]], RowsResult],
) -> Iterator[Tensor]:
    """
    The present parameters, and Gaussian ones.

    :param RowMap network: the map.
    :param Tensor psi: its parameters, shape ``(rows, num_parameters)``.
    :param Tensor noise: shape ``(draws, features)``.
    :param log_joint: of what comes out of the map, shape ``(rows, draws, features)``; returns
        shape ``(draws, rows)``.
    :param num: number of starts; 2 when ``None``, or 1 for maps that do not end in an affine one.
    :param best_of: fits a map from several starts.
    :raises ValueError: if there is no affine map to make that many starts with.
    """
    affine = network.affine_end()
    if num is None:
        num = 1 if affine is None else 2
    if affine is network:
        yield from _gaussian_starts(network, psi, noise, log_joint, num)
        return
    yield psi
    if num == 1:
        return
    if affine is None:
        raise ValueError(
            f"num_starts={num}: this flow does not end in an affine map, by which another "
            "start could be made. Use num_starts=1."
        )
    start = affine.initial(len(psi)).to(psi)
    gaussian = best_of(affine, _gaussian_starts(affine, start, noise, log_joint, num))
    front = network.initial(len(psi)).to(psi)[:, : -affine.num_parameters]
    yield torch.cat([front, gaussian.point], -1)


def _gaussian_starts(
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
