"""The distribution object: shapes, transforms, values that are never stale."""

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import ComposeTransform

from pyro_ext.distributions import FlowDistribution, NeuralSplineFlow
from pyro_ext.distributions.flow import BijectionTransform
from pyro_ext.distributions.transforms import (
    Bijection,
    Composite,
    Coupling,
    LULinear,
    RationalQuadraticSpline,
)
from pyro_ext.nn import ResidualNetwork
from tests.distributions.layers import full_log_det, randomize

D, CONTEXT = 3, 2


def _bijection(context: int = 0) -> Composite:
    spline = RationalQuadraticSpline(4)
    network = ResidualNetwork(1, 2 * spline.num_parameters, 8, context_features=context)
    return randomize(Composite([LULinear(D), Coupling(spline, network, 1, 2), LULinear(D)]))


def _normal(*batch_shape: int) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(*batch_shape, D), 1.0).to_event(1)


def test_log_prob_is_the_density_of_transformed_noise() -> None:
    bijection = _bijection()
    x = torch.randn(5, D)
    z, _ = bijection.to_noise(x)
    expected = _normal().log_prob(z) + full_log_det(bijection.to_noise, x)
    found = FlowDistribution(bijection, _normal()).log_prob(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("of_base", "of_context", "expected"),
    [
        ((), (), ()),
        ((), (4,), (4,)),
        ((4,), (), (4,)),
        ((5, 1), (4,), (5, 4)),
        ((5, 4), (5, 4), (5, 4)),
        ((0,), (0,), (0,)),
    ],
    ids=str,
)
def test_batches_of_base_and_context_broadcast(
    of_base: tuple[int, ...], of_context: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    context = torch.randn(*of_context, CONTEXT)
    flow = FlowDistribution(_bijection(CONTEXT), _normal(*of_base), context)
    assert flow.batch_shape == expected
    assert flow.event_shape == (D,)
    for shape in [(), (7,), (2, 0)]:
        x = flow.sample(torch.Size(shape))
        assert x.shape == (*shape, *expected, D)
        log_prob = flow.log_prob(x)
        assert log_prob.shape == (*shape, *expected)
        draws, log_prob = flow.rsample_and_log_prob(shape)
        assert draws.shape == x.shape
        torch.testing.assert_close(flow.log_prob(draws), log_prob, rtol=0, atol=1e-9)
    one_row = torch.randn(D)
    values = flow.log_prob(one_row)
    assert values.shape == expected
    everywhere = flow.log_prob(one_row.expand(*expected, D))
    torch.testing.assert_close(values, everywhere)


def test_expanding_draws_independently() -> None:
    context = torch.randn(4, CONTEXT)
    flow = FlowDistribution(_bijection(CONTEXT), _normal(), context)
    wide = flow.expand(torch.Size((50, 4)))
    assert wide.batch_shape == (50, 4)
    draws = wide.sample()
    assert draws.shape == (50, 4, D)
    assert len(draws.reshape(-1, D).unique(dim=0)) == 200
    torch.testing.assert_close(wide.log_prob(draws), flow.log_prob(draws))
    with pytest.raises(ValueError, match="within the support"):
        wide.log_prob(torch.full((50, 4, D), torch.nan))


@pytest.mark.parametrize("context_shape", [None, (), (4,)], ids=str)
def test_transforms_make_the_same_density_in_torch(context_shape: Any) -> None:
    context = None if context_shape is None else torch.randn(*context_shape, CONTEXT)
    flow = FlowDistribution(_bijection(CONTEXT * (context is not None)), _normal(), context)
    base = _normal().expand(flow.batch_shape)
    transformed = dist.TransformedDistribution(base, flow.transforms)
    assert transformed.batch_shape == flow.batch_shape
    assert transformed.event_shape == flow.event_shape
    x = flow.sample((6,))
    torch.testing.assert_close(transformed.log_prob(x), flow.log_prob(x), rtol=0, atol=1e-9)
    torch.manual_seed(2)
    draws = transformed.rsample((3,))
    torch.manual_seed(2)
    torch.testing.assert_close(flow.rsample((3,)), draws)


def test_a_transform_goes_both_ways() -> None:
    transform = BijectionTransform(_bijection())
    z = torch.randn(4, D)
    x = transform(z)
    torch.testing.assert_close(transform.inv(x), z)
    assert isinstance(transform.inv, BijectionTransform)
    torch.testing.assert_close(transform.inv.inv(z), x)
    expected = full_log_det(transform.bijection.to_data, z)
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, x), expected)
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(x, z), -expected)
    assert repr(transform) == "BijectionTransform(Composite)"
    assert transform.domain.event_dim == transform.codomain.event_dim == 1


def test_draws_have_gradients_and_samples_have_none() -> None:
    bijection = _bijection()
    flow = FlowDistribution(bijection, _normal())
    assert flow.has_rsample
    assert not flow.sample((3,)).requires_grad
    flow.rsample((3,)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in bijection.parameters())


