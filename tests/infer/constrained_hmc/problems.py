"""Small constrained systems with the numbers that the tests of each layer need."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ext.infer.constrained_hmc.dynamics.integrator import IntegratorSettings, PhaseState
from pyro_ext.infer.constrained_hmc.dynamics.projection import Projector, Tolerances, quasi_newton
from pyro_ext.infer.constrained_hmc.system.constrained_system import (
    ConstrainedSystem,
    project_momentum,
)

__all__ = [
    "PROBLEMS",
    "Problem",
    "phase_state",
    "points_on",
    "settings",
    "system",
    "tolerances",
]


class Problem(NamedTuple):
    """A constraint and a potential, both of one input."""

    constraint: Callable[[Tensor], Tensor]
    potential: Callable[[Tensor], Tensor]
    dim: int
    num_constraints: int


def _normal(u: Tensor) -> Tensor:
    return 0.5 * u.square().sum()


def _two_sheets(u: Tensor) -> Tensor:
    return torch.stack([u[0] * u[1] + u[2].sin(), u[3].square() + u[0].square() - 2])


PROBLEMS = {
    "circle": Problem(lambda u: u.square().sum(0, keepdim=True) - 1, _normal, 2, 1),
    "ellipse": Problem(
        lambda u: (u[:1] / 2).square() + u[1:].square() - 1,
        lambda u: _normal(u) + u[0] + 0.3 * u[1].sin(),
        2,
        1,
    ),
    "wavy": Problem(
        lambda u: (u[2] - u[0].sin() * (2 * u[1]).cos()).reshape(1),
        lambda u: _normal(u) + 0.1 * u[0] ** 4 + u[1] * u[2],
        3,
        1,
    ),
    "quadrics": Problem(_two_sheets, lambda u: _normal(u) + 0.1 * u[0] ** 4, 4, 2),
}


def system(
    problem: Problem, *, vectorized: bool = True, forward: bool = True
) -> ConstrainedSystem:
    return ConstrainedSystem(
        problem.constraint, problem.potential, vectorized=vectorized, forward=forward
    )


def points_on(problem: Problem, num_chains: int, seed: int = 0) -> Tensor:
    """Random points, moved onto the manifold one by one by Gauss-Newton steps."""
    # not the seed of the test itself, whose momenta would then be the same numbers
    generator = torch.Generator().manual_seed(1000 + seed)
    points: list[Tensor] = []
    while len(points) < num_chains:
        u = torch.randn(problem.dim, generator=generator)
        for _ in range(60):
            jacobian = torch.autograd.functional.jacobian(problem.constraint, u)
            u = u - torch.linalg.pinv(jacobian) @ problem.constraint(u)
        if bool((problem.constraint(u).abs() < 1e-14).all()):
            points.append(u)
    return torch.stack(points)


def phase_state(problem: Problem, num_chains: int, seed: int = 0) -> PhaseState:
    """Points on the manifold with random momenta in their cotangent spaces."""
    position = points_on(problem, num_chains, seed)
    point = system(problem).point(position, torch.ones(problem.dim))
    generator = torch.Generator().manual_seed(2000 + seed)
    momentum = torch.randn(position.shape, generator=generator)
    return PhaseState(point, project_momentum(point.jacobian, momentum))


def tolerances(
    num_constraints: int, constraint: float = 1e-13, max_iters: int = 200
) -> Tolerances:
    return Tolerances(
        constraint=torch.full((num_constraints,), constraint),
        position=10 * constraint,
        reverse=1e4 * constraint,
        max_iters=max_iters,
    )


def settings(
    problem: Problem,
    *,
    projector: Projector = quasi_newton,
    fallback: Projector | None = None,
    num_inner_steps: int = 1,
    tols: Tolerances | None = None,
) -> IntegratorSettings:
    return IntegratorSettings(
        projector=projector,
        fallback=fallback,
        tolerances=tolerances(problem.num_constraints) if tols is None else tols,
        num_inner_steps=num_inner_steps,
    )
