"""Transitions leave the target invariant; whatever fails is a rejection with a status."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from pyro_ext.infer.constrained_hmc.dynamics.integrator import IntegratorSettings
from pyro_ext.infer.constrained_hmc.dynamics.projection import newton
from pyro_ext.infer.constrained_hmc.dynamics.status import Status
from pyro_ext.infer.constrained_hmc.dynamics.transitions import TransitionInfo, hmc_transition
from pyro_ext.infer.constrained_hmc.system.constrained_system import ConstrainedSystem, Point
from tests.infer.constrained_hmc.problems import (
    PROBLEMS,
    Problem,
    points_on,
    settings,
    system,
    tolerances,
)


def transition(
    problem: Problem,
    position: Tensor,
    step_size: float,
    num_steps: int,
    **how: Any,
) -> tuple[Point, Point, TransitionInfo]:
    """The point before, the point after, and what happened."""
    one = torch.ones(problem.dim)
    batched = system(problem)
    before = batched.point(position, one)
    residual = batched.constraint(position, one).abs().amax(-1)
    chosen: IntegratorSettings = settings(problem, **how)
    after, info, _ = hmc_transition(batched, one, chosen, before, residual, step_size, num_steps)
    return before, after, info


def test_rejected_chains_keep_their_points_bitwise() -> None:
    problem = PROBLEMS["quadrics"]
    before, after, info = transition(
        problem, points_on(problem, 40), 0.6, 3, tols=tolerances(2, max_iters=30)
    )
    rejected = ~info.is_accepted
    assert 3 <= int(rejected.sum()) <= 37
    for old, new in [
        (before.position, after.position),
        (before.energy, after.energy),
        (before.gradient, after.gradient),
        *zip(before.jacobian, after.jacobian, strict=True),
    ]:
        assert torch.equal(old[rejected], new[rejected])
    moved = (after.position - before.position).abs().amax(-1)
    assert (moved[info.is_accepted] > 1e-3).all()


def test_accepted_chains_are_on_the_manifold_with_fresh_values() -> None:
    problem = PROBLEMS["quadrics"]
    _, after, info = transition(problem, points_on(problem, 20), 0.2, 5)
    one = torch.ones(4)
    residual = system(problem).constraint(after.position, one).abs().amax(-1)
    assert (residual <= 1e-13).all()
    assert (info.constraint_residual <= 1e-13).all()
    fresh = system(problem).point(after.position, one)
    torch.testing.assert_close(after.energy, fresh.energy)
    torch.testing.assert_close(after.gradient, fresh.gradient)
    assert (info.energy >= after.energy).all(), "the kinetic energy is missing"
    assert (info.num_steps == 5).all()


def test_failed_projections_reject() -> None:
    problem = PROBLEMS["circle"]
    few = tolerances(1, max_iters=3)
    before, after, info = transition(problem, points_on(problem, 30), 0.8, 4, tols=few)
    failed = info.status == Status.NOT_CONVERGED
    assert failed.any()
    assert (info.accept_prob[failed] == 0).all()
    assert not info.is_accepted[failed].any()
    assert torch.equal(before.position[failed], after.position[failed])
    assert (info.num_steps[failed] >= 1).all()
    assert (info.num_steps[failed] <= 4).all()


def test_irreversible_steps_reject() -> None:
    problem = steep()
    before, after, info = transition(
        problem,
        points_on(problem, 80),
        0.5,
        1,
        projector=newton,
        tols=tolerances(1, max_iters=25),
    )
    failed = info.status == Status.NON_REVERSIBLE
    assert failed.any()
    assert not info.is_accepted[failed].any()
    assert torch.equal(before.position[failed], after.position[failed])


@pytest.mark.parametrize(
    "wall",
    [
        lambda u: torch.where(u[1] > 0.5, torch.nan, 0.0) * u[1],
        lambda u: torch.where(u[1] > 0.5, torch.inf, 0.0) + u[1],
        lambda u: torch.where(u[1] > 0.5, 1e4, 0.0) + u[1],
        lambda u: torch.where(u[1] > 0.5, -1e4, 0.0) + u[1],
    ],
    ids=["nan", "infinite", "cliff-up", "cliff-down"],
)
def test_energy_errors_beyond_reason_are_divergences(wall: Callable[[Tensor], Tensor]) -> None:
    problem = Problem(
        lambda u: u[:1] - u[1:] ** 2, lambda u: 0.5 * u.square().sum() + wall(u), 2, 1
    )
    position = torch.tensor([[0.16, 0.4]]).expand(40, 2).contiguous()
    before, after, info = transition(problem, position, 0.3, 1)
    divergent = info.status == Status.DIVERGENT
    assert 3 <= int(divergent.sum()) <= 37
    assert not info.is_accepted[divergent].any()
    assert (info.accept_prob[divergent] == 0).all()
    assert torch.equal(before.position[divergent], after.position[divergent])
    assert info.energy.isfinite().all()
    assert (after.position[:, 1] <= 0.5).all()


def test_all_failed_stops_the_trajectory() -> None:
    calls = []
    problem = PROBLEMS["circle"]

    class Counting(ConstrainedSystem):
        def point(self, position: Tensor, scale: Tensor) -> Point:
            calls.append(1)
            return super().point(position, scale)

    counting = Counting(problem.constraint, problem.potential)
    one = torch.ones(2)
    before = counting.point(points_on(problem, 4), one)
    calls.clear()
    chosen = settings(problem, tols=tolerances(1, max_iters=0))
    _, info, _ = hmc_transition(counting, one, chosen, before, torch.zeros(4), 0.5, 50)
    assert (info.status == Status.NOT_CONVERGED).all()
    assert (info.num_steps == 1).all()
    assert len(calls) == 1


def test_acceptance_probability_is_that_of_metropolis() -> None:
    """Of the trajectories of one step size, as many are accepted as the probabilities say."""
    problem = PROBLEMS["ellipse"]
    position = points_on(problem, 2000 // 50).repeat(50, 1)
    _, _, info = transition(problem, position, 0.7, 3)
    expected = float(info.accept_prob.mean())
    assert 0.2 < expected < 0.98
    error = float((info.accept_prob * (1 - info.accept_prob)).sum().sqrt()) / 2000
    assert abs(float(info.is_accepted.double().mean()) - expected) < 5 * error
    ok = info.status == Status.CONVERGED
    assert ((info.accept_prob >= 0) & (info.accept_prob <= 1)).all()
    assert (info.accept_prob[ok] > 0).all()


# -- invariance: exact draws stay exact draws ----------------------------------------------------


def steep() -> Problem:
    return Problem(lambda u: u[1:] - 2 * (4 * u[:1]).sin(), lambda u: 0.5 * u.square().sum(), 2, 1)


def _curve_ellipse(t: np.ndarray) -> np.ndarray:
    return np.stack([2 * np.cos(t), np.sin(t)], axis=-1)


def _curve_steep(t: np.ndarray) -> np.ndarray:
    return np.stack([t, 2 * np.sin(4 * t)], axis=-1)


def _curve_circle(t: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(t), np.sin(t)], axis=-1)


def _angle(q: np.ndarray) -> np.ndarray:
    return np.arctan2(q[:, 1], q[:, 0])


CURVES: dict[str, tuple[Problem, Callable[..., Any], Callable[..., Any], float]] = {
    "circle": (PROBLEMS["circle"], _curve_circle, _angle, math.pi),
    "von Mises": (
        PROBLEMS["circle"]._replace(potential=lambda u: -3 * u[0]), _curve_circle, _angle, math.pi
    ),
    "ellipse": (
        PROBLEMS["ellipse"],
        _curve_ellipse,
        lambda q: np.arctan2(q[:, 1], q[:, 0] / 2),
        math.pi,
    ),
    "many sheets": (steep(), _curve_steep, lambda q: q[:, 0], 6.0),
}  # fmt: skip


def distribution(
    problem: Problem, curve: Callable[[np.ndarray], np.ndarray], limit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Distribution function of the curve's parameter, by quadrature of eq. 4 of the paper."""
    edges = np.linspace(-limit, limit, 100_001)
    middle = 0.5 * (edges[1:] + edges[:-1])
    q = torch.as_tensor(curve(middle))
    normal = torch.func.vmap(torch.func.jacrev(problem.constraint))(q).squeeze(1).norm(dim=-1)
    potential = torch.func.vmap(problem.potential)(q)
    length = np.linalg.norm(np.diff(curve(edges), axis=0), axis=-1)
    weights = (-potential).exp().numpy() / normal.numpy() * length
    return edges, np.concatenate([[0.0], np.cumsum(weights)]) / weights.sum()


