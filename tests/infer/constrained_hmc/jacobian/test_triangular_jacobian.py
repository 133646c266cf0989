"""Jacobians of series against the same Jacobians as dense matrices."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_ext.infer.constrained_hmc.dynamics.integrator import (
    IntegratorSettings,
    PhaseState,
    leapfrog_step,
)
from pyro_ext.infer.constrained_hmc.dynamics.projection import quasi_newton
from pyro_ext.infer.constrained_hmc.jacobian.sparsity import find_pattern
from pyro_ext.infer.constrained_hmc.jacobian.structure import projection_error
from pyro_ext.infer.constrained_hmc.jacobian.triangle import find_triangles
from pyro_ext.infer.constrained_hmc.jacobian.triangular_jacobian import (
    TriangularJacobian,
    TriangularStructure,
)
from pyro_ext.infer.constrained_hmc.system.constrained_system import (
    ConstrainedSystem,
    project_momentum,
)
from tests.infer.constrained_hmc.problems import tolerances

# steps, states per step, parameters, whether the noises of a step are mixed, seed
series = st.tuples(
    st.integers(2, 6), st.integers(1, 3), st.integers(0, 3), st.booleans(), st.integers(0, 10_000)
)
Series = tuple[int, int, int, bool, int]


class Problem:
    """A nonlinear recursion with noise in every step; rows and columns are shuffled."""

    def __init__(self, steps: int, states: int, parameters: int, is_mixed: bool, seed: int):
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.eye(states)
        if is_mixed:
            mixing = mixing + 0.4 * torch.randn(states, states, generator=generator)
        drift = 0.5 * torch.randn(states, states, generator=generator)
        effect = torch.randn(states, parameters, generator=generator)
        self.num_constraints = steps * states
        self.dim = self.num_constraints + parameters
        rows = torch.randperm(self.num_constraints, generator=generator)
        columns = torch.randperm(self.dim, generator=generator)

        def constraint(u: Tensor) -> Tensor:
            z, noise = u[columns].split([parameters, self.num_constraints])
            y, outputs = torch.full((states,), 0.3), []
            for n in noise.reshape(steps, states):
                y = (drift @ y + effect @ z).sin() + 0.2 * y + mixing @ n
                outputs.append(y)
            return torch.cat(outputs)[rows]

        self.constraint: Callable[[Tensor], Tensor] = constraint

    def potential(self, u: Tensor) -> Tensor:
        return 0.5 * u.square().sum() + 0.1 * (u[0] * u[-1]).cos()

    def systems(self, mode: str = "forward") -> tuple[ConstrainedSystem, ConstrainedSystem]:
        """Dense and structured."""
        pattern = find_pattern(self.constraint, torch.randn(3, self.dim))
        triangle = find_triangles(pattern)[0]
        structure = TriangularStructure(pattern, triangle, mode, device=torch.device("cpu"))
        return (
            ConstrainedSystem(self.constraint, self.potential),
            ConstrainedSystem(self.constraint, self.potential, structure=structure),
        )


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
@given(series=series)
def test_orders_are_block_triangular(series: Series) -> None:
    problem = Problem(*series)
    u = torch.randn(problem.dim)
    matrix = torch.autograd.functional.jacobian(problem.constraint, u)
    triangles = find_triangles(find_pattern(problem.constraint, torch.randn(3, problem.dim)))
    assert triangles
    for triangle in triangles:
        rows, columns = torch.tensor(triangle.rows), torch.tensor(triangle.columns)
        assert sorted(rows.tolist()) == list(range(problem.num_constraints))
        used = sorted([*columns.tolist(), *triangle.others.tolist()])
        assert used == list(range(problem.dim))
        square = matrix[rows][:, columns]
        block = torch.repeat_interleave(torch.tensor(triangle.sizes))
        assert (square[block[:, None] < block] == 0).all()


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@hypothesis_settings(max_examples=15, deadline=None, derandomize=True)
@given(series=series)
def test_energy_gradient_products_and_solutions(mode: str, series: Series) -> None:
    problem = Problem(*series)
    dense, structured = problem.systems(mode)
    u, scale = torch.randn(3, problem.dim), torch.rand(problem.dim) + 0.5
    expected, found = dense.point(u, scale), structured.point(u, scale)
    assert isinstance(found.jacobian, TriangularJacobian)
    vector, residual = torch.randn(3, problem.dim), torch.randn(3, problem.num_constraints)
    # where the chosen columns are nearly dependent digits are lost, and that is noticed
    accurate = projection_error(found.jacobian, torch.randn(3, problem.dim)) < 1e-11
    accurate &= torch.linalg.cond(expected.jacobian.dense()) < 1e3
    assert_same(found.energy[accurate], expected.energy[accurate])
    assert_same(found.gradient[accurate], expected.gradient[accurate])
    a, b = found.jacobian, expected.jacobian
    assert_same(a.apply(vector), b.apply(vector))
    assert_same(a.dense(), b.dense())
    assert_same(a.minimum_norm(residual)[accurate], b.minimum_norm(residual)[accurate])


@hypothesis_settings(max_examples=20, deadline=None, derandomize=True)
@given(series=series)
def test_newton_steps(series: Series) -> None:
    """Against the definition: along the rows of one Jacobian, to solve with another."""
    problem = Problem(*series)
    dense, structured = problem.systems()
    scale, u = torch.rand(problem.dim) + 0.5, torch.randn(3, problem.dim)
    there = u + 0.1 * torch.randn(3, problem.dim)
    residual = torch.randn(3, problem.num_constraints)
    expected = dense.jacobian(u, scale).newton_step(dense.slopes(there, scale), residual)
    jacobian, slopes = structured.jacobian(u, scale), structured.slopes(there, scale)
    matrices = dense.jacobian_matrix(u, scale), dense.jacobian_matrix(there, scale)
    assert_same(jacobian.dense_slopes(slopes), matrices[1])
    accurate = projection_error(jacobian, torch.randn(3, problem.dim)) < 1e-11
    accurate &= projection_error(slopes, torch.randn(3, problem.dim)) < 1e-11
    accurate &= torch.linalg.cond(matrices[1] @ matrices[0].mT) < 1e4
    size = expected.norm(dim=-1, keepdim=True)
    found = jacobian.newton_step(slopes, residual) / size
    assert_same(found[accurate], (expected / size)[accurate])


@pytest.mark.parametrize("is_mixed", [False, True], ids=["own noise", "mixed noise"])
def test_trajectories(is_mixed: bool) -> None:
    problem = Problem(6, 2, 2, is_mixed, 5)
    systems = problem.systems()
    scale = torch.rand(problem.dim) + 0.5
    start = torch.randn(4, problem.dim)
    for _ in range(30):
        residual = systems[0].constraint(start, scale)
        start = start - systems[0].jacobian(start, scale).minimum_norm(residual)
    assert (systems[0].constraint(start, scale).abs() < 1e-11).all()
    momentum = torch.randn_like(start)
    settings = IntegratorSettings(
        quasi_newton, None, tolerances(problem.num_constraints, 1e-11), 1
    )
    ends = []
    for system in systems:
        point = system.point(start, scale)
        state = PhaseState(point, project_momentum(point.jacobian, momentum))
        status = torch.zeros(4, dtype=torch.long)
        for _ in range(6):
            state, info = leapfrog_step(system, scale, settings, state, 0.1, status)
            status = info.status
        assert (status == 0).all()
        ends.append(state)
    assert_same(ends[1].point.position, ends[0].point.position)
    assert_same(ends[1].momentum, ends[0].momentum)
    assert_same(ends[1].point.energy, ends[0].point.energy)


def test_noise_is_preferred_to_parameters() -> None:
    """Parameters have as many nonzeros as the noise of the first step, and come before it."""

    def constraint(u: Tensor) -> Tensor:
        y, outputs = u[1] + u[2], []
        for n in u[2:]:
            y = (u[0] * y).sin() + u[1] + n
            outputs.append(y)
        return torch.stack(outputs)

    (late, _) = find_triangles(find_pattern(constraint, torch.randn(3, 8)))
    assert late.columns.tolist() == [2, 3, 4, 5, 6, 7]
    assert late.others.tolist() == [0, 1]


@pytest.mark.parametrize("size", [2, 20])
def test_no_order_where_rows_depend_on_each_other(size: int) -> None:
    """A small block of such rows is fine, a large one is not."""
    mix = torch.randn(size, size + 2)
    triangles = find_triangles(find_pattern(lambda u: (mix @ u).sin(), torch.randn(2, size + 2)))
    assert [t.sizes.tolist() for t in triangles] == ([[2], [2]] if size == 2 else [])


def test_dependent_rows_have_no_order() -> None:
    pattern = find_pattern(lambda u: torch.stack([u[0], 2 * u[0].exp()]), torch.randn(2, 3))
    assert find_triangles(pattern) == []


@pytest.mark.parametrize("kind", ["singular", "nan"])
def test_a_bad_jacobian_is_marked_and_leaves_the_others_alone(kind: str) -> None:
    problem = Problem(4, 2, 1, True, 1)
    structure = problem.systems()[1].structure
    good = torch.stack(
        [
            torch.autograd.functional.jacobian(problem.constraint, u)
            for u in torch.randn(3, problem.dim)
        ]
    )
    bad, one = good.clone(), torch.ones(problem.dim)
    bad[1] = 0.0 if kind == "singular" else torch.nan
    expected, found = structure.factorize(good, one), structure.factorize(bad, one)
    assert not found.half_log_det_gram[1].isfinite()
    for part, reference in zip(found, expected, strict=True):
        if isinstance(part, Tensor):
            assert torch.equal(part[[0, 2]], reference[[0, 2]])
