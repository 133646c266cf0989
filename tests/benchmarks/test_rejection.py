"""Brute force against posteriors in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp, kstest, truncnorm
from torch import Tensor

from benchmarks.simulators import queue
from benchmarks.simulators.rejection import Box, draw_by_rejection

PRIOR = Box(torch.tensor([-4.0, 0.0]).double(), torch.tensor([4.0, 4.0]).double())
SCALE = torch.tensor([0.5, 0.3]).double()
MIX = torch.tensor([[1.0, 0.0], [0.7, 1.0]]).double()


def _noisy(theta: Tensor) -> Tensor:
    return theta + 0.2 * torch.randn(len(theta), 2)


@pytest.mark.parametrize("x", [[0.5, 1.5], [-1.0, -0.3]])
def test_linear_gaussian_in_a_box(x: list[float]) -> None:
    """The second posterior is cut off by the edge of the prior."""

    def simulate(theta: Tensor) -> Tensor:
        return (theta + SCALE * torch.randn(len(theta), 2)) @ MIX

    whole = torch.linalg.solve(MIX.T, torch.tensor(x))
    found = draw_by_rejection(simulate, PRIOR, torch.tensor(x), 400, 1_000_000, 8_000)
    assert found.draws.shape == (400, 2)
    assert found.ess > 4000
    for i in range(2):
        loc, scale = float(whole[i]), float(SCALE[i])
        ends = [(float(end[i]) - loc) / scale for end in PRIOR]
        exact = truncnorm(*ends, loc=loc, scale=scale)
        assert kstest(found.draws[:, i].numpy(), exact.cdf).pvalue > 1e-3


def test_regression_removes_what_the_tolerance_adds() -> None:
    """With every tenth simulation kept, draws would be far too wide without it."""
    x = torch.tensor([0.0, 2.0])
    draws = draw_by_rejection(_noisy, PRIOR, x, 500, 100_000, 20_000).draws
    np.testing.assert_allclose(draws.std(0).numpy(), 0.2, rtol=0.15)


def test_coordinates_of_the_queue_know_the_shortest_service() -> None:
    coordinates = queue._BelowMinimum()
    x = queue.QUEUE.observation().double()
    real = 10 * torch.randn(1000, 3)
    theta = coordinates.from_real(real, x)
    assert float(theta[:, 0].max()) <= float(x[0].exp()) < 1.1
    torch.testing.assert_close(
        coordinates.to_real(theta, x), real.clamp(max=13.8), atol=0.1, rtol=0
    )


def test_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match="num_simulations=0"):
        draw_by_rejection(_noisy, PRIOR, torch.zeros(2), 10, 0, 100)


def test_fast_simulations_of_the_queue_are_those_of_the_model() -> None:
    theta = torch.tensor([[1.0, 4.0, 0.2], [5.0, 2.0, 0.05]])
    rows = theta.repeat_interleave(2000, 0)
    noise = torch.rand(4000, queue.NUM_CUSTOMERS), torch.empty(4000, 50).exponential_()
    expected = queue.quantiles(queue.departure_gaps(rows, *noise)).log()
    found = queue._simulate(rows)
    for part in (slice(0, 2000), slice(2000, 4000)):
        for i in range(5):
            assert ks_2samp(found[part, i].numpy(), expected[part, i].numpy()).pvalue > 1e-4
