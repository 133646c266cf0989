"""Damped steps block by block against the same steps by dense algebra, and solved blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from torch import Tensor

from pyro_ext.infer.constrained_hmc.jacobian.block_structure import BlockStructure
from pyro_ext.infer.constrained_hmc.jacobian.partition import find_splits
from pyro_ext.infer.constrained_hmc.jacobian.sparsity import find_pattern
from pyro_ext.infer.constrained_hmc.search.linearization import (
    DenseLinearization,
    block_linearization,
)
from pyro_ext.infer.constrained_hmc.search.local_start import solve_local_blocks
from pyro_ext.infer.constrained_hmc.system.constrained_system import ConstrainedSystem
from tests.infer.constrained_hmc.block_problems import (
    BlockProblem,
    block_problem,
    block_shapes,
    structure_of,
)
from tests.infer.constrained_hmc.problems import tolerances

Shape = tuple[list[tuple[int, int]], int, int, int]


def system_of(problem: BlockProblem) -> ConstrainedSystem:
    return ConstrainedSystem(
        problem.constraint, problem.potential, structure=structure_of(problem)
    )


@hypothesis_settings(max_examples=20, deadline=None, derandomize=True)
@given(shape=block_shapes)
def test_damped_steps_for_some_rows(shape: Shape) -> None:
    problem = block_problem(*shape)
    system, one = system_of(problem), torch.ones(problem.dim)
    u = torch.randn(3, problem.dim)
    residual = system.constraint(u, one)
    rows = torch.rand(residual.shape) < 0.7
    dense = DenseLinearization(system.jacobian_matrix(u, one))
    blocks = block_linearization(system.structure, system.derivatives)(u)  # type: ignore[arg-type]
    expected, found = dense.damped_step(residual, rows), blocks.damped_step(residual, rows)
    torch.testing.assert_close(found[1], expected[1])
    # the unit rows that are chosen, which the damping makes singular where they are dependent
    unit = torch.where(rows[..., None], dense.matrix, 0.0) / expected[1][..., None]
    singular = torch.linalg.svdvals(unit)
    smallest = torch.where(singular > 1e-12, singular, torch.inf).amin(-1)
    is_sound = smallest > 1e-2
    torch.testing.assert_close(found[0][is_sound], expected[0][is_sound], rtol=1e-7, atol=1e-7)
    reached = (unit @ found[0][..., None])[..., 0] + torch.where(rows, residual, 0.0) / found[1]
    torch.testing.assert_close(
        reached[is_sound], torch.zeros_like(reached[is_sound]), rtol=0, atol=1e-7
    )


def test_rows_that_are_not_finite_are_known() -> None:
    def constraint(u: Tensor) -> Tensor:
        return torch.stack([u[0] + u[3], u[1] * u[3].exp(), u[2] + u[3], (300 * u[3]).exp()])

    problem = BlockProblem(constraint, lambda u: u.sum(), 4, 4, torch.zeros(4), torch.zeros(4))
    system = system_of(problem)
    u = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 4.0]])
    blocks = block_linearization(system.structure, system.derivatives)(u)  # type: ignore[arg-type]
    assert blocks.finite_rows().tolist() == [[True] * 4, [True, True, True, False]]


def bent(u: Tensor) -> Tensor:
    """Blocks of one and of two outputs that Newton's method alone overshoots."""
    z, n = u[0], u[1:]
    return torch.stack(
        [
            (3 * n[0]).atan() + n[0] / 10 + z,
            n[1] ** 3 + n[1] - 4 * n[2] + z,
            n[2] ** 3 + n[2] + n[3] + n[1] * z,
            n[4].sinh() - 50 * z,
        ]
    )


def test_every_block_is_solved_for_its_own_inputs() -> None:
    pattern = find_pattern(bent, torch.randn(3, 6))
    (split,) = (s for s in find_splits(pattern) if s.num_global == 1)
    assert split.block_shape == (2, 3)
    structure = BlockStructure(
        pattern, split, "forward", dtype=torch.float64, device=torch.device("cpu")
    )
    system = ConstrainedSystem(bent, lambda u: u.sum(), structure=structure)
    one = torch.ones(6)
    start = 3 * torch.randn(20, 6)
    found = solve_local_blocks(
        lambda u: system.constraint(u, one),
        system.derivatives,
        structure,
        start,
        tolerances(4, 1e-10),
    )
    assert torch.equal(found[:, 0], start[:, 0]), "a global input was moved"
    assert (system.constraint(found, one).abs() < 1e-9).all()


@pytest.mark.parametrize("chain", [0, 1])
def test_blocks_without_a_solution_are_left_where_they_are_nearest(chain: int) -> None:
    def constraint(u: Tensor) -> Tensor:
        return torch.stack([u[1] ** 2 + u[0], u[2] + u[0]])

    problem = BlockProblem(constraint, lambda u: u.sum(), 3, 2, torch.zeros(2), torch.zeros(3))
    system, one = system_of(problem), torch.ones(3)
    start = torch.tensor([[-2.0, 1.0, 1.0], [2.0, 1.0, 1.0]])
    found = solve_local_blocks(
        lambda u: system.constraint(u, one),
        system.derivatives,
        system.structure,  # type: ignore[arg-type]
        start,
        tolerances(2, 1e-10),
    )
    residual = constraint(found[chain])
    assert abs(float(residual[1])) < 1e-9
    if chain == 0:
        assert abs(float(residual[0])) < 1e-9
    else:
        torch.testing.assert_close(residual[0], torch.tensor(2.0), rtol=0, atol=0.05)
