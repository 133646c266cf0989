"""Fixed permutations of features."""

from __future__ import annotations

import torch
from torch import Tensor

from .bijection import Bijection

__all__ = ["Permutation", "random_cycle"]


def random_cycle(features: int) -> Tensor:
    """
    Draw a permutation in which every feature moves, along one cycle (Sattolo's algorithm).

    A layer that treats the two halves of its input differently gains nothing from a permutation
    that leaves features where they are; with two features half of all permutations do.

    :param int features: number of features.
    :returns: indices, shape ``(features,)``; drawn from torch's global generator.
    """
    order = torch.randperm(features)
    cycle = torch.empty_like(order)
    cycle[order] = order.roll(-1)
    return cycle


class Permutation(Bijection):
    """
    The features in another, fixed order.

    :param Tensor permutation: feature i of the noise is feature ``permutation[i]`` of the data;
        saved with the parameters, so that a reloaded flow is the same flow.
    :raises ValueError: if it is not a permutation of 0, 1, ..., features - 1.

    >>> layer = Permutation(torch.tensor([2, 0, 1]))
    >>> layer.to_noise(torch.tensor([10.0, 11.0, 12.0]))[0]
    tensor([12., 10., 11.])
    """

    permutation: Tensor
    inverse_permutation: Tensor

    def __init__(self, permutation: Tensor) -> None:
        super().__init__()
        if permutation.dim() != 1 or permutation.is_floating_point():
            raise ValueError(f"A permutation is a vector of integers, not {permutation!r}.")
        if not permutation.sort().values.equal(torch.arange(permutation.numel()).to(permutation)):
            raise ValueError(
                f"{permutation.tolist()} is not a permutation: every index from 0 to "
                f"{permutation.numel() - 1} has to occur once."
            )
        self.register_buffer("permutation", permutation.clone())
        self.register_buffer("inverse_permutation", permutation.argsort())

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reorder; see :meth:`Bijection.to_noise`."""
        return x.index_select(-1, self.permutation), x.new_zeros(x.shape[:-1])

    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Put back in order; see :meth:`Bijection.to_data`."""
        return z.index_select(-1, self.inverse_permutation), z.new_zeros(z.shape[:-1])
