"""Adaptation against Pyro's own dual averaging, plain variances and known crossings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.ops.dual_averaging import DualAveraging
from torch import Tensor

from pyro_ext.infer.constrained_hmc.warmup.adaptation import (
    RunningVariance,
    dual_averaging_final,
    dual_averaging_init,
    dual_averaging_update,
    find_reasonable_step_size,
    input_scale,
    running_variance_init,
    running_variance_update,
    time_scale,
    window_ends,
)

probabilities = st.floats(0.0, 1.0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    accept_probs=st.lists(probabilities, min_size=1, max_size=40),
    step_size=st.floats(1e-3, 4.0),
    target=st.floats(0.1, 0.95),
)
def test_dual_averaging_is_that_of_pyro(
    accept_probs: list[float], step_size: float, target: float
) -> None:
    ours = dual_averaging_init(step_size)
    theirs = DualAveraging(prox_center=math.log(10 * step_size))
    for accept_prob in accept_probs:
        ours = dual_averaging_update(ours, accept_prob, target)
        theirs.step(target - accept_prob)
        log_step_size, average = theirs.get_state()
        assert ours.log_step_size == pytest.approx(log_step_size, rel=1e-12, abs=1e-12)
        assert ours.log_step_size_average == pytest.approx(average, rel=1e-12, abs=1e-12)
    assert dual_averaging_final(ours) == pytest.approx(math.exp(average))


def test_dual_averaging_finds_the_step_size_of_a_target() -> None:
    """Acceptance ``exp(-h)``: 0.8 at ``-log 0.8``."""
    state = dual_averaging_init(3.0)
    for _ in range(2000):
        state = dual_averaging_update(state, math.exp(-math.exp(state.log_step_size)), 0.8)
    assert dual_averaging_final(state) == pytest.approx(-math.log(0.8), rel=0.05)


def test_without_updates_the_step_size_is_the_initial_one() -> None:
    assert dual_averaging_final(dual_averaging_init(0.3)) == pytest.approx(0.3)


@pytest.mark.parametrize("start", [1e-4, 0.01, 0.3, 3.0])
@pytest.mark.parametrize("target", [0.6, 0.9])
def test_a_reasonable_step_size_is_within_a_factor_of_two(start: float, target: float) -> None:
    crossing = -math.log(target)
    found = find_reasonable_step_size(lambda h: math.exp(-h), start, target)
    assert crossing / 2 <= found <= 2 * crossing
    # a power of two from the start
    assert math.log2(found / start) == pytest.approx(round(math.log2(found / start)))


@pytest.mark.parametrize(("accept_prob", "bound"), [(1.0, "largest"), (0.0, "smallest")])
def test_the_search_for_a_step_size_ends(accept_prob: float, bound: str) -> None:
    calls = []

    def constant(step_size: float) -> float:
        calls.append(step_size)
        return accept_prob

    found = find_reasonable_step_size(constant, 0.5, 0.8)
    assert len(calls) < 40
    assert 1e-6 <= found <= 4.0
    assert (found > 2.0) if bound == "largest" else (found < 2e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=8),
    dim=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_running_variance_is_the_variance(sizes: list[int], dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # far from zero, where a sum of squares would lose its digits
    batches = [1e4 + torch.randn(size, dim, generator=generator) for size in sizes]
    state = running_variance_init(dim, batches[0])
    for batch in batches:
        state = running_variance_update(state, batch)
    everything = torch.cat(batches)
    assert state.num_inputs == len(everything)
    torch.testing.assert_close(state.mean, everything.mean(0))
    variance = state.sum_squares / (state.num_inputs - 1)
    torch.testing.assert_close(variance, everything.var(0), rtol=1e-8, atol=1e-10)


def test_scales_without_data_are_one() -> None:
    state = running_variance_init(3, torch.zeros(1))
    torch.testing.assert_close(input_scale(state, state), torch.ones(3))
    one = running_variance_update(state, torch.randn(1, 3))
    assert input_scale(one, one).isfinite().all()
    assert (input_scale(one, one) > 0.5).all()


def variances(*samples: Tensor) -> list[RunningVariance]:
    empty = running_variance_init(samples[0].shape[-1], samples[0])
    return [running_variance_update(empty, sample) for sample in samples]


def test_scales_without_constraint_are_standard_deviations() -> None:
    width = torch.tensor([0.1, 1.0, 30.0])
    inputs, momenta = variances(5.0 + width * torch.randn(10_000, 3), torch.randn(10_000, 3))
    torch.testing.assert_close(input_scale(inputs, momenta), width, rtol=0.1, atol=0)
    expected = float((width.square().mean()).sqrt())
    assert time_scale(inputs, momenta, torch.ones(3)) == pytest.approx(expected, rel=0.1)
    assert time_scale(inputs, momenta, width) == pytest.approx(1.0, rel=0.1)


def test_a_standard_normal_on_a_subspace_needs_no_scales() -> None:
    """A hundred inputs that move with two, of which each varies little."""
    tangent = torch.linalg.qr(torch.randn(100, 2))[0]
    inputs, momenta = variances(
        torch.randn(4000, 2) @ tangent.mT, torch.randn(4000, 2) @ tangent.mT
    )
    scale = input_scale(inputs, momenta)
    torch.testing.assert_close(scale, torch.ones(100), rtol=0.1, atol=0)
    assert time_scale(inputs, momenta, torch.ones(100)) == pytest.approx(1.0, rel=0.1)


def test_inputs_that_do_not_move_keep_their_scale() -> None:
    """What the outputs determine alone varies by rounding and by the tolerance."""
    inputs, momenta = variances(1e-8 * torch.randn(50, 1), 1e-16 * torch.randn(50, 1))
    torch.testing.assert_close(input_scale(inputs, momenta), torch.ones(1))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(warmup_steps=st.integers(0, 5000))
def test_windows_lie_in_order_inside_the_warm_up(warmup_steps: int) -> None:
    ends = window_ends(warmup_steps)
    if warmup_steps < 20:
        assert ends == ()
        return
    start, middle, end = ends
    assert 0 < start < middle < end < warmup_steps
    assert start <= 0.15 * warmup_steps
    assert end <= 0.75 * warmup_steps
    # the second window is about twice as long
    assert abs((end - middle) - 2 * (middle - start)) <= 2


def test_windows_of_a_usual_warm_up() -> None:
    assert window_ends(1000) == (150, 350, 750)
