"""Draws by inversion: their frequencies, and what may never be drawn."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from pyro_ext.ops.sampling import draw, draw_categorical


@pytest.mark.parametrize(
    "probs",
    [[0.2, 0.5, 0.3], [0.0, 0.9, 0.1, 0.0], [1.0], [0.01] * 100],
    ids=["three", "impossible ends", "one", "many"],
)
def test_frequencies_are_the_probabilities(probs: list[float]) -> None:
    expected, number = torch.tensor(probs), 20_000
    drawn = draw_categorical(expected.log().expand(number, -1))
    frequencies = drawn.bincount(minlength=len(probs)) / number
    scale = (expected * (1 - expected) / number).sqrt()
    assert ((frequencies - expected).abs() <= 5 * scale).all(), f"{frequencies} for {expected}"


@pytest.mark.parametrize("rand", [0.0, 1 - 2**-24], ids=["lowest", "highest"])
def test_impossible_categories_are_not_drawn_at_the_ends(
    monkeypatch: pytest.MonkeyPatch, float32: None, rand: float
) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, rand))
    probs = torch.softmax(torch.randn(1000, 7), -1)
    probs[:, [0, 3, 6]] = 0.0
    logits = (probs / probs.sum(-1, keepdim=True)).log()
    drawn = draw_categorical(logits)
    assert (drawn == (5 if rand == 0.0 else 1)).all()


@pytest.mark.parametrize("num_event_dims", [0, 1])
def test_values_look_like_those_of_the_distribution(num_event_dims: int) -> None:
    logits = torch.randn(4, 5, 3).requires_grad_()
    fn = dist.Categorical(logits=logits).to_event(num_event_dims)
    value, expected = draw(fn), fn.sample()
    assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
    assert not value.requires_grad
    assert fn.log_prob(value).isfinite().all()


@pytest.mark.parametrize(
    "fn",
    [dist.Normal(torch.zeros(3), 1.0), dist.Beta(torch.ones(2, 3), 2.0).to_event(1)],
    ids=["normal", "event"],
)
def test_other_distributions_draw_themselves(fn: dist.TorchDistribution) -> None:
    torch.manual_seed(0)
    drawn = draw(fn)
    torch.manual_seed(0)
    assert drawn.equal(fn.sample())