def test_without_a_reparametrised_base_there_are_no_such_draws() -> None:
    base = dist.Bernoulli(0.5).expand([D]).to_event(1)
    flow = FlowDistribution(_bijection(), base)
    assert not flow.has_rsample
    assert flow.sample((2,)).shape == (2, D)


def _optimizer_step(bijection: Bijection, x: Tensor) -> None:
    FlowDistribution(bijection, _normal()).log_prob(x).sum().backward()
    torch.optim.SGD(bijection.parameters(), lr=0.01).step()


def _load(bijection: Bijection, x: Tensor) -> None:
    bijection.load_state_dict(_bijection().state_dict())


def _write(bijection: Bijection, x: Tensor) -> None:
    for parameter in bijection.parameters():
        parameter.data.add_(0.1)


@pytest.mark.parametrize("change", [_optimizer_step, _load, _write])
@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "no gradients"])
def test_nothing_is_stale(change: Any, is_training: bool, grad: bool) -> None:
    """The same tensor and the same distribution object, before and after the weights change."""
    bijection = _bijection().train(is_training)
    flow, x = FlowDistribution(bijection, _normal()), torch.randn(6, D)

    def evaluate() -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            draws, log_prob = flow.rsample_and_log_prob((6,))
            return flow.log_prob(x).detach(), draws.detach(), log_prob.detach()

    before = evaluate()
    change(bijection, x)
    after = evaluate()
    for old, new in zip(before, after, strict=True):
        assert not torch.allclose(old, new)
    expected = _normal().log_prob(bijection.to_noise(x)[0]) + full_log_det(bijection.to_noise, x)
    torch.testing.assert_close(after[0], expected.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(flow.log_prob(after[1]).detach(), after[2], rtol=0, atol=1e-9)


def test_large_batches_equal_small_ones() -> None:
    """However the work is divided: rows, their order and their random numbers are the same."""
    bijection = _bijection(CONTEXT).eval()
    context = torch.randn(3, CONTEXT)
    flow = FlowDistribution(bijection, _normal(), context)
    torch.manual_seed(5)
    large = flow.sample((9_000,))
    torch.manual_seed(5)
    expected = bijection.to_data(flow.base.sample((9_000,)), context)[0]
    torch.testing.assert_close(large, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        log_prob = flow.log_prob(large)
    torch.testing.assert_close(log_prob, flow.log_prob(large), rtol=1e-10, atol=1e-10)


def test_validation_may_be_switched_off() -> None:
    flow = FlowDistribution(_bijection(), _normal(), validate_args=False)
    x = torch.zeros(2, D)
    x[0, 0] = torch.nan
    values = FlowDistribution(
        flow.bijection,
        dist.Normal(torch.zeros(D), 1.0, validate_args=False).to_event(1),
        validate_args=False,
    ).log_prob(x)
    assert values[0].isnan()
    assert values[1].isfinite()


def test_affine_flows_of_normal_noise_are_normal() -> None:
    """A linear map is a multivariate normal, whose density is known."""
    layer = randomize(LULinear(D))
    flow = FlowDistribution(layer, _normal())
    weight = layer.to_data(torch.eye(D) + layer.bias)[0].detach()  # rows: images of unit vectors
    loc = layer.to_data(torch.zeros(D))[0].detach()
    exact = dist.MultivariateNormal(loc, weight.t() @ weight)
    x = flow.sample((50,))
    torch.testing.assert_close(flow.log_prob(x).detach(), exact.log_prob(x))
    draws = flow.sample((100_000,))
    torch.testing.assert_close(draws.mean(0), loc, rtol=0, atol=0.03)
    torch.testing.assert_close(draws.t().cov(), exact.covariance_matrix, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("draw", ["sample", "rsample", "rsample_and_log_prob"])
def test_a_base_of_another_dtype_is_named(draw: str) -> None:
    base = dist.StudentT(torch.full((2,), 3.0)).to_event(1)
    flow = NeuralSplineFlow(2, transforms=1, hidden_features=4, base=base).float()
    with pytest.raises(TypeError, match=r"base .* of torch.float64 .* of torch.float32"):
        getattr(flow(), draw)((5,))


def test_transforms_in_a_composition_with_a_cache() -> None:
    """What Pyro and torch do to transforms of any kind; ours keep nothing."""
    flow = NeuralSplineFlow(2, transforms=1, hidden_features=4)
    composed, z = ComposeTransform(flow().transforms), torch.randn(5, 2)
    cached = composed.with_cache()
    torch.testing.assert_close(cached(z), composed(z))
    with torch.no_grad():
        flow.bijection.bijections[-1].bias += 1.0
    torch.testing.assert_close(cached.inv(cached(z)), z)
