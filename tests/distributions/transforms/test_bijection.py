"""What every layer on vectors does: round trips, log-determinants, shapes, contexts, copies."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_ext.distributions.transforms import (
    Additive,
    Affine,
    Autoregressive,
    Bijection,
    Composite,
    Coupling,
    ElementwiseMap,
    Inverse,
    LULinear,
    Permutation,
    QuadraticSpline,
    RationalQuadraticSpline,
    Standardize,
    random_cycle,
)
from pyro_ext.nn import ResidualNetwork, ResMADE
from tests.distributions.layers import full_log_det, randomize

D, CONTEXT = 4, 3


def _coupling(elementwise_map: ElementwiseMap, context: int = 0) -> Bijection:
    size = 3 * elementwise_map.num_parameters
    network = ResidualNetwork(1, size, 8, context_features=context, activation=torch.tanh)
    return Coupling(elementwise_map, network, 1, 3)


def _autoregressive(elementwise_map: ElementwiseMap, context: int = 0) -> Bijection:
    size = elementwise_map.num_parameters
    network = ResMADE(D, size, 8, context_features=context, activation=torch.tanh)
    return Autoregressive(elementwise_map, network)


def _composite(context: int = 0) -> Bijection:
    spline = RationalQuadraticSpline(3)
    return Composite(
        [
            Standardize(torch.ones(D), torch.full((D,), 2.0)),
            LULinear(D),
            _coupling(spline, context),
            Permutation(random_cycle(D)),
            Inverse(_autoregressive(spline, context)),
        ]
    )


LAYERS: dict[str, Callable[[], Bijection]] = {
    "standardize": lambda: Standardize(torch.randn(D), torch.rand(D) + 0.5),
    "permutation": lambda: Permutation(random_cycle(D)),
    "linear": lambda: LULinear(D),
    "rational-quadratic coupling": lambda: _coupling(RationalQuadraticSpline(4)),
    "quadratic coupling": lambda: _coupling(QuadraticSpline(4)),
    "affine coupling": lambda: _coupling(Affine()),
    "additive coupling": lambda: _coupling(Additive()),
    "coupling without a network": lambda: Coupling(RationalQuadraticSpline(4), None, 0, D),
    "rational-quadratic autoregressive": lambda: _autoregressive(RationalQuadraticSpline(4)),
    "quadratic autoregressive": lambda: _autoregressive(QuadraticSpline(4)),
    "affine autoregressive": lambda: _autoregressive(Affine()),
    "additive autoregressive": lambda: _autoregressive(Additive()),
    "inverse": lambda: Inverse(_autoregressive(RationalQuadraticSpline(4))),
    "composite": _composite,
}
WITH_CONTEXT: dict[str, Callable[[], Bijection]] = {
    "coupling": lambda: _coupling(RationalQuadraticSpline(4), CONTEXT),
    "coupling of the context alone": lambda: Coupling(
        RationalQuadraticSpline(4),
        ResidualNetwork(0, D * 11, 8, context_features=CONTEXT),
        0,
        D,
    ),
    "autoregressive": lambda: _autoregressive(RationalQuadraticSpline(4), CONTEXT),
    "inverse": lambda: Inverse(_autoregressive(Affine(), CONTEXT)),
    "composite": lambda: _composite(CONTEXT),
}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
conditional_layers = pytest.mark.parametrize("make", WITH_CONTEXT.values(), ids=WITH_CONTEXT)
batch_shapes = pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3), (0,)], ids=str)


@layers
@batch_shapes
def test_both_directions_undo_each_other(
    make: Callable[[], Bijection], batch_shape: tuple[int, ...]
) -> None:
    layer, x = randomize(make()), 2.0 * torch.randn(*batch_shape, D)
    for there, back in [(layer.to_noise, layer.to_data), (layer.to_data, layer.to_noise)]:
        y, log_det = there(x)
        again, log_det_back = back(y)
        assert y.shape == x.shape
        assert log_det.shape == log_det_back.shape == batch_shape
        torch.testing.assert_close(again, x, rtol=0, atol=1e-10)
        torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=1e-10)


@layers
@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)], ids=str)
def test_log_determinants_are_those_of_the_full_jacobian(
    make: Callable[[], Bijection], batch_shape: tuple[int, ...]
) -> None:
    layer, x = randomize(make()), 2.0 * torch.randn(*batch_shape, D)
    for direction in (layer.to_noise, layer.to_data):
        _, log_det = direction(x)
        torch.testing.assert_close(log_det, full_log_det(direction, x), rtol=0, atol=1e-10)


@layers
def test_rows_do_not_see_each_other(make: Callable[[], Bijection]) -> None:
    layer, x = randomize(make()), 2.0 * torch.randn(2, 3, D)
    for direction in (layer.to_noise, layer.to_data):
        values, log_dets = direction(x)
        for i in range(2):
            for j in range(3):
                value, log_det = direction(x[i, j])
                torch.testing.assert_close(values[i, j], value, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(log_dets[i, j], log_det, rtol=1e-12, atol=1e-12)


@conditional_layers
@pytest.mark.parametrize(
    ("of_x", "of_context"),
    [((7,), ()), ((2, 7), (7,)), ((2, 7), (2, 1)), ((), ()), ((2, 3), (2, 3))],
    ids=str,
)
def test_shared_contexts_equal_expanded_ones(
    make: Callable[[], Bijection], of_x: tuple[int, ...], of_context: tuple[int, ...]
) -> None:
    layer = randomize(make())
    x, context = torch.randn(*of_x, D), torch.randn(*of_context, CONTEXT)
    for direction in (layer.to_noise, layer.to_data):
        for ours, expected in zip(
            direction(x, context), direction(x, context.expand(*of_x, CONTEXT)), strict=True
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@conditional_layers
def test_the_context_has_an_effect(make: Callable[[], Bijection]) -> None:
    layer, x = randomize(make()), torch.randn(D)
    context = torch.randn(5, CONTEXT)
    z, log_det = layer.to_noise(x.expand(5, D), context)
    assert log_det.std() > 1e-4
    torch.testing.assert_close(layer.to_data(z, context)[0], x.expand(5, D), rtol=0, atol=1e-10)
    expected = [full_log_det(lambda v, c=c: layer.to_noise(v, c), x) for c in context]
    torch.testing.assert_close(log_det, torch.stack(expected), rtol=0, atol=1e-9)


@layers
def test_copies_compute_the_same(make: Callable[[], Bijection]) -> None:
    layer, x = randomize(make()).eval(), torch.randn(3, D)
    with torch.no_grad():  # after use, when something may be kept
        expected = layer.to_data(x)[0]
        fresh = make().eval()
        fresh.load_state_dict(layer.state_dict())
        for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other.to_data(x)[0], expected)


@layers
def test_other_precisions(make: Callable[[], Bijection]) -> None:
    layer, x = randomize(make()).eval(), torch.randn(3, D)
    expected, expected_log_det = layer.to_data(x)
    z, log_det = layer.float().to_data(x.float())
    assert z.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(z.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_det.double(), expected_log_det, rtol=1e-3, atol=1e-3)
    x32, log_det32 = layer.to_noise(z)
    assert x32.dtype == log_det32.dtype == torch.float32


@layers
def test_the_inverse_layer_is_the_other_direction(make: Callable[[], Bijection]) -> None:
    layer, x = randomize(make()), torch.randn(3, D)
    inverse = Inverse(layer)
    for ours, expected in [
        (inverse.to_noise(x), layer.to_data(x)),
        (inverse.to_data(x), layer.to_noise(x)),
    ]:
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a, b)


def test_a_composite_applies_its_layers_in_order() -> None:
    layers = [randomize(LAYERS[name]()) for name in ("standardize", "linear", "affine coupling")]
    x = z = torch.randn(3, D)
    total: Tensor = torch.zeros(3)
    for layer in layers:
        z, log_det = layer.to_noise(z)
        total = total + log_det
    found, log_det = Composite(layers).to_noise(x)
    torch.testing.assert_close(found, z)
    torch.testing.assert_close(log_det, total)
