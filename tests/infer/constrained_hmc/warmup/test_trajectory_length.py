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
    end, start = trajectories.end - mean, trajectories.start - mean
    changes = (end.square() - start.square()).square().sum(-1) / 4
    weights = trajectories.accept_prob
    return float((weights * changes).sum() / weights.sum())


def test_lengths_follow_the_unit_of_time() -> None:
    state = length_adaptation_init(0.5, torch.randn(4, 2))
    longer = rescale_length(state, 3.0)
    assert math.exp(longer.log_length) == pytest.approx(1.5)
    assert math.exp(freeze_length(longer).log_length) == pytest.approx(1.5)


@pytest.mark.parametrize("length", [0.3, 1.2, 2.5])
def test_the_slope_is_the_derivative_of_the_log_criterion(length: float) -> None:
    start, momentum, mean = torch.randn(20, 3), torch.randn(20, 3), torch.randn(3)
    weights = torch.rand(20)
    step = 1e-6

    middle = math.log(length)

    def at(log_length: float) -> float:
        trajectories = oscillate(start, momentum, math.exp(log_length))
        return math.log(criterion(trajectories._replace(accept_prob=weights), mean))

    difference = (at(middle + step) - at(middle - step)) / (2 * step)
    trajectories = oscillate(start, momentum, length)._replace(accept_prob=weights)
    slope = relative_slope(trajectories, mean)
    assert slope == pytest.approx(difference, rel=1e-6)
    assert abs(difference) > 1e-3


def test_failed_trajectories_do_not_count() -> None:
    trajectories = oscillate(torch.randn(6, 2), torch.randn(6, 2), 0.7)
    good = Trajectories(*(part[:4] for part in trajectories[:4]), length=0.7)  # type: ignore[arg-type]
    bad = trajectories._replace(
        end=torch.cat([trajectories.end[:4], torch.full((2, 2), torch.nan)]),
        accept_prob=torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0]),
    )
    slope = relative_slope(bad, torch.zeros(2))
    assert slope == relative_slope(good, torch.zeros(2))
    assert slope is not None
    assert math.isfinite(slope)


def test_without_any_trajectory_the_length_stays() -> None:
    trajectories = oscillate(torch.randn(6, 2), torch.randn(6, 2), 0.7)
    failed = trajectories._replace(accept_prob=torch.zeros(6))
    state = length_adaptation_init(0.7, torch.randn(6, 2))
    after = length_adaptation_update(state, failed, torch.ones(2), 0.01, 10.0)
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
        state = length_adaptation_update(state, moved, scale, 0.01, 100.0)
    return state


@pytest.mark.parametrize("start", [0.1, 1.0])
@pytest.mark.parametrize(
    ("number", "num_chains"), [(120, 100), (300, 10), (1000, 1)], ids=["many", "some", "one"]
)
def test_a_normal_takes_about_a_quarter_turn(number: int, num_chains: int, start: float) -> None:
    """With many chains or few, wherever the mean is."""
    for dim, loc in ((1, 3.0), (10, 0.0)):
        state = adapt(number, num_chains, start, dim, 0.2 + torch.rand(dim), loc)
        assert math.exp(freeze_length(state).log_length) == pytest.approx(1.5, rel=0.15)


@pytest.mark.parametrize("radius", [0.2, 8.0])
def test_on_circles_the_length_follows_the_radius(radius: float) -> None:
    """Though the distance from the centre never changes."""
    state = length_adaptation_init(0.1 * radius, torch.zeros(30, 2))
    for i in range(200):
        angle, length = 2 * math.pi * torch.rand(30), math.exp(state.log_length)
        moved = rotate(angle, torch.randn(30), length * jitter_factor(0.5, i), radius)
        state = length_adaptation_update(state, moved, torch.ones(2), 0.01, 100.0)
    assert 0.8 * radius < math.exp(freeze_length(state).log_length) < 6 * radius


def test_the_length_stays_within_its_bounds() -> None:
    state = length_adaptation_init(0.5, torch.zeros(10, 2))
    for i in range(50):
        length = math.exp(state.log_length)
        moved = oscillate(torch.randn(10, 2), torch.randn(10, 2), length)
        longest = 0.6 if i < 40 else 0.4
        state = length_adaptation_update(state, moved, torch.ones(2), 0.1, longest)
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
