"""Many small matrices at once against LAPACK, one by one."""

import pytest
import torch

from pyro_ext.infer.constrained_hmc.jacobian.block_algebra import (
    inverse_cholesky,
    multiply,
    sum_of_outer_products,
)

each_size = pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])


@each_size
def test_inverse_cholesky(size: int) -> None:
    root = torch.randn(3, 7, size, size + 1)
    gram = root @ root.mT + torch.eye(size)
    inverse, pivots = inverse_cholesky(gram.movedim(1, -1))
    factor = torch.linalg.cholesky(gram)
    torch.testing.assert_close(
        inverse.movedim(-1, 1), torch.linalg.inv(factor), rtol=1e-10, atol=1e-12
    )
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(pivots.movedim(-1, 1), diagonal.square(), rtol=1e-10, atol=1e-12)


@each_size
@pytest.mark.parametrize("kind", ["zero", "indefinite", "nan"])
def test_a_matrix_without_a_factor_is_marked_and_harms_no_other(size: int, kind: str) -> None:
    root = torch.randn(2, 3, size, size + 1)
    gram = (root @ root.mT).movedim(1, -1)
    bad = gram.clone()
    bad[1, :, :, 2] = {"zero": 0.0, "nan": torch.nan}.get(kind, -torch.eye(size))  # type: ignore[call-overload]
    expected, found = inverse_cholesky(gram), inverse_cholesky(bad)
    assert not found[1][1, :, 2].log().sum().isfinite()
    for part, reference in zip(found, expected, strict=True):
        assert torch.equal(part[0], reference[0])
        assert torch.equal(part[1, ..., :2], reference[1, ..., :2])


@pytest.mark.parametrize("inner", [1, 3, 7])
def test_products(inner: int) -> None:
    matrix, vectors = torch.randn(2, 3, inner, 5), torch.randn(2, 4, inner, 5)
    expected = torch.einsum("cijb,cnjb->cnib", matrix, vectors)
    torch.testing.assert_close(multiply(matrix, vectors), expected)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 4), (5, 6)], ids=str)
def test_sums_of_outer_products(sizes: tuple[int, int]) -> None:
    first, second = torch.randn(2, 7, sizes[0], 5), torch.randn(2, 7, sizes[1], 5)
    expected = torch.einsum("cnib,cnjb->cijb", first, second)
    torch.testing.assert_close(sum_of_outer_products(first, second), expected)
