"""Entries outside of a structure, and lost digits, are found; rounding is not taken for them."""

import pytest
import torch
from torch import Tensor

from pyro_ext.infer.constrained_hmc.jacobian.block_structure import BlockStructure
from pyro_ext.infer.constrained_hmc.jacobian.partition import find_splits
from pyro_ext.infer.constrained_hmc.jacobian.sparsity import find_pattern
from pyro_ext.infer.constrained_hmc.system.constrained_system import ConstrainedSystem
from pyro_ext.infer.constrained_hmc.system.defects import find_misplaced, has_lost_digits

DIM = 6


def gated(u: Tensor) -> Tensor:
    """Beyond one, the first input acts on the second output as well."""
    first, scale = u[:1], u[4].exp()
    noise = u[:4] * scale + (3 * u[5]).sin() + u[5]
    more = torch.where(first > 1, 1e-3 * (first - 1), 0.0)
    return noise + torch.cat([torch.zeros_like(first), more, torch.zeros_like(u[:2])])


def system_at(points: Tensor, mode: str = "forward") -> ConstrainedSystem:
    pattern = find_pattern(gated, points)
    structure = BlockStructure(
        pattern, find_splits(pattern)[0], mode, dtype=points.dtype, device=points.device
    )
    return ConstrainedSystem(gated, lambda u: 0.5 * u.square().sum(), structure=structure)


@pytest.mark.parametrize("mode", ["forward", "reverse", "mixed"])
def test_a_misplaced_entry_is_named(mode: str) -> None:
    points = torch.randn(3, DIM)
    points[:, 0] = 0.5
    system, scale = system_at(points, mode), torch.rand(DIM) + 0.5
    assert isinstance(system.structure, BlockStructure)
    position = points / scale
    position[2, 0] = 1.5 / scale[0]
    point, vector = system.point(position, scale), torch.randn(3, DIM)
    product = system.product(position, vector, scale)
    found = find_misplaced(system, point, scale, vector, product)
    assert found is not None
    assert found.chain == 2
    assert found.rows == (1,)
    assert found.columns == (0,)
    good = torch.tensor([0, 1])
    fine = system.point(position[good], scale)
    assert find_misplaced(system, fine, scale, vector[good], product[good]) is None


def test_products_are_those_of_the_jacobian() -> None:
    u, v, scale = torch.randn(4, DIM), torch.randn(4, DIM), torch.rand(DIM) + 0.5
    for mode in ("forward", "reverse"):
        system = system_at(u, mode)
        matrix = torch.stack(
            [torch.autograd.functional.jacobian(gated, row * scale) * scale for row in u]
        )
        expected = torch.einsum("cij,cj->ci", matrix, v)
        torch.testing.assert_close(system.product(u, v, scale), expected)


def test_cancellation_is_not_a_misplaced_entry() -> None:
    """A vector along which one output does not change leaves nothing but rounding of it."""
    points = torch.randn(1, DIM)
    points[:, 0] = 0.5
    system, one = system_at(points), torch.ones(DIM)
    matrix = system.jacobian_matrix(points, one)[0]
    vector = torch.randn(DIM)
    row = matrix[2]
    vector = vector - row * (row @ vector) / row.square().sum()
    vector = vector - row * (row @ vector) / row.square().sum()
    product = system.product(points, vector[None], one)
    assert product[0, 2].abs() < 1e-14
    # rounding, made large enough to be seen for certain
    product[0, 2] += 1e-15
    assert find_misplaced(system, system.point(points, one), one, vector[None], product) is None


def test_entries_that_overflow_tell_nothing() -> None:
    points = torch.randn(2, DIM)
    system, one = system_at(points), torch.ones(DIM)
    wild = points.clone()
    wild[1, 4] = 800.0
    vector = torch.randn(2, DIM)
    product = system.product(wild, vector, one)
    assert not product[1].isfinite().all()
    assert find_misplaced(system, system.point(wild, one), one, vector, product) is None


def test_lost_digits_are_a_defect_where_a_dense_factorisation_keeps_them() -> None:
    def vanishing(u: Tensor) -> Tensor:
        return torch.stack([u[0] + u[2] + u[3], u[1] * u[3] + u[2]])

    pattern = find_pattern(vanishing, torch.randn(3, 4))
    structure = BlockStructure(
        pattern,
        find_splits(pattern)[0],
        "forward",
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    system = ConstrainedSystem(vanishing, lambda u: u.sum(), structure=structure)
    points, one = torch.tensor([[0.3, 3.0, 0.1, 1.0], [0.3, 3.0, 0.1, 1.0]]), torch.ones(4)
    assert not has_lost_digits(system.point(points, one))
    for scale in (1e-5, 0.0):
        points[1, 3] = scale
        assert has_lost_digits(system.point(points, one))
    # nothing is gained where there is no Jacobian
    points[1, 3] = torch.nan
    assert not has_lost_digits(system.point(points, one))
