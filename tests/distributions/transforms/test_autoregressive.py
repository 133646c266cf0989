"""Autoregressive layers: every feature depends on those before it, found one after the other."""

import pytest
import torch

from pyro_ext.distributions.transforms import (
    Affine,
    Autoregressive,
    ElementwiseMap,
    QuadraticSpline,
    RationalQuadraticSpline,
)
from pyro_ext.nn import ResMADE
from tests.distributions.layers import randomize

MAPS: list[ElementwiseMap] = [RationalQuadraticSpline(4), QuadraticSpline(4), Affine()]
maps = pytest.mark.parametrize("elementwise_map", MAPS, ids=lambda m: type(m).__name__)


def _layer(elementwise_map: ElementwiseMap, features: int = 4, context: int = 0) -> Autoregressive:
    network = ResMADE(features, elementwise_map.num_parameters, 16, context_features=context)
    return randomize(Autoregressive(elementwise_map, network))


@maps
@pytest.mark.parametrize("direction", ["to_noise", "to_data"])
@pytest.mark.parametrize("features", [1, 2, 5])
def test_the_jacobian_is_triangular(
    elementwise_map: ElementwiseMap, direction: str, features: int
) -> None:
    layer, x = _layer(elementwise_map, features), torch.randn(features)
    jacobian = torch.func.jacrev(lambda v: getattr(layer, direction)(v)[0])(x)
    assert torch.equal(jacobian.triu(1), torch.zeros_like(jacobian))
    assert (jacobian.diagonal() > 0).all()
    below = jacobian[torch.ones_like(jacobian).tril(-1) > 0]
    assert (below != 0).all()


@maps
def test_to_data_equals_solving_with_whole_passes(elementwise_map: ElementwiseMap) -> None:
    layer, z = _layer(elementwise_map, context=2), torch.randn(6, 4)
    context = torch.randn(6, 2)
    x = torch.zeros_like(z)
    for i in range(4):  # parameters of feature i are right once those before it are
        x_all, _ = elementwise_map.inverse(z, layer.network(x, context))
        x = torch.cat([x[:, :i], x_all[:, i : i + 1], x[:, i + 1 :]], -1)
    torch.testing.assert_close(layer.to_data(z, context)[0], x, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(layer.to_data(z, context)[0], x, rtol=1e-11, atol=1e-11)


@maps
def test_gradients_through_the_draws(elementwise_map: ElementwiseMap) -> None:
    layer, z = _layer(elementwise_map, 3), torch.randn(2, 3, requires_grad=True)

    def total(z: torch.Tensor) -> torch.Tensor:
        x, log_det = layer.to_data(z)
        return x.square().sum() + log_det.sum()

    assert torch.autograd.gradcheck(total, (z,))


def test_the_representation_tells_the_family() -> None:
    assert "elementwise_map=Affine(" in repr(_layer(Affine()))
