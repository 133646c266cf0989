"""Geometry of a step: reversible, volume-preserving, of second order, and on the manifold."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pyro_ext.infer.constrained_hmc.dynamics.integrator import PhaseState, StepInfo, leapfrog_step
from pyro_ext.infer.constrained_hmc.dynamics.projection import (
    Projector,
    hybrid,
    newton,
    quasi_newton,
)
from pyro_ext.infer.constrained_hmc.dynamics.status import Status
from pyro_ext.infer.constrained_hmc.system.constrained_system import System, total_energy
from tests.infer.constrained_hmc.problems import (
    PROBLEMS,
    Problem,
    phase_state,
    settings,
    system,
    tolerances,
)

each_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
each_solver = pytest.mark.parametrize(
    "projector", [quasi_newton, newton, hybrid], ids=["quasi-newton", "newton", "hybrid"]
)
each_inner = pytest.mark.parametrize("num_inner_steps", [1, 3], ids=["1-inner", "3-inner"])


def advance(
    problem: Problem,
    state: PhaseState,
    step_size: float,
    num_steps: int = 1,
    *,
    scale: Tensor | None = None,
    projector: Projector = quasi_newton,
    num_inner_steps: int = 1,
) -> tuple[PhaseState, StepInfo]:
    scale = torch.ones(problem.dim) if scale is None else scale
    status = torch.zeros(len(state.momentum), dtype=torch.long)
    chosen = settings(problem, projector=projector, num_inner_steps=num_inner_steps)
    for _ in range(num_steps):
        state, info = leapfrog_step(system(problem), scale, chosen, state, step_size, status)
        status = info.status
    return state, info


@each_inner
@each_solver
@each_problem
def test_reversible(problem: Problem, projector: Projector, num_inner_steps: int) -> None:
    start = phase_state(problem, 2)
    how = {"projector": projector, "num_inner_steps": num_inner_steps}
    end, info = advance(problem, start, 0.1, 3, **how)
    assert (info.status == Status.CONVERGED).all()
    assert ((end.point.position - start.point.position).norm(dim=-1) > 1e-3).all()
    back, _ = advance(problem, PhaseState(end.point, -end.momentum), 0.1, 3, **how)
    torch.testing.assert_close(back.point.position, start.point.position, rtol=0, atol=1e-9)
    torch.testing.assert_close(-back.momentum, start.momentum, rtol=0, atol=1e-9)
    # and by a negative step
    back, _ = advance(problem, end, -0.1, 3, **how)
    torch.testing.assert_close(back.point.position, start.point.position, rtol=0, atol=1e-9)


@each_inner
@each_problem
def test_stays_on_the_manifold_and_in_the_cotangent_space(
    problem: Problem, num_inner_steps: int
) -> None:
    end, info = advance(problem, phase_state(problem, 4), 0.1, 10, num_inner_steps=num_inner_steps)
    residual = system(problem).constraint(end.point.position, torch.ones(problem.dim)).abs()
    assert (residual <= 1e-13).all()
    assert (info.residual <= 1e-13).all()
    assert (end.point.jacobian.apply(end.momentum).abs() <= 1e-12).all()
    fresh = system(problem).point(end.point.position, torch.ones(problem.dim))
    torch.testing.assert_close(end.point.energy, fresh.energy)
    torch.testing.assert_close(end.point.gradient, fresh.gradient)


# charts: coordinates of the manifold, in which p . dq/dtau are the conjugate momenta
CHARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "circle": lambda t: torch.stack([t[0].cos(), t[0].sin()]),
    "ellipse": lambda t: torch.stack([2 * t[0].cos(), t[0].sin()]),
    "wavy": lambda t: torch.stack([t[0], t[1], t[0].sin() * (2 * t[1]).cos()]),
}
INVERSE_CHARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "circle": lambda q: torch.atan2(q[1], q[0]).reshape(1),
    "ellipse": lambda q: torch.atan2(q[1], q[0] / 2).reshape(1),
    "wavy": lambda q: q[:2],
}


@each_inner
@each_solver
@pytest.mark.parametrize("name", CHARTS)
def test_preserves_volume(name: str, projector: Projector, num_inner_steps: int) -> None:
    """The map of canonical coordinates of the cotangent bundle has determinant one."""
    problem, chart = PROBLEMS[name], CHARTS[name]
    one = torch.ones(problem.dim)

    def flow(z: Tensor) -> Tensor:
        coordinates, conjugate = z.chunk(2)
        tangents = torch.func.jacfwd(chart)(coordinates)
        velocity = torch.linalg.solve(tangents.mT @ tangents, conjugate)
        point = system(problem).point(chart(coordinates).unsqueeze(0), one)
        start = PhaseState(point, (tangents @ velocity).unsqueeze(0))
        end, info = advance(
            problem, start, 0.3, projector=projector, num_inner_steps=num_inner_steps
        )
        assert (info.status == Status.CONVERGED).all()
        coordinates = INVERSE_CHARTS[name](end.point.position[0])
        tangents = torch.func.jacfwd(chart)(coordinates)
        return torch.cat([coordinates, tangents.mT @ end.momentum[0]])

    size = 2 * (problem.dim - problem.num_constraints)
    z = torch.linspace(0.3, 0.7, size)
    step = 1e-5
    columns = [(flow(z + step * e) - flow(z - step * e)) / (2 * step) for e in torch.eye(size)]
    jacobian = torch.stack(columns, dim=1)
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1.0, abs=1e-7)
    assert (jacobian - torch.eye(size)).abs().max() > 0.01


@each_inner
@pytest.mark.parametrize("name", ["ellipse", "wavy", "quadrics"])
def test_energy_error_is_of_second_order(name: str, num_inner_steps: int) -> None:
    problem = PROBLEMS[name]
    start = phase_state(problem, 16, seed=2)
    before = total_energy(*start)
    errors = []
    for num_steps in (10, 20, 40):
        end, info = advance(
            problem, start, 0.8 / num_steps, num_steps, num_inner_steps=num_inner_steps
        )
        assert (info.status == Status.CONVERGED).all()
        errors.append(float((total_energy(*end) - before).square().mean().sqrt()))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[-1] > 1e-9, "an exact integrator would make the order meaningless"
    assert all(1.8 < order < 2.2 for order in orders), orders


def test_free_motion_on_a_circle_is_uniform_rotation() -> None:
    """With a constant energy the step is exact up to the length of the chord."""
    problem = PROBLEMS["circle"]
    point = system(problem).point(torch.tensor([[1.0, 0.0]]), torch.ones(2))
    start = PhaseState(point, torch.tensor([[0.0, 1.0]]))
    angle = math.asin(0.1)
    for num_inner_steps in (1, 4):
        end, _ = advance(problem, start, 0.1 * num_inner_steps, 3, num_inner_steps=num_inner_steps)
        turned = angle * 3 * num_inner_steps
        expected = torch.tensor([[math.cos(turned), math.sin(turned)]])
        torch.testing.assert_close(end.point.position, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(
            end.momentum, torch.tensor([[-math.sin(turned), math.cos(turned)]]), rtol=0, atol=1e-10
        )


@each_problem
def test_a_scale_is_a_change_of_coordinates(problem: Problem) -> None:
    scale = torch.rand(problem.dim) + 0.5
    rescaled = problem._replace(
        constraint=lambda q: problem.constraint(q * scale),
        potential=lambda q: problem.potential(q * scale),
    )
    start = phase_state(rescaled, 3)
    a, _ = advance(rescaled, start, 0.1, 3)
    b, _ = advance(problem, start, 0.1, 3, scale=scale)
    torch.testing.assert_close(a.point.position, b.point.position)
    torch.testing.assert_close(a.momentum, b.momentum)


@each_problem
def test_arguments_are_not_modified(problem: Problem) -> None:
    state = phase_state(problem, 3)
    status = torch.tensor([0, 2, 0])
    parts = [state.momentum, status, state.point.position, state.point.energy]
    parts += [state.point.gradient, *state.point.jacobian]
    copies = [part.clone() for part in parts]
    one = torch.ones(problem.dim)
    leapfrog_step(system(problem), one, settings(problem), state, 0.2, status)
    for part, copy in zip(parts, copies, strict=True):
        assert torch.equal(part, copy)


@each_problem
def test_chains_that_have_failed_stay_where_they_are(problem: Problem) -> None:
    state = phase_state(problem, 3)
    status = torch.tensor([0, int(Status.DIVERGENT), 0])
    one = torch.ones(problem.dim)
    chosen = settings(problem, fallback=hybrid)
    end, info = leapfrog_step(system(problem), one, chosen, state, 0.1, status)
    assert info.status.tolist() == [0, int(Status.DIVERGENT), 0]
    assert torch.equal(end.point.position[1], state.point.position[1])
    assert torch.equal(end.momentum[1], state.momentum[1])
    assert torch.equal(end.point.energy[1], state.point.energy[1])
    assert torch.equal(end.point.jacobian.matrix[1], state.point.jacobian.matrix[1])
    # the others move as they would have without it
    free, _ = leapfrog_step(
        system(problem), one, chosen, state, 0.1, torch.zeros(3, dtype=torch.long)
    )
    assert torch.equal(end.point.position[[0, 2]], free.point.position[[0, 2]])
    assert torch.equal(end.momentum[[0, 2]], free.momentum[[0, 2]])
    assert not torch.equal(free.point.position[1], state.point.position[1])


def test_a_projection_that_fails_is_reported() -> None:
    """From the circle along the tangent by more than its radius: no root."""
    problem = PROBLEMS["circle"]
    point = system(problem).point(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.ones(2))
    start = PhaseState(point, torch.tensor([[0.0, 0.5], [0.0, 1.5]]))
    end, info = advance(problem, start, 1.0)
    assert info.status.tolist() == [Status.CONVERGED, Status.NOT_CONVERGED]
    assert torch.equal(end.point.position[1], start.point.position[1])
    assert torch.equal(end.momentum[1], start.momentum[1])


def test_the_fallback_saves_chains_and_touches_no_other() -> None:
    """Steps so long that few iterations of the quasi-Newton method fail on some chains."""
    problem = PROBLEMS["circle"]
    angles = torch.linspace(0.1, 1.4, 12)
    point = system(problem).point(torch.tensor([1.0, 0.0]).expand(12, 2), torch.ones(2))
    start = PhaseState(point, torch.stack([torch.zeros(12), angles.sin()], dim=1))
    status = torch.zeros(12, dtype=torch.long)
    one = torch.ones(2)
    few = tolerances(1, 1e-11, max_iters=6)
    without = leapfrog_step(system(problem), one, settings(problem, tols=few), start, 1.0, status)
    chosen = settings(problem, fallback=hybrid, tols=few)
    with_ = leapfrog_step(system(problem), one, chosen, start, 1.0, status)
    ok, rescued = without[1].status == 0, with_[1].status == 0
    assert 0 < int(ok.sum()) < int(rescued.sum())
    assert torch.equal(with_[0].point.position[ok], without[0].point.position[ok])
    exact = torch.stack([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(with_[0].point.position[rescued], exact[rescued], rtol=0, atol=1e-8)
    assert (with_[1].iterations[rescued & ~ok] > without[1].iterations[rescued & ~ok]).all()


def steep() -> Problem:
    """A curve that normals cross several times."""
    return Problem(lambda u: u[1:] - 2 * (4 * u[:1]).sin(), lambda u: 0.5 * u.square().sum(), 2, 1)


def test_steps_that_cannot_be_retraced_are_found() -> None:
    """And every step that is let through can be."""
    problem = steep()
    start = phase_state(problem, 80)
    end, info = advance(problem, start, 0.5, projector=newton)
    counts = {status: int((info.status == status).sum()) for status in Status}
    assert counts[Status.NON_REVERSIBLE] >= 2
    assert counts[Status.CONVERGED] >= 5
    ok = info.status == Status.CONVERGED
    back, again = advance(problem, PhaseState(end.point, -end.momentum), 0.5, projector=newton)
    assert (again.status[ok] == Status.CONVERGED).all()
    torch.testing.assert_close(
        back.point.position[ok], start.point.position[ok], rtol=0, atol=1e-8
    )


def test_rank_lost_on_the_way_is_a_divergence() -> None:
    class Blind:
        """A system whose Jacobian is lost to the left of a point."""

        def __init__(self, inner: System) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Callable[..., object]:
            def method(position: Tensor, *others: object) -> object:
                value = getattr(self._inner, name)(position, *others)
                if name != "point":
                    return value
                lost = position[:, 0] < 0.999
                log_det = torch.where(lost, torch.nan, value.jacobian.half_log_det_gram)
                return value._replace(jacobian=value.jacobian._replace(half_log_det_gram=log_det))

            return method

    problem = PROBLEMS["circle"]
    point = system(problem).point(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.ones(2))
    start = PhaseState(point, torch.tensor([[0.0, 0.01], [0.0, 0.5]]))
    blind = Blind(system(problem))
    end, info = leapfrog_step(
        blind, torch.ones(2), settings(problem), start, 1.0, torch.zeros(2, dtype=torch.long)
    )  # type: ignore[arg-type]
    assert info.status.tolist() == [Status.CONVERGED, Status.DIVERGENT]
    assert torch.equal(end.point.position[1], start.point.position[1])


def test_iterations_count_both_directions() -> None:
    problem = PROBLEMS["quadrics"]
    state = phase_state(problem, 3)
    _, one = advance(problem, state, 0.1)
    _, three = advance(problem, state, 0.1, num_inner_steps=3)
    assert (one.iterations >= 4).all()
    assert (three.iterations > one.iterations).all()


@each_inner
def test_every_chain_can_have_a_step_of_its_own(num_inner_steps: int) -> None:
    """Chains in different directions at once; each goes where it would go alone."""
    problem = PROBLEMS["quadrics"]
    start = phase_state(problem, 3)
    steps = torch.tensor([0.1, -0.05, 0.02])
    one, status = torch.ones(problem.dim), torch.zeros(3, dtype=torch.long)
    chosen = settings(problem, num_inner_steps=num_inner_steps)
    end, info = leapfrog_step(system(problem), one, chosen, start, steps, status)
    assert (info.status == Status.CONVERGED).all()
    for i, step in enumerate(steps.tolist()):
        alone, _ = leapfrog_step(system(problem), one, chosen, start, step, status)
        torch.testing.assert_close(end.point.position[i], alone.point.position[i])
        torch.testing.assert_close(end.momentum[i], alone.momentum[i])
