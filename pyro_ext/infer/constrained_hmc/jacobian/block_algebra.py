"""Linear algebra on many small matrices at once, which lie along the last axis.

Thousands of matrices with one to four rows are a case that LAPACK, called once per matrix, is
slow at. Written as arithmetic on vectors along the last axis the factorisation of a matrix of one
row costs as much as a square root.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse_cholesky", "multiply", "sum_of_outer_products"]

_MOST_UNROLLED = 4  # rows


def inverse_cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    Inverses of Cholesky factors, :math:`W = C^{-1}` with :math:`CC^\top = G`.

    :param Tensor gram: symmetric matrices, shape ``(chains, r, r, blocks)``.
    :returns: :math:`W`, same shape, and the squared diagonal of :math:`C`, ``(chains, r,
        blocks)``. A matrix that is not positive definite gives a diagonal that is zero, negative
        or NaN, and harms no other.
    """
    if gram.shape[1] > _MOST_UNROLLED:
        return _inverse_cholesky_lapack(gram)
    size = gram.shape[1]
    factor: dict[tuple[int, int], Tensor] = {}
    inverse: dict[tuple[int, int], Tensor] = {}
    pivots: list[Tensor] = []
    for i in range(size):
        for j in range(i):
            value = gram[:, i, j]
            for k in range(j):
                value = value - factor[i, k] * factor[j, k]
            factor[i, j] = value * inverse[j, j]
        pivot = gram[:, i, i]
        for k in range(i):
            pivot = pivot - factor[i, k].square()
        pivots.append(pivot)
        inverse[i, i] = pivot.rsqrt()
        for j in range(i):
            value = factor[i, j] * inverse[j, j]
            for k in range(j + 1, i):
                value = value + factor[i, k] * inverse[k, j]
            inverse[i, j] = -value * inverse[i, i]
    zero = torch.zeros_like(pivots[0])
    rows = [torch.stack([inverse.get((i, j), zero) for j in range(size)], 1) for i in range(size)]
    return torch.stack(rows, 1), torch.stack(pivots, 1)


def _inverse_cholesky_lapack(gram: Tensor) -> tuple[Tensor, Tensor]:
    factor, info = torch.linalg.cholesky_ex(gram.movedim(-1, 1))
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    pivots = torch.where(info.unsqueeze(-1) == 0, pivots, torch.nan)
    return inverse.movedim(1, -1).contiguous(), pivots.movedim(1, -1).contiguous()


def multiply(matrix: Tensor, vectors: Tensor) -> Tensor:
    """
    Products of every block with its part of some vectors.

    :param Tensor matrix: shape ``(chains, i, j, blocks)``.
    :param Tensor vectors: shape ``(chains, n, j, blocks)``.
    :returns: shape ``(chains, n, i, blocks)``.
    """
    if matrix.shape[2] > _MOST_UNROLLED:
        return torch.einsum("cijb,cnjb->cnib", matrix, vectors)
    result = matrix[:, None, :, 0] * vectors[:, :, None, 0]
    for j in range(1, matrix.shape[2]):
        result = result + matrix[:, None, :, j] * vectors[:, :, None, j]
    return result


def sum_of_outer_products(first: Tensor, second: Tensor) -> Tensor:
    """
    Sums over vectors of the outer products of their parts in every block.

    :param Tensor first: shape ``(chains, n, i, blocks)``.
    :param Tensor second: shape ``(chains, n, j, blocks)``.
    :returns: shape ``(chains, i, j, blocks)``.
    """
    if first.shape[2] * second.shape[2] > _MOST_UNROLLED**2:
        return torch.einsum("cnib,cnjb->cijb", first, second)
    rows = [(first[:, :, i, None] * second).sum(1) for i in range(first.shape[2])]
    return torch.stack(rows, 1)
