"""Both families of splines against formulas of their papers, and at every edge."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from pyro_ext.distributions.transforms import QuadraticSpline, RationalQuadraticSpline
from tests.distributions.reference_splines import (
    Spline,
    interval,
    knots_of,
    reference_forward,
    reference_inverse,
)

FAMILIES: dict[str, Callable[..., Spline]] = {
    "rational-quadratic": RationalQuadraticSpline,
    "rational-quadratic in [0, 1]": partial(RationalQuadraticSpline, tails=False),
    "quadratic": QuadraticSpline,
    "quadratic in [0, 1]": partial(QuadraticSpline, tails=False),
}
BINS = [2, 3, 8, 32]
few_bins = pytest.mark.parametrize("bins", [2, 8], ids="{} bins".format)
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
all_bins = pytest.mark.parametrize("bins", BINS, ids="{} bins".format)
SCALES = [1.0, 100.0, 1e30]
scales = pytest.mark.parametrize("scale", SCALES, ids="scale {:g}".format)
directions = pytest.mark.parametrize("direction", ["forward", "inverse"])


def _parameters(spline: Spline, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, spline.num_parameters)


def _points(spline: Spline, *shape: int) -> Tensor:
    """In the interval, and in the tails if there are any."""
    low, high = interval(spline)
    beyond = 0.1 * (high - low) if spline.tails else 0.0
    return torch.empty(shape).uniform_(low - beyond, high + beyond)


def _grid(spline: Spline, number: int) -> Tensor:
    low, high = interval(spline)
    return torch.linspace(low, high, number)


def _neighbours(points: Tensor) -> Tensor:
    """Points, and the next numbers below and above them, in the last dimension."""
    infinity = torch.full_like(points, torch.inf)
    return torch.cat([points.nextafter(-infinity), points, points.nextafter(infinity)], -1)


def _edges(spline: Spline, parameters: Tensor) -> Tensor:
    """Where something could go wrong, shape ``(..., number)``: knots, ends, tails, and about."""
    knots = knots_of(spline, parameters)
    ends = torch.tensor([*interval(spline), 0.0]).expand(*parameters.shape[:-1], -1)
    far = torch.tensor([-1e30, -100.0, -1e-30, 1e-30, 100.0, 1e30])
    far = far.expand(*parameters.shape[:-1], -1)
    return torch.cat([_neighbours(torch.cat([knots.x, knots.y, ends], -1)), far], -1)


# -- what the functions are --------------------------------------------------------------------


@families
@all_bins
@directions
@pytest.mark.parametrize("scale", [1.0, 3.0], ids="scale {:g}".format)
def test_values_are_those_of_the_formulas(
    family: Callable[..., Spline], bins: int, direction: str, scale: float
) -> None:
    spline = family(bins)
    parameters, x = _parameters(spline, 500, scale=scale), _points(spline, 500)
    reference = {"forward": reference_forward, "inverse": reference_inverse}[direction]
    expected, expected_log_slope = reference(spline, x, parameters)
    value, log_slope = getattr(spline, direction)(x, parameters)
    # the inverse, like any, loses the digits by which the slope is small
    slack = 1e-12 if direction == "forward" else 1e-8
    torch.testing.assert_close(value, expected, rtol=0, atol=slack)
    torch.testing.assert_close(log_slope, expected_log_slope, rtol=0, atol=100 * slack)


@families
@few_bins
@scales
def test_knots_are_met(family: Callable[..., Spline], bins: int, scale: float) -> None:
    """Values and slopes at all knots are those that the parameters stand for."""
    spline = family(bins)
    parameters = _parameters(spline, 100, 1, scale=scale)
    x, y, delta = (each.squeeze(1) for each in knots_of(spline, parameters))
    value, log_slope = spline.forward(x, parameters)
    torch.testing.assert_close(value, y, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_slope, delta.log(), rtol=0, atol=1e-5)
    back, log_slope = spline.inverse(y, parameters)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)


@families
@few_bins
@scales
def test_slopes_are_continuous(family: Callable[..., Spline], bins: int, scale: float) -> None:
    """Slightly left and right of every knot, the ends of the interval among them."""
    spline = family(bins)
    parameters = _parameters(spline, 100, 1, scale=scale)
    x, _, delta = (each.squeeze(1) for each in knots_of(spline, parameters))
    step = 1e-9 * x.diff(dim=-1).amin(-1, keepdim=True)
    for side in (-step, step):
        at = x + side if spline.tails else (x + side).clamp(0.0, 1.0)
        _, log_slope = spline.forward(at, parameters)
        # bent the more, the less even the knots: an error of 0.2 % would show at any scale
        torch.testing.assert_close(
            log_slope, delta.log(), rtol=0, atol=1e-6 if scale == 1 else 2e-3
        )


@pytest.mark.parametrize("family", [RationalQuadraticSpline, QuadraticSpline])
@few_bins
@scales
@directions
def test_slopes_at_the_bounds_are_one(
    family: Callable[..., Spline], bins: int, scale: float, direction: str
) -> None:
    spline = family(bins, 2.5)
    parameters = _parameters(spline, 1000, 1, scale=scale)
    at = torch.tensor([-2.5, 2.5]).expand(1000, -1)
    value, log_slope = getattr(spline, direction)(at, parameters)
    torch.testing.assert_close(value, at, rtol=0, atol=1e-14)
    # where the end lies in its piece is rounded, the more the narrower the piece
    slack = 1e-12 if scale == 1 else 3e-9
    torch.testing.assert_close(log_slope, torch.zeros(1000, 2), rtol=0, atol=slack)


@families
@few_bins
@scales
@directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ends_are_mapped_to_ends(
    family: Callable[..., Spline], bins: int, scale: float, direction: str, dtype: torch.dtype
) -> None:
    spline = family(bins)
    parameters = _parameters(spline, 100, 1, scale=scale).to(dtype)
    ends = torch.tensor(interval(spline), dtype=dtype).expand(100, -1)
    value, log_slope = getattr(spline, direction)(ends, parameters)
    # where the end lies in its piece is rounded; the slope there is up to 1 / min_ratio^2
    error = (value - ends).abs() / (1.0 + log_slope.exp())
    assert error.max() <= (10 if scale == 1 else 100) * torch.finfo(dtype).eps


@pytest.mark.parametrize("family", [RationalQuadraticSpline, QuadraticSpline])
@directions
def test_tails_are_the_identity(family: Callable[..., Spline], direction: str) -> None:
    spline = family(5, 2.0)
    x = torch.tensor([-1e30, -7.0, -2.0000001, 2.0000001, 7.0, 1e30])
    value, log_slope = getattr(spline, direction)(x, _parameters(spline, 6, scale=10.0))
    assert torch.equal(value, x)
    assert torch.equal(log_slope, torch.zeros(6))


@pytest.mark.parametrize("family", [RationalQuadraticSpline, QuadraticSpline])
@directions
def test_without_tails_what_is_outside_moves_to_the_end(
    family: Callable[..., Spline], direction: str
) -> None:
    spline = family(5, tails=False)
    parameters = _parameters(spline, 2)
    at_ends = getattr(spline, direction)(torch.tensor([0.0, 1.0]), parameters)
    outside = getattr(spline, direction)(torch.tensor([-1e-7, 3.0]), parameters)
    for expected, value in zip(at_ends, outside, strict=True):
        assert torch.equal(expected, value)


@families
@all_bins
@directions
def test_zeros_give_the_identity(family: Callable[..., Spline], bins: int, direction: str) -> None:
    spline = family(bins)
    x = _points(spline, 1000)
    value, log_slope = getattr(spline, direction)(x, torch.zeros(spline.num_parameters))
    torch.testing.assert_close(value, x, rtol=0, atol=1e-14)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=1e-13)


@families
@all_bins
@directions
def test_log_slopes_are_those_of_automatic_differentiation(
    family: Callable[..., Spline], bins: int, direction: str
) -> None:
    spline = family(bins)
    x = _points(spline, 1000).requires_grad_()
    value, log_slope = getattr(spline, direction)(x, _parameters(spline, 1000))
    (slope,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(log_slope, slope.log(), rtol=0, atol=1e-11)


@families
@all_bins
def test_the_inverse_undoes_the_function(family: Callable[..., Spline], bins: int) -> None:
    spline = family(bins)
    parameters, x = _parameters(spline, 2000), _points(spline, 2000)
    for there, back in [(spline.forward, spline.inverse), (spline.inverse, spline.forward)]:
        y, log_slope = there(x, parameters)
        again, log_slope_back = back(y, parameters)
        torch.testing.assert_close(again, x, rtol=0, atol=1e-10)
        torch.testing.assert_close(log_slope + log_slope_back, 0 * x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("min_ratio", [1e-6, 0.005, 0.5, 0.99])
@families
def test_the_ratio_bounds_how_uneven_knots_are(
    family: Callable[..., Spline], min_ratio: float
) -> None:
    spline = family(4, min_ratio=min_ratio)
    parameters = _parameters(spline, 500, scale=1e6)
    widths = knots_of(spline, parameters).x.diff(dim=-1)
    ratios = widths.amin(-1) / widths.amax(-1)
    assert (ratios >= min_ratio * (1 - 1e-9)).all()
    assert ratios.min() < 1.1 * min_ratio


# -- every edge --------------------------------------------------------------------------------


@families
@few_bins
@scales
@directions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_everything_is_finite_everywhere(
    family: Callable[..., Spline], bins: int, scale: float, direction: str, dtype: torch.dtype
) -> None:
    spline = family(bins)
    parameters = _parameters(spline, 50, 1, scale=scale).to(dtype)
    x = _edges(spline, parameters.double().squeeze(1))
    x = torch.cat([_neighbours(x.to(dtype)), _points(spline, 50, 20).to(dtype)], -1)
    x, parameters = x.requires_grad_(), parameters.requires_grad_()
    value, log_slope = getattr(spline, direction)(x, parameters)
    assert value.dtype == log_slope.dtype == dtype
    assert value.shape == log_slope.shape == x.shape
    gradients = torch.autograd.grad((value + log_slope).sum(), (x, parameters))
    for each in (value, log_slope, *gradients):
        assert each.isfinite().all()
    low, high = interval(spline)
    if not spline.tails:
        assert ((value >= low) & (value <= high)).all()


@families
@few_bins
@scales
@directions
def test_functions_increase_in_single_precision(
    family: Callable[..., Spline], bins: int, scale: float, direction: str
) -> None:
    """On a dense grid: never down by more than rounding, never flat for long."""
    spline = family(bins)
    parameters = _parameters(spline, 20, 1, scale=scale)
    grid = _grid(spline, 501).expand(20, -1)
    value, _ = getattr(spline, direction)(grid.float(), parameters.float())
    assert (value.diff(dim=-1) >= -4 * spline.bound * torch.finfo(torch.float32).eps).all()
    exact, log_slope = getattr(spline, direction)(grid, parameters)
    assert (exact.diff(dim=-1) > 0).all()
    assert log_slope.exp().min() > 0


@families
@directions
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 1, 3)], ids=str)
def test_any_shape(family: Callable[..., Spline], direction: str, shape: tuple[int, ...]) -> None:
    spline = family(3)
    x = _points(spline, *shape).requires_grad_()
    parameters = _parameters(spline, *shape).requires_grad_()
    value, log_slope = getattr(spline, direction)(x, parameters)
    assert value.shape == log_slope.shape == shape
    grad_x, grad_parameters = torch.autograd.grad((value + log_slope).sum(), (x, parameters))
    assert grad_x.shape == x.shape
    assert grad_parameters.shape == parameters.shape
    flat = getattr(spline, direction)(
        x.reshape(-1), parameters.reshape(x.numel(), spline.num_parameters)
    )
    assert torch.equal(flat[0], value.reshape(-1))


@families
@directions
def test_a_batch_all_in_the_tails(family: Callable[..., Spline], direction: str) -> None:
    spline = family(8)
    x = torch.full((10,), 50.0, requires_grad=True)
    parameters = _parameters(spline, 10).requires_grad_()
    value, log_slope = getattr(spline, direction)(x, parameters)
    gradients = torch.autograd.grad((value + log_slope).sum(), (x, parameters))
    if spline.tails:
        assert torch.equal(gradients[0], torch.ones(10))
        assert torch.equal(gradients[1], torch.zeros_like(parameters))
    assert all(each.isfinite().all() for each in gradients)


@families
@directions
def test_not_numbers_stay_what_they_are(family: Callable[..., Spline], direction: str) -> None:
    """A NaN must not turn into a number that looks right."""
    spline = family(4)
    x = torch.tensor([torch.nan, 0.3])
    value, _ = getattr(spline, direction)(x, _parameters(spline, 2))
    assert value[0].isnan()
    assert value[1].isfinite()
    parameters = _parameters(spline, 2)
    parameters[0, 0] = torch.nan
    value, log_slope = getattr(spline, direction)(torch.tensor([0.3, 0.3]), parameters)
    assert value[0].isnan()
    assert log_slope[0].isnan()
    assert value[1].isfinite()


@families
@directions
def test_memory_layout_does_not_matter(family: Callable[..., Spline], direction: str) -> None:
    spline = family(4)
    x, parameters = _points(spline, 5, 3), _parameters(spline, 5, 3)
    expected = getattr(spline, direction)(x, parameters)
    strided = parameters.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not strided.is_contiguous()
    value = getattr(spline, direction)(x.t().contiguous().t(), strided)
    for ours, theirs in zip(value, expected, strict=True):
        assert torch.equal(ours, theirs)


# -- settings ----------------------------------------------------------------------------------


@families
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bins": 1}, "bins=1: .* at least 2"),
        ({"bins": 2.0}, "bins=2.0"),
        ({"bound": 0.0}, "bound=0.0: .* give bound > 0"),
        ({"bound": -3.0}, "bound=-3.0"),
        ({"bound": float("nan")}, "bound=nan"),
        ({"bound": float("inf")}, "bound=inf"),
        ({"min_ratio": 0.0}, r"min_ratio=0.0 .* give one in \(0, 1\)"),
        ({"min_ratio": 1.0}, "min_ratio=1.0"),
        ({"min_ratio": float("nan")}, "min_ratio=nan"),
    ],
    ids=str,
)
def test_bad_settings_are_explained(
    family: Callable[..., Spline], settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        family(**settings)


@families
def test_the_representation_tells_the_settings(family: Callable[..., Spline]) -> None:
    spline = family(5, 2.0, min_ratio=0.01)
    assert eval(repr(spline)).__dict__ == spline.__dict__
