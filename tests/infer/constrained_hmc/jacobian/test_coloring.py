"""Few products that hold every entry of a sparse Jacobian."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.func import vmap

from pyro_ext.infer.constrained_hmc.jacobian.coloring import greedy_coloring
from tests.infer.constrained_hmc.block_problems import block_problem, block_shapes, structure_of

Shape = tuple[list[tuple[int, int]], int, int, int]
MODES = ["forward", "reverse", "mixed"]


@hypothesis_settings(max_examples=50, deadline=None, derandomize=True)
@given(edges=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=60))
def test_items_of_one_colour_have_no_neighbour_in_common(edges: list[tuple[int, int]]) -> None:
    items, others = np.array(edges, dtype=int).reshape(-1, 2).T
    colors = greedy_coloring(items, others, 10)
    matrix = np.zeros((10, 10), dtype=bool)
    matrix[items, others] = True
    assert ((colors == -1) == ~matrix.any(1)).all()
    for color in range(colors.max() + 1):
        assert matrix[colors == color].sum(0).max() == 1
    # no colour is left out
    assert set(colors) - {-1} == set(range(colors.max() + 1))


def test_local_columns_share_a_colour_however_many_they_are() -> None:
    rows = np.arange(200)
    colors = greedy_coloring(np.concatenate([rows, np.full(200, 200)]), np.tile(rows, 2), 201)
    assert colors.max() == 1
    many = greedy_coloring(np.arange(20), np.zeros(20, dtype=int), 20)
    assert sorted(many) == list(range(20))


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
