"""Energy and gradient of the target against autograd through the determinant and differences."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_ext.infer.constrained_hmc.system.constrained_system import (
    ConstrainedSystem,
    project_momentum,
    total_energy,
)
from tests.infer.constrained_hmc.problems import PROBLEMS, Problem, phase_state, points_on, system

each_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
each_mode = pytest.mark.parametrize("forward", [True, False], ids=["forward", "reverse"])


def energy_by_slogdet(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Eq. 4 of the paper, written down without any of the code under test."""

    def energy(u: Tensor) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(problem.constraint, u, create_graph=True)
        return problem.potential(u) + 0.5 * torch.linalg.slogdet(jacobian @ jacobian.mT)[1]

    return energy


@each_mode
@each_problem
def test_energy_and_gradient(problem: Problem, forward: bool) -> None:
    u = points_on(problem, 3) + 0.1 * torch.randn(3, problem.dim)
    point = system(problem, forward=forward).point(u, torch.ones(problem.dim))
    energy = energy_by_slogdet(problem)
    for i in range(3):
        leaf = u[i].clone().requires_grad_(True)
        value = energy(leaf)
        value.backward()
        torch.testing.assert_close(point.energy[i], value.detach())
        torch.testing.assert_close(point.gradient[i], leaf.grad)
        step = 1e-6
        differences = [
            (energy(u[i] + step * e) - energy(u[i] - step * e)) / (2 * step)
            for e in torch.eye(problem.dim)
        ]
        torch.testing.assert_close(
            point.gradient[i], torch.stack(differences), rtol=1e-6, atol=1e-7
        )


@each_problem
def test_forward_and_reverse_modes_agree(problem: Problem) -> None:
    u, scale = torch.randn(4, problem.dim), torch.rand(problem.dim) + 0.5
    a = system(problem, forward=True).point(u, scale)
    b = system(problem, forward=False).point(u, scale)
    torch.testing.assert_close(a.jacobian.matrix, b.jacobian.matrix)
    torch.testing.assert_close(a.energy, b.energy)
    torch.testing.assert_close(a.gradient, b.gradient)


@each_mode
@each_problem
def test_a_loop_over_chains_agrees_with_vmap(problem: Problem, forward: bool) -> None:
    u, scale = torch.randn(4, problem.dim), torch.rand(problem.dim) + 0.5
    batched = system(problem, forward=forward)
    looped = system(problem, vectorized=False, forward=forward)
    torch.testing.assert_close(looped.constraint(u, scale), batched.constraint(u, scale))
    torch.testing.assert_close(looped.jacobian_matrix(u, scale), batched.jacobian_matrix(u, scale))
    a, b = looped.point(u, scale), batched.point(u, scale)
    torch.testing.assert_close(a.energy, b.energy)
    torch.testing.assert_close(a.gradient, b.gradient)


@each_problem
def test_a_scale_is_a_change_of_coordinates(problem: Problem) -> None:
    """The same as the model written in terms of ``q = u / scale``."""
    scale = torch.rand(problem.dim) + 0.5
    rescaled = ConstrainedSystem(
        lambda q: problem.constraint(q * scale), lambda q: problem.potential(q * scale)
    )
    q, one = torch.randn(4, problem.dim), torch.ones(problem.dim)
    a, b = system(problem).point(q, scale), rescaled.point(q, one)
    torch.testing.assert_close(system(problem).constraint(q, scale), rescaled.constraint(q, one))
    torch.testing.assert_close(a.jacobian.matrix, b.jacobian.matrix)
    torch.testing.assert_close(a.energy, b.energy)
    torch.testing.assert_close(a.gradient, b.gradient)


@each_problem
def test_momenta_are_projected_orthogonally(problem: Problem) -> None:
    point, tangent = phase_state(problem, 4)
    momentum = torch.randn(4, problem.dim)
    projected = project_momentum(point.jacobian, momentum)
    torch.testing.assert_close(
        point.jacobian.apply(projected), torch.zeros(4, problem.num_constraints)
    )
    torch.testing.assert_close(project_momentum(point.jacobian, projected), projected)
    removed = momentum - projected
    torch.testing.assert_close((removed * tangent).sum(-1), torch.zeros(4), rtol=0, atol=1e-12)
    assert (removed.norm(dim=-1) > 1e-3).all()


def test_total_energy_adds_the_kinetic_energy() -> None:
    point, momentum = phase_state(PROBLEMS["quadrics"], 3)
    kinetic = torch.stack([0.5 * row @ row for row in momentum])
    torch.testing.assert_close(total_energy(point, momentum) - point.energy, kinetic)


def test_one_bad_chain_leaves_the_others_alone() -> None:
    problem = PROBLEMS["quadrics"]
    u = torch.randn(3, problem.dim)
    bad = u.clone()
    bad[1] = torch.nan
    one = torch.ones(problem.dim)
    expected, found = system(problem).point(u, one), system(problem).point(bad, one)
    assert not found.energy[1].isfinite()
    assert torch.equal(found.energy[[0, 2]], expected.energy[[0, 2]])
    assert torch.equal(found.gradient[[0, 2]], expected.gradient[[0, 2]])


def test_the_density_of_the_constraint_does_not_depend_on_its_units() -> None:
    """Rescaled constraints move the energy by a constant and leave the gradient alone."""
    problem = PROBLEMS["quadrics"]
    factors = torch.tensor([100.0, 0.01])
    rescaled = problem._replace(constraint=lambda u: factors * problem.constraint(u))
    u, one = torch.randn(3, 4), torch.ones(4)
    a, b = system(problem).point(u, one), system(rescaled).point(u, one)
    torch.testing.assert_close(b.energy - a.energy, factors.log().sum().expand(3))
    torch.testing.assert_close(b.gradient, a.gradient)
