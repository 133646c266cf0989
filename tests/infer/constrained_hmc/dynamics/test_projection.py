"""Each solver against the definition of a projection; failures are flagged, never raised."""

import pytest
import torch
from torch import Tensor

from pyro_ext.infer.constrained_hmc.dynamics import projection
from pyro_ext.infer.constrained_hmc.dynamics.projection import (
    Equations,
    Projection,
    Projector,
    Tolerances,
    hybrid,
    newton,
    quasi_newton,
)
from pyro_ext.infer.constrained_hmc.jacobian.structure import DenseJacobian
from tests.infer.constrained_hmc.problems import PROBLEMS, Problem, phase_state, system, tolerances

each_solver = pytest.mark.parametrize(
    "solver", [quasi_newton, newton, hybrid], ids=["quasi-newton", "newton", "hybrid"]
)
each_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


def project(
    problem: Problem, solver: Projector, start: Tensor, jacobian: DenseJacobian, tols: Tolerances
) -> Projection:
    one = torch.ones(problem.dim, dtype=start.dtype)
    batched = system(problem)
    equations = Equations(
        lambda q: batched.constraint(q, one),
        lambda q, jacobian: batched.correction(q, one, jacobian),
        lambda q: batched.slopes(q, one),
    )
    return solver(
        equations,
        start,
        jacobian,
        tols,
    )


def free_step(
    problem: Problem, num_chains: int, step: float = 0.1
) -> tuple[Tensor, DenseJacobian]:
    """Where a short step along the cotangent space ends, off the manifold."""
    point, momentum = phase_state(problem, num_chains)
    return point.position + step * momentum, point.jacobian


@each_solver
@each_problem
def test_lands_on_the_manifold_along_the_old_normals(solver: Projector, problem: Problem) -> None:
    start, jacobian = free_step(problem, 4)
    tols = tolerances(problem.num_constraints, 1e-10)
    before = system(problem).constraint(start, torch.ones(problem.dim)).abs().amax(-1)
    assert (before > 1e-6).all(), "a start on the manifold tests nothing"
    result = project(problem, solver, start, jacobian, tols)
    assert result.is_converged.all()
    found = system(problem).constraint(result.position, torch.ones(problem.dim)).abs()
    assert (found <= 1e-10).all()
    torch.testing.assert_close(result.residual, found.amax(-1), rtol=0, atol=1e-10)
    # the correction is J^T lambda
    correction = start - result.position
    multipliers = torch.linalg.lstsq(jacobian.matrix.mT, correction.unsqueeze(-1)).solution
    again = (jacobian.matrix.mT @ multipliers).squeeze(-1)
    torch.testing.assert_close(again, correction, rtol=0, atol=1e-12)
    assert (result.iterations >= 1).all()


@each_problem
def test_solvers_find_the_same_root(problem: Problem) -> None:
    start, jacobian = free_step(problem, 4)
    tols = tolerances(problem.num_constraints, 1e-12)
    first, *others = (
        project(problem, solver, start, jacobian, tols).position
        for solver in (quasi_newton, newton, hybrid)
    )
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-10)


def test_newton_takes_fewer_iterations() -> None:
    problem = PROBLEMS["quadrics"]
    start, jacobian = free_step(problem, 8, 0.2)
    tols = tolerances(2, 1e-12)
    slow = project(problem, quasi_newton, start, jacobian, tols).iterations
    fast = project(problem, newton, start, jacobian, tols).iterations
    assert (fast < slow).all()


@each_solver
def test_on_a_circle_the_answer_is_known(solver: Projector) -> None:
    """From ``(1, 0)`` plus ``h`` along the tangent, the normal meets it at ``sqrt(1 - h^2)``."""
    problem = PROBLEMS["circle"]
    at = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    jacobian = system(problem).jacobian(at, torch.ones(2))
    start = at + 0.6 * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    result = project(problem, solver, start, jacobian, tolerances(1))
    expected = torch.tensor([[0.8, 0.6], [0.6, -0.8]])
    torch.testing.assert_close(result.position, expected, rtol=0, atol=1e-11)


@each_solver
def test_where_there_is_no_root_the_chain_is_flagged(solver: Projector) -> None:
    problem = PROBLEMS["circle"]
    at = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    jacobian = system(problem).jacobian(at, torch.ones(2))
    start = at + torch.tensor([[0.0, 1.5], [0.0, 0.5]])
    result = project(problem, solver, start, jacobian, tolerances(1))
    assert result.is_converged.tolist() == [False, True]
    torch.testing.assert_close(result.position[1], torch.tensor([0.75**0.5, 0.5]))


