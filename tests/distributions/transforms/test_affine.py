"""Affine and additive maps: their formulas, and bounds that no parameter breaks."""

import math

import pytest
import torch

from pyro_ext.distributions.transforms import Additive, Affine, ElementwiseMap

maps = pytest.mark.parametrize("elementwise_map", [Affine(), Affine(0.1), Additive()], ids=repr)


@maps
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)], ids=str)
def test_maps_are_increasing_and_invertible(
    elementwise_map: ElementwiseMap, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape).requires_grad_()
    parameters = torch.randn(*shape, elementwise_map.num_parameters)
    y, log_slope = elementwise_map.forward(x, parameters)
    assert y.shape == log_slope.shape == shape
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope, slope.log())
    back, log_slope_back = elementwise_map.inverse(y, parameters)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_slope_back, -log_slope)


@maps
def test_zeros_give_the_identity(elementwise_map: ElementwiseMap) -> None:
    x = torch.randn(5)
    for direction in (elementwise_map.forward, elementwise_map.inverse):
        y, log_slope = direction(x, torch.zeros(elementwise_map.num_parameters))
        assert torch.equal(y, x)
        assert torch.equal(log_slope, torch.zeros(5))


@maps
def test_parameters_are_shared(elementwise_map: ElementwiseMap) -> None:
    x, parameters = torch.randn(4, 3), torch.randn(3, elementwise_map.num_parameters)
    for direction in (elementwise_map.forward, elementwise_map.inverse):
        expanded = direction(x, parameters.expand(4, -1, -1))
        for ours, expected in zip(direction(x, parameters), expanded, strict=True):
            assert torch.equal(ours, expected)


def test_shifts_and_near_zero_log_scales_are_what_they_say() -> None:
    y, log_slope = Affine().forward(torch.tensor(2.0), torch.tensor([1e-4, 5.0]))
    assert float(y) == pytest.approx(2.0 * math.exp(1e-4) + 5.0, abs=1e-7)
    assert float(log_slope) == pytest.approx(1e-4, rel=1e-3)
    y, _ = Additive().forward(torch.tensor(2.0), torch.tensor([5.0]))
    assert float(y) == 7.0


@pytest.mark.parametrize("min_ratio", [1e-6, 1e-2, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scales_stay_within_their_ratio(min_ratio: float, dtype: torch.dtype) -> None:
    parameters = torch.zeros(6, 2, dtype=dtype)
    parameters[:, 0] = torch.tensor([-1e30, -1e3, -1.0, 1.0, 1e3, 1e30])
    parameters.requires_grad_()
    x = torch.ones(6, dtype=dtype)
    y, log_slope = Affine(min_ratio).forward(x, parameters)
    log_slopes = log_slope.detach()
    limit = -0.5 * math.log(min_ratio)
    assert float(log_slopes.abs().max()) <= limit * (1 + 1e-5)
    assert float(log_slopes[-1]) == pytest.approx(-0.5 * math.log(min_ratio), rel=1e-3)
    assert (y.diff() >= 0).all()
    (gradient,) = torch.autograd.grad(y.sum(), parameters)
    assert gradient.isfinite().all()
    assert (gradient[1:-1, 0] > 0).all()


@pytest.mark.parametrize("min_ratio", [0.0, 1.0, -1.0, float("nan")])
def test_bad_ratios_are_explained(min_ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"min_ratio={min_ratio} .* give one in \(0, 1\)"):
        Affine(min_ratio)
