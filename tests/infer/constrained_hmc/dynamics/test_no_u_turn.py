"""Trajectories that end where they turn back, against a recursive reference and exact draws."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from pyro_ext.infer.constrained_hmc.dynamics.integrator import (
    IntegratorSettings,
    PhaseState,
    leapfrog_step,
)
from pyro_ext.infer.constrained_hmc.dynamics.no_u_turn import no_u_turn_transition
from pyro_ext.infer.constrained_hmc.dynamics.projection import newton
from pyro_ext.infer.constrained_hmc.dynamics.status import Status
from pyro_ext.infer.constrained_hmc.dynamics.transitions import TransitionInfo
from pyro_ext.infer.constrained_hmc.system.constrained_system import (
    Point,
    project_momentum,
    total_energy,
)
from tests.infer.constrained_hmc.dynamics.test_transitions import CURVES, distribution, steep
from tests.infer.constrained_hmc.problems import (
    PROBLEMS,
    Problem,
    points_on,
    settings,
    system,
    tolerances,
)


def transition(
    problem: Problem, position: Tensor, step_size: float, max_tree_depth: int = 8, **how: Any
) -> tuple[Point, Point, TransitionInfo, Tensor]:
    """The point before, the point after, what happened, and the number of doublings."""
    one = torch.ones(problem.dim)
    batched = system(problem)
    before = batched.point(position, one)
    residual = batched.constraint(position, one).abs().amax(-1)
    chosen: IntegratorSettings = settings(problem, **how)
    after, info, depth = no_u_turn_transition(
        batched, one, chosen, before, residual, step_size, max_tree_depth
    )
    return before, after, info, depth


# -- the same tree, written recursively for one chain --------------------------------------------


class Leaf(NamedTuple):
    state: PhaseState
    log_weight: float
    log_uniform: float


class Reference:
    """
    One transition of one chain that keeps all its points in lists.

    Random numbers are drawn in the order of the implementation: a direction for every doubling, a
    number for every new point, and one for the choice between the halves.
    """

    def __init__(self, problem: Problem, how: IntegratorSettings) -> None:
        self.system, self.how = system(problem), how
        self.one = torch.ones(problem.dim)
        self.status, self.num_steps, self.accept_sum = 0, 0, 0.0

    def run(self, position: Tensor, step_size: float, max_depth: int) -> tuple[Tensor, int]:
        point = self.system.point(position, self.one)
        noise = torch.randn_like(position)
        start = PhaseState(point, project_momentum(point.jacobian, noise))
        self.energy = float(total_energy(*start))
        leaves = [Leaf(start, 0.0, 0.0)]
        draw = leaves[0]
        for depth in range(max_depth):
            is_forward = bool(torch.rand(1) < 0.5)
            self.step = step_size if is_forward else -step_size
            ordered = leaves if is_forward else leaves[::-1]
            new = self.build(ordered[-1].state, depth)
            log_uniform = float(torch.rand(1).log())
            if new is None:
                return draw.state.point.position, depth
            if log_uniform < log_total(new) - log_total(leaves):
                draw = choose(new)
            is_turned = turns(ordered, new)
            leaves = ordered + new if is_forward else (ordered + new)[::-1]
            if is_turned:
                return draw.state.point.position, depth + 1
        return draw.state.point.position, max_depth

    def build(self, state: PhaseState, depth: int) -> list[Leaf] | None:
        if depth == 0:
            return self.grow(state)
        first = self.build(state, depth - 1)
        second = None if first is None else self.build(first[-1].state, depth - 1)
        if first is None or second is None or turns(first, second):
            return None
        return first + second

    def grow(self, state: PhaseState) -> list[Leaf] | None:
        status = torch.zeros(1, dtype=torch.long)
        state, info = leapfrog_step(self.system, self.one, self.how, state, self.step, status)
        change = float(total_energy(*state)) - self.energy
        self.num_steps += 1
        log_uniform = float(torch.rand(1).log())
        self.status = int(info.status)
        if self.status == 0 and not abs(change) <= 1000:
            self.status = int(Status.DIVERGENT)
        if self.status != 0:
            return None
        self.accept_sum += min(1.0, float(np.exp(-change)))
        return [Leaf(state, -change, log_uniform)]


def log_total(leaves: list[Leaf]) -> float:
    return float(torch.tensor([leaf.log_weight for leaf in leaves]).logsumexp(0))


def choose(leaves: list[Leaf]) -> Leaf:
    """Each point replaces the choice so far in proportion to the weights so far."""
    chosen = leaves[0]
    for number, leaf in enumerate(leaves):
        if leaf.log_uniform < leaf.log_weight - log_total(leaves[: number + 1]):
            chosen = leaf
    return chosen


def turns(first: list[Leaf], second: list[Leaf]) -> bool:
    """Whether two stretches, joined, turn back: as a whole or across the joint."""
    stretches = [first + second, [*first, second[0]], [first[-1], *second]]
    for stretch in stretches:
        momenta = torch.cat([leaf.state.momentum for leaf in stretch])
        rho = momenta.sum(0)
        if bool(momenta[0] @ rho <= 0) or bool(momenta[-1] @ rho <= 0):
            return True
    return False


@pytest.mark.parametrize(
    ("name", "step_size", "max_depth"),
    [
        ("circle", 0.3, 5),
        ("ellipse", 0.1, 7),
        ("ellipse", 0.5, 7),
        ("quadrics", 0.15, 7),
        ("wavy", 0.05, 3),
        ("steep", 0.15, 7),
    ],
)
def test_a_recursive_reference_gives_the_same_draws(
    name: str, step_size: float, max_depth: int
) -> None:
    problem = steep() if name == "steep" else PROBLEMS[name]
    how = settings(problem, tols=tolerances(problem.num_constraints, 1e-12, max_iters=30))
    depths, statuses = set(), set()
    for seed, position in enumerate(points_on(problem, 6).unsqueeze(1)):
        reference = Reference(problem, how)
        torch.manual_seed(seed)
        expected, depth = reference.run(position, step_size, max_depth)
        torch.manual_seed(seed)
        _, point, info, tree_depth = transition(
            problem, position, step_size, max_depth, tols=how.tolerances
        )
        assert torch.equal(point.position, expected)
        assert int(tree_depth) == depth
        assert int(info.num_steps) == reference.num_steps
        assert int(info.status) == reference.status
        assert float(info.accept_prob) == pytest.approx(reference.accept_sum / info.num_steps)
        depths.add(depth)
        statuses.add(reference.status)
    assert len(depths) > 1 or max_depth == 3
    assert len(statuses) > 1 or name != "steep"


def test_chains_do_not_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chain with a stream of random numbers of its own: together as alone."""
    problem = steep()
    position = points_on(problem, 12)

    def run(chains: list[int]) -> tuple[Tensor, TransitionInfo, Tensor]:
        streams = [torch.Generator().manual_seed(i) for i in chains]

        def per_chain(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda like: torch.stack(
                [function(like.shape[1:], generator=stream) for stream in streams]
            )

        monkeypatch.setattr(torch, "randn_like", per_chain(torch.randn))
        monkeypatch.setattr(torch, "rand_like", per_chain(torch.rand))
        how = {"tols": tolerances(1, 1e-12, max_iters=30)}
        _, point, info, depth = transition(problem, position[chains], 0.15, **how)
        return point.position, info, depth

    together, info, depth = run(list(range(12)))
    assert len(set(depth.tolist())) > 2
    assert len(set(info.status.tolist())) > 1
    for i in range(12):
        alone, info_alone, depth_alone = run([i])
        torch.testing.assert_close(alone[0], together[i])
        assert int(depth_alone) == int(depth[i])
        for name in ("status", "num_steps", "is_accepted"):
            assert getattr(info_alone, name)[0] == getattr(info, name)[i]
        torch.testing.assert_close(info_alone.accept_prob[0], info.accept_prob[i])


# -- what a transition reports --------------------------------------------------------------------


def test_chains_that_stay_keep_their_points_bitwise() -> None:
    problem = steep()
    before, after, info, _ = transition(
        problem, points_on(problem, 60), 0.8, 2, projector=newton, tols=tolerances(1, max_iters=25)
    )
    stayed = ~info.is_accepted
    assert 3 <= int(stayed.sum()) <= 57
    for old, new in [
        (before.position, after.position),
        (before.energy, after.energy),
        *zip(before.jacobian, after.jacobian, strict=True),
    ]:
        assert torch.equal(old[stayed], new[stayed])
    assert ((after.position - before.position)[~stayed].abs().amax(-1) > 1e-3).all()


def test_draws_are_on_the_manifold_with_fresh_values() -> None:
    problem = PROBLEMS["quadrics"]
    _, after, info, depth = transition(problem, points_on(problem, 20), 0.2)
    one = torch.ones(4)
    residual = system(problem).constraint(after.position, one).abs().amax(-1)
    assert (residual <= 1e-13).all()
    assert (info.constraint_residual <= 1e-13).all()
    fresh = system(problem).point(after.position, one)
    torch.testing.assert_close(after.energy, fresh.energy)
    torch.testing.assert_close(after.gradient, fresh.gradient)
    assert (info.energy >= after.energy).all(), "the kinetic energy is missing"
    assert (info.num_steps >= 2**depth - 1).all(), "the kept part of the trajectory has as many"
    assert (info.num_steps < 2 ** (depth + 1)).all()


def test_trajectories_end_at_the_largest_depth() -> None:
    problem = PROBLEMS["circle"]
    _, _, info, depth = transition(problem, points_on(problem, 20), 1e-3, max_tree_depth=3)
    assert (depth == 3).all()
    assert (info.num_steps == 7).all()


def test_on_a_circle_trajectories_are_half_a_turn_to_a_turn() -> None:
    """There the motion is a rotation; at half a turn the sum of the momenta points inwards."""
    problem, step_size = PROBLEMS["circle"], 0.2
    _, after, info, depth = transition(problem, points_on(problem, 40), step_size, 6)
    speed = (2 * (info.energy - after.energy)).sqrt()
    angle = (step_size * speed).asin()  # of one step
    whole = angle * (2**depth - 1)
    is_done = (depth < 6) & (info.status == Status.CONVERGED)
    assert is_done.double().mean() > 0.5
    # half a turn would have ended it before the last doubling
    assert (whole >= np.pi - 2 * angle)[is_done].all()
    assert (whole <= 2 * np.pi + angle)[is_done].all()


def test_a_failed_step_ends_the_trajectory_and_is_reported() -> None:
    """From the circle along the tangent by more than its radius: no root."""
    problem = PROBLEMS["circle"]
    before, after, info, depth = transition(
        problem, points_on(problem, 60), 0.8, 5, tols=tolerances(1, max_iters=30)
    )
    failed = info.status == Status.NOT_CONVERGED
    assert 3 <= int(failed.sum()) <= 57
    at_once = failed & (info.num_steps == 1)
    assert at_once.any()
    assert torch.equal(after.position[at_once], before.position[at_once])
    assert (depth[at_once] == 0).all()
    assert (info.accept_prob[at_once] == 0).all()
    assert not info.is_accepted[at_once].any()
    later = failed & ~at_once
    # the energy on the circle is constant: all steps but the failed one count fully
    expected = 1 - 1 / info.num_steps
    torch.testing.assert_close(
        info.accept_prob[later], expected[later].double(), rtol=0, atol=1e-9
    )


# -- invariance: exact draws stay exact draws -----------------------------------------------------


@pytest.mark.parametrize("name", CURVES)
def test_exact_draws_stay_exact_draws(name: str) -> None:
    """Of many independent chains; steps are so long that acceptance is poor, and some fail."""
    problem, curve, parameter, limit = CURVES[name]
    edges, heights = distribution(problem, curve, limit)
    number = 1000
    # stratified, to take the noise out of the start
    levels = (np.arange(number) + 0.5) / number
    position = start = torch.as_tensor(curve(np.interp(levels, heights, edges)))
    for _ in range(2):
        _, point, info, depth = transition(
            problem,
            position,
            0.7 if name != "many sheets" else 0.25,
            4,
            projector=newton,
            tols=tolerances(1, 1e-12, max_iters=30),
        )
        position = point.position
    assert len(set(depth.tolist())) >= 3
    if name not in ("circle", "von Mises"):
        assert 0.3 < float(info.accept_prob.mean()) < 0.95
    if name == "many sheets":
        assert (info.status == Status.NON_REVERSIBLE).double().mean() > 0.02
    assert ((position - start).norm(dim=-1) > 0.1).double().mean() > 0.3
    uniform = np.interp(parameter(position.numpy()), edges, heights)
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3
    counts, _ = np.histogram(uniform, 25, (0.0, 1.0))
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
