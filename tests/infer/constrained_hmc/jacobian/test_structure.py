"""The factorised Jacobian against dense linear algebra."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_ext.infer.constrained_hmc.jacobian.structure import factorize

random_sizes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, 4))


def random_matrix(sizes: tuple[int, int, int], seed: int) -> Tensor:
    chains, rows, more = sizes
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(chains, rows, rows + more, generator=generator) + torch.eye(
        rows, rows + more
    )


@hypothesis_settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes=random_sizes, seed=st.integers(0, 1000))
def test_products_and_solutions(sizes: tuple[int, int, int], seed: int) -> None:
    matrix = random_matrix(sizes, seed)
    jacobian = factorize(matrix)
    vector, residual = torch.randn(matrix.shape[0], matrix.shape[2]), torch.randn(matrix.shape[:2])
    inverse = torch.linalg.pinv(matrix)
    condition = float(torch.linalg.cond(matrix).max()) ** 2
    tolerance = 1e-13 * condition
    torch.testing.assert_close(jacobian.apply(vector), torch.einsum("cij,cj->ci", matrix, vector))
    solution = torch.einsum("cij,cj->ci", inverse, residual)
    torch.testing.assert_close(
        jacobian.minimum_norm(residual), solution, rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(jacobian.dual.mT, inverse, rtol=tolerance, atol=tolerance)
    log_det = 0.5 * torch.linalg.slogdet(matrix @ matrix.mT)[1]
    torch.testing.assert_close(jacobian.half_log_det_gram, log_det, rtol=tolerance, atol=tolerance)


def test_the_solution_is_the_shortest() -> None:
    matrix = random_matrix((3, 2, 4), 0)
    jacobian = factorize(matrix)
    residual = torch.randn(3, 2)
    shortest = jacobian.minimum_norm(residual)
    torch.testing.assert_close(jacobian.apply(shortest), residual)
    other = torch.randn(3, 6)
    null = other - jacobian.minimum_norm(jacobian.apply(other))
    assert (null.norm(dim=-1) > 0.1).all()
    assert ((shortest + null).norm(dim=-1) > shortest.norm(dim=-1)).all()


@pytest.mark.parametrize("kind", ["repeated row", "zero row", "nan", "infinite"])
def test_a_bad_jacobian_is_marked_and_leaves_the_others_alone(kind: str) -> None:
    good = random_matrix((3, 3, 2), 1)
    bad = good.clone()
    if kind == "repeated row":
        bad[1, 2] = bad[1, 0]
    elif kind == "zero row":
        bad[1, 1] = 0.0
    else:
        bad[1, 0, 0] = torch.nan if kind == "nan" else torch.inf
    expected, found = factorize(good), factorize(bad)
    log_det = found.half_log_det_gram[1]
    # rounding may leave a repeated row a determinant of the order of the rounding
    assert not log_det.isfinite() or (kind == "repeated row" and log_det < -14)
    for part, reference in zip(found, expected, strict=True):
        assert torch.equal(part[[0, 2]], reference[[0, 2]])


def test_exact_loss_of_rank_is_not_finite() -> None:
    matrix = torch.ones(2, 2, 3)
    matrix[1, 0, 0] = 2.0
    is_finite = factorize(matrix).half_log_det_gram.isfinite()
    assert is_finite.tolist() == [False, True]
