"""Adaptation of the trajectory length, on motions that are known exactly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_ext.infer.constrained_hmc.warmup.trajectory_length import (
    LengthAdaptation,
    Trajectories,
    changes_of,
    freeze_length,
    jitter_factor,
    length_adaptation_init,
    length_adaptation_update,
    plan_trajectory,
    relative_slope,
    rescale_length,
)


def oscillate(start: Tensor, momentum: Tensor, length: float) -> Trajectories:
    """Trajectories of a standard normal, all accepted."""
    return Trajectories(
        start=start,
        end=start * math.cos(length) + momentum * math.sin(length),
        momentum=momentum * math.cos(length) - start * math.sin(length),
        accept_prob=torch.ones(len(start)),
        length=length,
    )


def rotate(angle: Tensor, speed: Tensor, length: float, radius: float) -> Trajectories:
    """Free motion on circles around the origin."""
    after = angle + speed * length / radius
    return Trajectories(
        start=radius * torch.stack([angle.cos(), angle.sin()], -1),
        end=radius * torch.stack([after.cos(), after.sin()], -1),
        momentum=speed.unsqueeze(-1) * torch.stack([-after.sin(), after.cos()], -1),
        accept_prob=torch.ones(len(angle)),
        length=length,
    )


def criterion(trajectories: Trajectories, mean: Tensor) -> float:
    """Geometric mean of the two changes, without anything that the length leaves as it is."""
    end, start = trajectories.end - mean, trajectories.start - mean
    weights = trajectories.accept_prob.unsqueeze(-1)
    jump = (weights * (end - start).square()).sum()
    square_jump = (weights * (end.square() - start.square()).square()).sum()
    return float(jump ** (2 / 3) * square_jump ** (1 / 3))


def test_lengths_follow_the_unit_of_time() -> None:
    state = length_adaptation_init(0.5, torch.randn(4, 2))
    longer = rescale_length(state, 3.0)
    assert math.exp(longer.log_length) == pytest.approx(1.5)
    assert math.exp(freeze_length(longer).log_length) == pytest.approx(1.5)


@pytest.mark.parametrize(
    "length", [0.3, 1.2, 2.5], ids=["short", "a quarter turn", "longer than that"]
)
def test_the_slope_is_the_derivative_of_the_log_criterion(length: float) -> None:
    start, momentum, mean = torch.randn(20, 3), torch.randn(20, 3), torch.randn(3)
    weights = torch.rand(20)
    step = 1e-6

    def at(log_length: float) -> Trajectories:
        return oscillate(start, momentum, math.exp(log_length))._replace(accept_prob=weights)

    middle = math.log(length)
    before, after = criterion(at(middle - step), mean), criterion(at(middle + step), mean)
    difference = (math.log(after) - math.log(before)) / (2 * step)
    slope = relative_slope(changes_of(at(middle), mean))
    assert slope == pytest.approx(difference, rel=1e-6)
    assert abs(difference) > 1e-3


@pytest.mark.parametrize("length", [0.4, 1.0, math.pi / 2])
def test_changes_are_one_minus_correlations(length: float) -> None:
    """Exactly for the inputs; squares of a standard normal have two thirds of their spread."""
    trajectories = oscillate(torch.randn(400_000, 1), torch.randn(400_000, 1), length)
    changes = changes_of(trajectories, torch.zeros(1))
    assert changes.jump == pytest.approx(1 - math.cos(length), abs=0.01)
    assert changes.square_jump == pytest.approx(2 / 3 * (1 - math.cos(length) ** 2), abs=0.01)


def test_failed_trajectories_change_nothing() -> None:
    trajectories = oscillate(torch.randn(6, 2), torch.randn(6, 2), 0.7)
    weights = torch.tensor([1.0, 1.0, 0.5, 1.0, 0.0, 0.0])
    bad = trajectories._replace(
        end=torch.cat([trajectories.end[:4], torch.full((2, 2), torch.nan)]),
        momentum=torch.cat([trajectories.momentum[:4], torch.full((2, 2), torch.inf)]),
        accept_prob=weights,
    )
    good = Trajectories(
        trajectories.start[:4], trajectories.end[:4], trajectories.momentum[:4], weights[:4], 0.7
    )
    changes = changes_of(bad, torch.zeros(2))
    assert changes == pytest.approx(changes_of(good, torch.zeros(2)))
    certain = changes_of(good._replace(accept_prob=torch.ones(4)), torch.zeros(2))
    assert changes.jump < certain.jump


def test_chains_that_do_not_move_have_no_slope() -> None:
    start = torch.randn(6, 2)
    still = Trajectories(start, start, torch.zeros(6, 2), torch.ones(6), 0.7)
    assert relative_slope(changes_of(still, torch.zeros(2))) == 0
    at_the_mean = still._replace(start=torch.zeros(6, 2), end=torch.zeros(6, 2))
    assert relative_slope(changes_of(at_the_mean, torch.zeros(2))) == 0


def test_trajectories_from_far_away_do_not_outweigh_later_ones() -> None:
    """Starting a hundred times as far out as the posterior is wide."""
    found = []
    for distance in (100.0, 1.0):
        state = length_adaptation_init(0.1, torch.zeros(30, 2))
        for i in range(40):
            start = torch.randn(30, 2) * (distance if i < 5 else 1.0)
            moved = oscillate(start, torch.randn(30, 2), math.exp(state.log_length))
            state = length_adaptation_update(state, moved, torch.ones(2), 0.02, 100.0)
        found.append(state.log_length)
    assert found[0] == pytest.approx(found[1], abs=0.3)


def test_without_any_trajectory_the_length_stays() -> None:
    trajectories = oscillate(torch.randn(6, 2), torch.randn(6, 2), 0.7)
    failed = trajectories._replace(accept_prob=torch.zeros(6))
    state = length_adaptation_init(0.7, torch.randn(6, 2))
    after = length_adaptation_update(state, failed, torch.ones(2), 0.02, 10.0)
    assert after.log_length == state.log_length
    assert after.log_length_average == state.log_length


def adapt(
    number: int, num_chains: int, start: float, dim: int, scale: Tensor, loc: float = 0.0
) -> LengthAdaptation:
    """On independent draws of a standard normal around a point, in scaled coordinates."""
    state = length_adaptation_init(start, loc * scale + torch.zeros(num_chains, dim))
    for i in range(number):
        length = math.exp(state.log_length) * jitter_factor(0.5, i)
        moved = oscillate(torch.randn(num_chains, dim), torch.randn(num_chains, dim), length)
        moved = moved._replace(start=moved.start + loc, end=moved.end + loc)
        state = length_adaptation_update(state, moved, scale, 0.02, 100.0)
    return state


@pytest.mark.parametrize("start", [0.1, 1.0])
@pytest.mark.parametrize(
    ("number", "num_chains", "dims"),
    [(120, 100, (1, 10)), (300, 10, (1, 10)), (500, 1, (2, 10))],
    ids=["many", "some", "one"],
)
def test_a_normal_takes_about_a_quarter_turn(
    number: int, num_chains: int, dims: tuple[int, int], start: float
) -> None:
    """With many chains or few, wherever the mean is; somewhat less, for it is shorter."""
    for dim, loc in zip(dims, (3.0, 0.0), strict=True):
        state = adapt(number, num_chains, start, dim, 0.2 + torch.rand(dim), loc)
        assert math.exp(freeze_length(state).log_length) == pytest.approx(1.44, rel=0.15)


def adapt_on_circle(radius: float, start: float, num_chains: int, step_size: float) -> float:
    """On free motion along a circle, in units of its radius."""
    state = length_adaptation_init(start * radius, torch.zeros(num_chains, 2))
    for i in range(200):
        angle, length = 2 * math.pi * torch.rand(num_chains), math.exp(state.log_length)
        speed = torch.randn(num_chains)
        moved = rotate(angle, speed, length * jitter_factor(0.5, i), radius)
        state = length_adaptation_update(
            state, moved, torch.ones(2), step_size * radius, 50 * radius
        )
    return math.exp(freeze_length(state).log_length) / radius


@pytest.mark.parametrize("num_chains", [30, 4], ids=["many", "some"])
@pytest.mark.parametrize("start", [0.1, 6.0], ids=["from below", "from a later turn"])
@pytest.mark.parametrize("radius", [0.2, 8.0])
def test_on_circles_the_length_follows_the_radius(
    radius: float, start: float, num_chains: int
) -> None:
    """
    Though the distance from the centre never changes, and more turns are as good as one.

    Over a length of s radii, without jitter, 1 - exp(-s^2 / 2) is the change of means and
    1 - exp(-2 s^2) that of squares, up to a factor, which makes s = 1.23 the best.
    """
    assert 0.95 < adapt_on_circle(radius, start, num_chains, 0.02) < 1.6


def test_long_steps_make_longer_trajectories() -> None:
    """Because a trajectory takes a whole number of them."""
    short, long = (adapt_on_circle(1.0, 0.75, 100, step_size) for step_size in (0.02, 1.5))
    assert 1.1 * short < long < 2 * short


def test_the_length_stays_within_its_bounds() -> None:
    state = length_adaptation_init(0.5, torch.zeros(10, 2))
    for i in range(50):
        length = math.exp(state.log_length)
        moved = oscillate(torch.randn(10, 2), torch.randn(10, 2), length)
        longest = 0.6 if i < 40 else 0.4
        state = length_adaptation_update(state, moved, torch.ones(2), 0.2, longest)
        assert math.exp(state.log_length) <= longest * (1 + 1e-12)
    assert 0.4 < math.exp(freeze_length(state).log_length) < 0.6


@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.9])
def test_jitter_fills_its_interval_evenly(jitter: float) -> None:
    factors = torch.tensor([jitter_factor(jitter, i) for i in range(63)])
    expected = 1 + jitter * torch.linspace(-1, 1, 65)[1:-1]
    torch.testing.assert_close(factors.sort().values, expected)
    # and every stretch of it too
    assert (factors.unfold(0, 8, 8).mean(-1) - 1).abs().max() < 0.15 * max(jitter, 1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    length=st.floats(1e-3, 1e3),
    step_size=st.floats(1e-3, 10.0),
    max_num_steps=st.integers(1, 2000),
)
def test_plans_cover_the_length_in_the_fewest_steps(
    length: float, step_size: float, max_num_steps: int
) -> None:
    size, number = plan_trajectory(length, step_size, max_num_steps)
    assert 1 <= number <= max_num_steps
    assert 0 < size <= step_size
    assert size * number <= length * (1 + 1e-9)
    if number < max_num_steps:
        assert size * number == pytest.approx(length, rel=1e-6)
        assert (number - 1) * step_size < length
