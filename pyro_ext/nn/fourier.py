"""Numbers as waves of several frequencies, so that networks learn what varies fast."""

from __future__ import annotations

import torch
from torch import Tensor

from .masked import MaskedLinear

__all__ = ["MaskedFourierLinear", "waves"]


def waves(x: Tensor, number: int) -> Tensor:
    r"""
    Put sines and cosines of each number next to it.

    .. math:: x, \sin(2^k x), \cos(2^k x), \quad k = 0, \dots, K - 1

    Networks of rectifiers learn functions that vary fast only slowly; of these features, they
    learn them as soon as others (Tancik et al. 2020).

    :param Tensor x: shape ``(..., n)``.
    :param int number: K; none for 0.
    :returns: shape ``(..., n * (1 + 2 * number))``, those of one number together.

    >>> from pyro_ext.nn.fourier import waves
    >>> waves(torch.zeros(3), 1)
    tensor([0., 0., 1., 0., 0., 1., 0., 0., 1.])
    """
    if not number:
        return x
    frequencies = 2.0 ** torch.arange(number, dtype=x.dtype, device=x.device)
    angles = x.unsqueeze(-1) * frequencies
    return torch.cat([x.unsqueeze(-1), angles.sin(), angles.cos()], -1).flatten(-2)


class MaskedFourierLinear(MaskedLinear):
    """
    A masked linear layer that reads its inputs as :func:`waves`.

    :param Tensor mask: shape ``(out_features, n)``, false where an input must not be seen.
    :param int number: frequencies for each input.
    """

    def __init__(self, mask: Tensor, number: int) -> None:
        super().__init__(mask.repeat_interleave(1 + 2 * number, 1))
        self.number = number

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, shape ``(..., n)`` to ``(..., out_features)``."""
        return super().forward(waves(input, self.number))

    def rows(self, input: Tensor, start: int, stop: int) -> Tensor:
        """Outputs ``start:stop`` from the leading inputs, see :meth:`MaskedLinear.rows`."""
        return super().rows(waves(input, self.number), start, stop)
