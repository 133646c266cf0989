"""Few products that hold every entry of a sparse Jacobian."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from torch.func import vmap

from tests.infer.constrained_hmc.block_problems import block_problem, block_shapes, structure_of

Shape = tuple[list[tuple[int, int]], int, int, int]
MODES = ["forward", "reverse", "mixed"]


@pytest.mark.parametrize("mode", MODES)
@hypothesis_settings(max_examples=20, deadline=None, derandomize=True)
@given(shape=block_shapes)
def test_products_hold_the_jacobian(mode: str, shape: Shape) -> None:
    problem = block_problem(*shape)
    u, scale = torch.randn(3, problem.dim), torch.rand(problem.dim) + 0.5
    structure = structure_of(problem, mode)
    derivatives = vmap(structure.derivatives(problem.constraint))(u)
    expected = [torch.autograd.functional.jacobian(problem.constraint, row) for row in u]
    matrix = structure.matrix(derivatives, scale)
    torch.testing.assert_close(matrix, torch.stack(expected) * scale, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@hypothesis_settings(max_examples=20, deadline=None, derandomize=True)
@given(shape=block_shapes)
def test_cotangents_are_the_transpose_of_entries(mode: str, shape: Shape) -> None:
    problem = block_problem(*shape)
    compression = structure_of(problem, mode).compression
    products = torch.randn(2, len(compression.product_places))
    products[:, -1] = 0.0
    columns, remaining = compression.entries(products)
    a, b = torch.randn_like(columns), torch.randn_like(remaining)
    inner = (columns * a).sum() + (remaining * b).sum()
    torch.testing.assert_close((compression.cotangent(a, b) * products).sum(), inner)


@pytest.mark.parametrize(
    ("mode", "num_products"), [("forward", 4), ("reverse", 40), ("mixed", 4)], ids=MODES
)
def test_the_number_of_products(mode: str, num_products: int) -> None:
    """Forty outputs with a noise each and three inputs in common."""
    structure = structure_of(block_problem([(1, 0)] * 40, 3, 0, 2), mode)
    assert structure.compression.num_products == num_products
    assert f"{num_products} products" in structure.describe()


def test_many_noise_inputs_per_output_need_one_product_in_reverse() -> None:
    problem = block_problem([(1, 12)] * 10, 1, 0, 2)
    number = {mode: structure_of(problem, mode).compression.num_products for mode in MODES}
    assert number["mixed"] == 2
    assert number["mixed"] < number["forward"]