@pytest.mark.parametrize("inner", [1, 2], ids=["1-inner", "2-inner"])
@pytest.mark.parametrize("name", CURVES)
def test_exact_draws_stay_exact_draws(name: str, inner: int) -> None:
    """Of many independent chains; steps are so long that many are rejected, and some fail."""
    problem, curve, parameter, limit = CURVES[name]
    edges, heights = distribution(problem, curve, limit)
    number = 2000
    # stratified, to take the noise out of the start
    levels = (np.arange(number) + 0.5) / number
    position = torch.as_tensor(curve(np.interp(levels, heights, edges)))
    start = position
    for _ in range(2):
        _, point, info = transition(
            problem,
            position,
            0.9 if name != "many sheets" else 0.4,
            2,
            projector=newton,
            num_inner_steps=inner,
            tols=tolerances(1, 1e-12, max_iters=30),
        )
        position = point.position
    if name not in ("circle", "von Mises"):
        assert 0.05 < float(info.is_accepted.double().mean()) < 0.95
    if name == "many sheets":
        assert (info.status == Status.NON_REVERSIBLE).double().mean() > 0.02
    assert ((position - start).norm(dim=-1) > 0.1).double().mean() > 0.3
    uniform = np.interp(parameter(position.numpy()), edges, heights)
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3
    counts, _ = np.histogram(uniform, 40, (0.0, 1.0))
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_from_one_point_to_the_whole_circle() -> None:
    problem = PROBLEMS["circle"]
    position = torch.tensor([[1.0, 0.0]]).repeat(500, 1)
    for _ in range(8):
        few = tolerances(1, max_iters=20)
        _, point, _ = transition(problem, position, 0.5, 3, projector=newton, tols=few)
        position = point.position
    angle = torch.atan2(position[:, 1], position[:, 0]).numpy()
    assert scipy.stats.kstest(angle / (2 * math.pi) + 0.5, "uniform").pvalue > 1e-3
