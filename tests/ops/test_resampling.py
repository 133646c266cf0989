"""Ancestors in proportion to their weights, in each column on its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_ext.ops.resampling import (
    RESAMPLERS,
    effective_sample_size,
    log_mean_exp,
    systematic,
    take_particles,
)

WEIGHTS = torch.tensor([[0.5, 0.0, 0.2, 0.3], [0.1, 0.1, 0.8, 0.0]], dtype=torch.float64).T


def _counts(ancestors: Tensor, num_particles: int) -> Tensor:
    return torch.stack([(ancestors == i).sum(0) for i in range(num_particles)])


@pytest.mark.parametrize("name", sorted(RESAMPLERS))
@pytest.mark.parametrize("num_samples", [4, 7])
def test_offspring_is_proportional_to_weight(name: str, num_samples: int) -> None:
    num_columns = 20_000
    log_weights = WEIGHTS.log().unsqueeze(-1).expand(4, 2, num_columns) + 300.0
    counts = _counts(RESAMPLERS[name](log_weights, num_samples), 4).double()
    expected = num_samples * WEIGHTS
    error = counts.std(-1) / math.sqrt(num_columns)
    assert counts.sum(0).eq(num_samples).all()
    assert ((counts.mean(-1) - expected).abs() <= 5 * error + 1e-12).all()
    assert counts[1, 0].eq(0).all(), "a particle of weight zero has offspring"
    assert counts[3, 1].eq(0).all(), "a particle of weight zero has offspring"


def test_systematic_offspring_is_as_even_as_can_be() -> None:
    log_weights = torch.randn(10, 500)
    expected = 10 * torch.softmax(log_weights, 0)
    counts = _counts(systematic(log_weights, 10), 10)
    assert ((counts - expected).abs() < 1).all()


@pytest.mark.parametrize("name", sorted(RESAMPLERS))
def test_one_particle_with_all_weight_is_the_only_ancestor(name: str) -> None:
    log_weights = torch.full((6, 50), -torch.inf)
    chosen = torch.randint(0, 6, (50,))
    log_weights[chosen, torch.arange(50)] = -1e4
    assert (RESAMPLERS[name](log_weights, 6) == chosen).all()


@pytest.mark.parametrize("batch", [(), (3,), (3, 2)], ids=str)
def test_values_follow_their_ancestors(batch: tuple[int, ...]) -> None:
    value, other = torch.randn(5, *batch, 4, 2), torch.randn(5, *batch)
    ancestors = torch.randint(0, 5, (7, *batch))
    taken, other_taken = take_particles(ancestors, value, other)
    index = ancestors.reshape(*ancestors.shape, 1, 1).expand(taken.shape)
    assert torch.equal(taken, value.gather(0, index))
    assert torch.equal(other_taken, other.gather(0, ancestors))


def test_effective_sample_size_is_between_one_and_all() -> None:
    torch.testing.assert_close(effective_sample_size(torch.zeros(7)), torch.tensor(7.0))
    one = torch.tensor([0.0, -torch.inf])
    torch.testing.assert_close(effective_sample_size(one), torch.tensor(1.0))
    half = torch.tensor([[0.0, 1.0], [0.0, 1.0], [-torch.inf, -torch.inf]])
    torch.testing.assert_close(effective_sample_size(half), torch.tensor([2.0, 2.0]))


def test_log_mean_exp() -> None:
    values = torch.randn(4, 3)
    torch.testing.assert_close(log_mean_exp(values + 800), values.exp().mean(0).log() + 800)
