"""Statistics of data sets: sums over points, whatever their order and padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_ext.nn import NormalHead, PointwiseStatistics, SoftMoments


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


MODULES = {
    "pointwise": lambda: PointwiseStatistics(_network(), start_at_prior=False),
    "moments": lambda: SoftMoments(3, 4, 2),
}
modules = pytest.mark.parametrize("name", MODULES)


@modules
def test_data_sets_add_up_in_any_order(name: str) -> None:
    module = MODULES[name]()
    features = torch.randn(2, 10, 3)
    whole = module(features)
    torch.testing.assert_close(whole, module(features[:, :4]) + module(features[:, 4:]))
    torch.testing.assert_close(whole, module(features[:, torch.randperm(10)]))
    torch.testing.assert_close(2 * whole, module(torch.cat([features, features], -2)))


@modules
@pytest.mark.parametrize("padding", [0.0, 1e30, torch.nan], ids=str)
def test_padding_adds_nothing(name: str, padding: float) -> None:
    module = MODULES[name]()
    features = torch.randn(2, 10, 3)
    mask = torch.arange(10) < torch.tensor([[10], [6]])
    padded = torch.where(mask.unsqueeze(-1), features, padding)
    result = module(padded, mask)
    torch.testing.assert_close(result[0], module(features[0]))
    torch.testing.assert_close(result[1], module(features[1, :6]))
    result.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in module.parameters())


def test_statistics_start_at_the_prior_and_can_leave_it() -> None:
    module = PointwiseStatistics(_network())
    features = torch.randn(5, 10, 3)
    assert (module(features) == 0).all()
    loc, scale = NormalHead(1.0, 2.0)(module(features))
    assert (loc == 1.0).all()
    assert (scale == 2.0).all()
    (loc.sum() + scale.sum()).backward()
    assert all(p.grad is not None for p in module.parameters())
    assert module.network[-1].weight.grad.abs().sum() > 0


def test_moments_equal_those_of_a_mixture() -> None:
    """With the assignments among the features, a linear network finds the exact statistics."""
    x, assignment = torch.randn(7, 2), torch.randint(0, 3, (7,))
    one_hot = nn.functional.one_hot(assignment, 3).to(x)
    moments = SoftMoments(5, 3, 2)
    assert isinstance(moments.assignment, nn.Linear)
    assert isinstance(moments.values, nn.Linear)
    with torch.no_grad():
        moments.assignment.weight.copy_(50.0 * torch.eye(5)[2:])
        moments.values.weight.copy_(torch.eye(5)[:2])
        moments.values.bias.zero_()
        moments.assignment.bias.zero_()
    number, first, second = moments(torch.cat([x, one_hot], -1)).unbind(-1)
    torch.testing.assert_close(number, one_hot.sum(0)[:, None].expand(3, 2))
    torch.testing.assert_close(first, one_hot.T @ x)
    torch.testing.assert_close(second, one_hot.T @ x.square())


def test_networks_can_be_replaced() -> None:
    moments = SoftMoments(3, 4, 2, assignment=nn.Linear(3, 4, bias=False), values=_network())
    assert moments(torch.randn(6, 3)).shape == (4, 2, 3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SoftMoments(0, 1, 1), "in_features=0"),
        (lambda: SoftMoments(1, 0, 1), "num_clusters=0"),
        (lambda: PointwiseStatistics(nn.Tanh()), "no linear layer"),
    ],
)
def test_bad_input_is_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_empty_data_sets_have_no_statistics() -> None:
    empty = torch.zeros(2, 0, 3)
    for make in MODULES.values():
        result: Tensor = make()(empty)
        assert (result == 0).all()
