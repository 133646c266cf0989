"""Jacobians with local blocks against the same Jacobians as dense matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from torch import Tensor

from pyro_ext.infer.constrained_hmc.dynamics.integrator import (
    IntegratorSettings,
    PhaseState,
    leapfrog_step,
)
from pyro_ext.infer.constrained_hmc.dynamics.projection import (
    Equations,
    Projector,
    hybrid,
    newton,
    quasi_newton,
)
from pyro_ext.infer.constrained_hmc.jacobian.block_jacobian import BlockJacobian
from pyro_ext.infer.constrained_hmc.jacobian.partition import find_splits
from pyro_ext.infer.constrained_hmc.jacobian.sparsity import find_pattern
from pyro_ext.infer.constrained_hmc.jacobian.structure import factorize, projection_error
from pyro_ext.infer.constrained_hmc.system.constrained_system import (
    ConstrainedSystem,
    project_momentum,
)
from tests.infer.constrained_hmc.block_problems import (
    BlockProblem,
    block_problem,
    block_shapes,
    structure_of,
)
from tests.infer.constrained_hmc.problems import tolerances

Shape = tuple[list[tuple[int, int]], int, int, int]
TOLERANCE = 1e-8


def systems(problem: BlockProblem, choice: int = 0) -> tuple[ConstrainedSystem, ConstrainedSystem]:
    """Dense and structured."""
    structure = structure_of(problem, "forward", choice)
    return (
        ConstrainedSystem(problem.constraint, problem.potential),
        ConstrainedSystem(problem.constraint, problem.potential, structure=structure),
    )


def local_share(jacobian: BlockJacobian) -> Tensor:
    """Smallest share of the local columns in a row of the Gram matrix."""
    shared = jacobian.whitened[:, jacobian.partition.num_local :]
    return 1 / (1 + shared.square().sum(1).flatten(1)).amax(-1)


def assert_same(actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE * factor, atol=TOLERANCE * factor)


@hypothesis_settings(max_examples=20, deadline=None, derandomize=True)
@given(shape=block_shapes)
def test_energy_gradient_products_and_solutions(shape: Shape) -> None:
    problem = block_problem(*shape)
    pattern = find_pattern(problem.constraint, torch.randn(2, problem.dim))
    u, scale = torch.randn(3, problem.dim), torch.rand(problem.dim) + 0.5
    vector, residual = torch.randn(3, problem.dim), torch.randn(3, problem.num_constraints)
    count = 0
    for choice in range(min(3, len(find_splits(pattern)))):
        dense, structured = systems(problem, choice)
        expected, found = dense.point(u, scale), structured.point(u, scale)
        # a local block may be singular where the whole is not, or the whole may be
        assert isinstance(found.jacobian, BlockJacobian)
        is_sound = local_share(found.jacobian) > 1e-5
        is_sound &= torch.linalg.cond(expected.jacobian.dense()) < 1e3
        count += int(is_sound.sum())
        for name in ("energy", "gradient"):
            assert_same(getattr(found, name)[is_sound], getattr(expected, name)[is_sound])
        a, b = found.jacobian, expected.jacobian
        assert_same(a.apply(vector), b.apply(vector))
        assert_same(a.dense(), b.dense())
        assert_same(a.minimum_norm(residual)[is_sound], b.minimum_norm(residual)[is_sound])
    assert count > 0


@hypothesis_settings(max_examples=8, deadline=None, derandomize=True)
@given(shape=block_shapes)
def test_trajectories(shape: Shape) -> None:
    problem = block_problem(*shape)
    dense, structured = systems(problem)
    tols = tolerances(problem.num_constraints, 1e-11)
    scale = torch.rand(problem.dim) + 0.5
    start = torch.randn(4, problem.dim)
    for _ in range(30):
        start = start - dense.jacobian(start, scale).minimum_norm(dense.constraint(start, scale))
    is_on = dense.constraint(start, scale).abs().amax(-1) < 1e-11
    start = start[is_on]
    momentum = torch.randn_like(start)
    settings = IntegratorSettings(quasi_newton, None, tols, 2)
    ends = []
    for system in (dense, structured):
        point = system.point(start, scale)
        state = PhaseState(point, project_momentum(point.jacobian, momentum))
        status = torch.zeros(len(start), dtype=torch.long)
        for _ in range(5):
            state, info = leapfrog_step(system, scale, settings, state, 0.1, status)
            status = info.status
        ends.append((state, status))
    (expected, status), (found, other) = ends
    # chains on which neither failed; a solver may stop at its limit in one and not in the other
    is_fine = (status == 0) & (other == 0)
    assert_same(found.point.position[is_fine], expected.point.position[is_fine], 10)
    assert_same(found.momentum[is_fine], expected.momentum[is_fine], 10)
    assert_same(found.point.energy[is_fine], expected.point.energy[is_fine], 10)


@pytest.mark.parametrize("projector", [quasi_newton, newton, hybrid], ids=lambda p: p.__name__)
def test_every_projection_finds_the_same_point(projector: Projector) -> None:
    problem = block_problem([(2, 1), (1, 0), (3, 2)], 2, 1, 7)
    dense, structured = systems(problem)
    one = torch.ones(problem.dim)
    u = torch.randn(2, problem.dim)
    results = [
        projector(
            Equations(
                lambda q, s=system: s.constraint(q, one),  # type: ignore[misc]
                lambda q, jacobian, s=system: s.correction(q, one, jacobian),  # type: ignore[misc]
                lambda q, s=system: s.slopes(q, one),  # type: ignore[misc]
            ),
            u,
            system.jacobian(u, one),
            tolerances(problem.num_constraints, 1e-12),
        )
        for system in (dense, structured)
    ]
    assert results[0].is_converged.tolist() == results[1].is_converged.tolist()
    assert results[0].is_converged.any()
    mask = results[0].is_converged
    assert_same(results[1].position[mask], results[0].position[mask])


@hypothesis_settings(max_examples=20, deadline=None, derandomize=True)
@given(shape=block_shapes)
def test_newton_steps(shape: Shape) -> None:
    """Against the definition: along the rows of one Jacobian, to solve with another."""
    problem = block_problem(*shape)
    dense, structured = systems(problem)
    scale = torch.rand(problem.dim) + 0.5
    u = torch.randn(3, problem.dim)
    there = u + 0.1 * torch.randn(3, problem.dim)
    residual = torch.randn(3, problem.num_constraints)
    expected = dense.jacobian(u, scale).newton_step(dense.slopes(there, scale), residual)
    jacobian, slopes = structured.jacobian(u, scale), structured.slopes(there, scale)
    found = jacobian.newton_step(slopes, residual)
    matrices = dense.jacobian_matrix(u, scale), dense.jacobian_matrix(there, scale)
    assert_same(jacobian.dense_slopes(slopes), matrices[1])
    assert isinstance(jacobian, BlockJacobian)
    is_sound = local_share(jacobian) > 1e-5
    is_sound &= torch.linalg.cond(matrices[1] @ matrices[0].mT) < 1e4
    size = expected.norm(dim=-1, keepdim=True)
    assert_same((found / size)[is_sound], (expected / size)[is_sound], 10)
    assert bool(is_sound.any()) or bool((torch.linalg.cond(matrices[0]) > 1e2).all())


def noisy(u: Tensor) -> Tensor:
    """The noise of the second output vanishes with its scale, the last input."""
    return torch.stack([u[0] + u[2] + u[3], u[1] * u[3] + u[2], u[0] + 2 * u[1] - u[2]])[:2]


def jacobian_of(points: Tensor) -> BlockJacobian:
    pattern = find_pattern(noisy, torch.randn(3, 4))
    split = find_splits(pattern)[0]
    assert (split.num_blocks, split.num_global) == (2, 2)
    problem = BlockProblem(noisy, lambda u: u.sum(), 4, 2, torch.zeros(2), torch.zeros(4))
    system = ConstrainedSystem(noisy, problem.potential, structure=structure_of(problem))
    jacobian = system.jacobian(points, torch.ones(4))
    assert isinstance(jacobian, BlockJacobian)
    return jacobian


def test_lost_digits_are_measured() -> None:
    scales = torch.tensor([1.0, 1e-2, 1e-4, 1e-6, 0.0])
    points = torch.stack([torch.tensor([0.3, 3.0, 0.1, float(s)]) for s in scales])
    jacobian = jacobian_of(points)
    vector = torch.randn(4).expand(5, 4)
    error = projection_error(jacobian, vector)
    assert error[0] < 1e-14
    assert (error[2:4] > 1e-8).all()
    assert not error[4].isfinite()
    dense = factorize(jacobian.dense())
    assert (projection_error(dense, vector) < 1e-14).all()


@pytest.mark.parametrize("kind", ["singular", "nan"])
def test_a_bad_jacobian_is_marked_and_leaves_the_others_alone(kind: str) -> None:
    points = torch.randn(3, 4)
    bad = points.clone()
    bad[1, 3] = 0.0 if kind == "singular" else torch.nan
    expected, found = jacobian_of(points), jacobian_of(bad)
    assert not found.half_log_det_gram[1].isfinite()
    for part, reference in zip(found, expected, strict=True):
        if isinstance(part, Tensor) and isinstance(reference, Tensor):
            assert torch.equal(part[[0, 2]], reference[[0, 2]])
