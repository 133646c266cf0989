"""Sums of products of numbers given by their logarithms, as a backend of ``opt_einsum``.

Pyro's own backend cannot be differentiated by :mod:`torch.func`.
"""

from __future__ import annotations

import torch
from pyro.ops.einsum.util import Tensordot
from torch import Tensor

__all__ = ["einsum", "tensordot", "transpose"]


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """
    Log-sum-exp form of :func:`torch.einsum`.

    :param str equation: as there, always with ``->``.
    :param operands: logarithms of the factors.
    """
    inputs, output = equation.split("->")
    summed = sorted(set(inputs) - set(output) - {","})
    order = [*output, *summed]
    total = sum(
        (_align(dims, x, order) for dims, x in zip(inputs.split(","), operands, strict=True)),
        start=operands[0].new_zeros(()),
    )
    if summed:
        total = torch.logsumexp(total, dim=tuple(range(len(output), len(order))))
    return total


def transpose(operand: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Permute dimensions."""
    return operand.permute(axes)


tensordot = Tensordot(einsum)


def _align(dims: str, operand: Tensor, order: list[str]) -> Tensor:
    """Permute named dimensions into an order, with size 1 for those that are missing."""
    operand = operand.permute([dims.index(dim) for dim in order if dim in dims])
    sizes = iter(operand.shape)
    return operand.reshape([next(sizes) if dim in dims else 1 for dim in order])