@each_solver
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e200], ids=["nan", "inf", "huge"])
def test_a_bad_chain_leaves_the_others_bitwise_unchanged(solver: Projector, value: float) -> None:
    problem = PROBLEMS["quadrics"]
    start, jacobian = free_step(problem, 3)
    bad = start.clone()
    bad[1] = value
    tols = tolerances(2, 1e-12)
    expected = project(problem, solver, start, jacobian, tols)
    found = project(problem, solver, bad, jacobian, tols)
    assert found.is_converged.tolist() == [True, False, True]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])


@pytest.mark.parametrize("solver", [quasi_newton, newton], ids=["quasi-newton", "newton"])
def test_iterations_are_limited(solver: Projector) -> None:
    problem = PROBLEMS["quadrics"]
    start, jacobian = free_step(problem, 3, 0.3)
    result = project(problem, solver, start, jacobian, tolerances(2, 1e-12, max_iters=1))
    assert not result.is_converged.any()
    assert (result.iterations == 2).all()


def test_a_runaway_is_stopped_early() -> None:
    """The iteration is ``u <- -u^3`` here; a residual that grew a thousandfold stays away."""
    problem = Problem(lambda u: u[:1] + u[:1] ** 3, lambda u: u.sum(), 2, 1)
    jacobian = system(problem).jacobian(torch.zeros(2, 2), torch.ones(2))
    start = torch.tensor([[10.0, 0.0], [0.5, 0.0]])
    tols = tolerances(1, 1e-12, max_iters=1000)
    result = project(problem, quasi_newton, start, jacobian, tols)
    assert result.is_converged.tolist() == [False, True]
    assert int(result.iterations[0]) < 5
    assert result.position.isfinite().all()


def test_a_singular_cross_gram_is_no_exception() -> None:
    """Newton's matrix at the start is exactly singular: the new normal is along the tangent."""
    problem = PROBLEMS["circle"]
    at = torch.tensor([[1.0, 0.0]])
    jacobian = system(problem).jacobian(at, torch.ones(2))
    result = project(problem, newton, torch.tensor([[0.0, 0.9]]), jacobian, tolerances(1))
    assert not bool(result.is_converged)


@each_solver
def test_arguments_are_not_modified(solver: Projector) -> None:
    problem = PROBLEMS["quadrics"]
    start, jacobian = free_step(problem, 3)
    copies = [t.clone() for t in (start, *jacobian)]
    project(problem, solver, start, jacobian, tolerances(2, 1e-12))
    for a, b in zip((start, *jacobian), copies, strict=True):
        assert torch.equal(a, b)


@each_solver
def test_single_precision(solver: Projector) -> None:
    problem = PROBLEMS["quadrics"]
    start, jacobian = free_step(problem, 4)
    narrow = DenseJacobian(*(part.float() for part in jacobian))
    eps = torch.finfo(torch.float32).eps
    tols = Tolerances(torch.full((2,), 1e-5), eps**0.51, 10 * eps**0.51, 50)
    result = project(problem, solver, start.float(), narrow, tols)
    assert result.position.dtype == torch.float32
    assert result.is_converged.all()
    assert (result.residual <= 1e-5).all()
    exact = project(problem, solver, start, jacobian, tolerances(2, 1e-12)).position
    torch.testing.assert_close(result.position.double(), exact, rtol=0, atol=1e-4)


def test_a_small_residual_alone_is_not_convergence() -> None:
    """In units of the input: an output in tiny units is near zero everywhere."""
    wide = PROBLEMS["circle"]
    problem = wide._replace(constraint=lambda u: 1e-12 * wide.constraint(u))
    at = torch.tensor([[1.0, 0.0]])
    jacobian = system(problem).jacobian(at, torch.ones(2))
    start = torch.tensor([[1.0, 0.6]])
    tols = Tolerances(torch.tensor([1e-9]), 1e-8, 1e-7, 200)
    for solver in (quasi_newton, newton, hybrid):
        result = project(problem, solver, start, jacobian, tols)
        assert bool(result.is_converged)
        torch.testing.assert_close(result.position, torch.tensor([[0.8, 0.6]]), rtol=0, atol=1e-7)


def test_large_problems_fall_back_on_newton(monkeypatch: pytest.MonkeyPatch) -> None:
    """MINPACK would factorise matrices of all outputs by all outputs."""
    problem = PROBLEMS["quadrics"]
    start, jacobian = free_step(problem, 3)
    expected = project(problem, newton, start, jacobian, tolerances(2, 1e-12))
    monkeypatch.setattr(projection, "_LARGEST_MATRIX", 7)
    monkeypatch.setattr(projection, "_hybrid_single", None)
    found = project(problem, hybrid, start, jacobian, tolerances(2, 1e-12))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
