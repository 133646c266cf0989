"""Logits of pairs: the network that the formula says, in chunks of any size, and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_ext.nn import PairLogits, pairs


def _reference(module: PairLogits, points: Tensor, clusters: Tensor) -> Tensor:
    """The formula, with the hidden layer of all pairs at once."""
    hidden = module.of_point(points).unsqueeze(-2) + module.of_cluster(clusters).unsqueeze(-3)
    return module.to_logit(torch.tanh(hidden)).squeeze(-1)


@pytest.mark.parametrize("chunk", [1, 200, 1 << 17])
@pytest.mark.parametrize(
    ("points_shape", "clusters_shape"),
    [((7, 2), (3, 4)), ((2, 7, 2), (5, 2, 3, 4)), ((5, 1, 7, 2), (4, 3, 4)), ((0, 7, 2), (3, 4))],
    ids=["plain", "particles", "broadcast", "empty"],
)
def test_values_and_gradients_are_those_of_the_formula(
    monkeypatch: pytest.MonkeyPatch,
    points_shape: tuple[int, ...],
    clusters_shape: tuple[int, ...],
    chunk: int,
) -> None:
    monkeypatch.setattr(pairs, "CHUNK", chunk)
    module = PairLogits(2, 4, hidden_features=6)
    points = torch.randn(points_shape, requires_grad=True)
    clusters = torch.randn(clusters_shape, requires_grad=True)
    inputs = [points, clusters, *module.parameters()]
    expected = _reference(module, points, clusters)
    actual = module(points, clusters)
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, inputs, direction)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, direction))


def test_data_need_no_gradient() -> None:
    module = PairLogits(2, 4)
    points = torch.randn(7, 2)
    logits = module(points, torch.randn(3, 4))
    logits.square().sum().backward()
    assert points.grad is None
    assert all(p.grad is not None for p in module.parameters())
    with torch.no_grad():
        assert not module(points, torch.randn(3, 4)).requires_grad


def test_large_arguments_stay_finite() -> None:
    module = PairLogits(2, 4)
    points = 1e6 * torch.randn(7, 2)
    logits = module(points, torch.randn(3, 4))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("numbers", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_numbers_of_features_are_positive(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="=0 must be positive"):
        PairLogits(*numbers)
