"""Items without a neighbour in common share a colour."""

import numpy as np
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pyro_ext.infer.constrained_hmc.jacobian.coloring import greedy_coloring


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
