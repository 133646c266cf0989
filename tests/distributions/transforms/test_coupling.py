"""Coupling layers: which feature may depend on which."""

import pytest
import torch
from torch import nn

from pyro_ext.distributions.transforms import Coupling, ElementwiseMap, RationalQuadraticSpline
from pyro_ext.nn import ResidualNetwork
from tests.distributions.layers import randomize

SPLINE: ElementwiseMap = RationalQuadraticSpline(4)


def _coupling(conditioning: int, transformed: int, context: int = 0) -> Coupling:
    size = transformed * SPLINE.num_parameters
    network = ResidualNetwork(conditioning, size, 8, context_features=context)
    return randomize(Coupling(SPLINE, network, conditioning, transformed))


@pytest.mark.parametrize(("conditioning", "transformed"), [(2, 3), (3, 2), (1, 1), (1, 4)])
@pytest.mark.parametrize("direction", ["to_noise", "to_data"])
def test_the_jacobian_has_blocks(conditioning: int, transformed: int, direction: str) -> None:
    layer = _coupling(conditioning, transformed)
    x = torch.randn(conditioning + transformed)
    jacobian = torch.func.jacrev(lambda v: getattr(layer, direction)(v)[0])(x)
    diagonal = jacobian.diagonal()
    assert (diagonal > 0).all()
    beside = jacobian - diagonal.diag()
    lower_left = beside[conditioning:, :conditioning]
    assert (lower_left != 0).all()
    beside[conditioning:, :conditioning] = 0.0
    assert torch.equal(beside, torch.zeros_like(beside))


def test_conditioning_features_are_transformed_too() -> None:
    layer, x = _coupling(2, 3), torch.randn(7, 5)
    z, _ = layer.to_noise(x)
    expected, _ = SPLINE.forward(x[:, :2], layer.parameters_of_conditioning)
    torch.testing.assert_close(z[:, :2], expected)
    assert not torch.allclose(z[:, :2], x[:, :2])


def test_the_network_gets_the_conditioning_features_and_the_context() -> None:
    layer = _coupling(2, 3, context=4)
    seen: list[torch.Tensor] = []
    assert layer.network is not None
    layer.network.register_forward_hook(lambda _, inputs, output: seen.extend(inputs))
    x, context = torch.randn(7, 5), torch.randn(4)
    z, _ = layer.to_noise(x, context)
    assert torch.equal(seen[0], x[:, :2])
    assert torch.equal(seen[1], context)
    layer.to_data(z, context)
    torch.testing.assert_close(seen[2], x[:, :2])  # the same, once found


def test_without_a_network_features_are_independent() -> None:
    layer = randomize(Coupling(SPLINE, None, 0, 3))
    assert layer.parameters_of_conditioning.shape == (3, SPLINE.num_parameters)
    jacobian = torch.func.jacrev(lambda v: layer.to_noise(v)[0])(torch.randn(3))
    assert torch.equal(jacobian, jacobian.diagonal().diag())


def test_a_network_of_any_kind() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 2 * SPLINE.num_parameters)

        def forward(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
            return self.linear(x)

    layer, x = Coupling(SPLINE, Linear(), 1, 2), torch.randn(4, 3)
    torch.testing.assert_close(layer.to_data(layer.to_noise(x)[0])[0], x)


def test_the_representation_tells_the_family() -> None:
    assert "elementwise_map=RationalQuadraticSpline(bins=4" in repr(_coupling(1, 1))
