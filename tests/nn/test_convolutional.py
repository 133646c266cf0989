"""The convolutional network against convolutions written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyro_ext.nn import ResidualConvolutionalNetwork


def _randomized(network: ResidualConvolutionalNetwork) -> ResidualConvolutionalNetwork:
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def test_values_are_those_of_the_formula() -> None:
    network = _randomized(ResidualConvolutionalNetwork(2, 3, 6, context_channels=4))
    x, context = torch.randn(5, 2, 7, 8), torch.randn(5, 4, 7, 8)
    w = dict(network.named_parameters())
    weight = torch.cat([w["initial.weight"], w["initial_context.weight"]], 1)
    h = F.conv2d(torch.cat([x, context], 1), weight, w["initial.bias"])
    for i in range(3):
        u = h.clamp(min=0)
        u = F.conv2d(u, w[f"blocks.{i}.first.weight"], w[f"blocks.{i}.first.bias"], padding=1)
        u = u.clamp(min=0)
        u = F.conv2d(u, w[f"blocks.{i}.second.weight"], w[f"blocks.{i}.second.bias"], padding=1)
        g = F.conv2d(context, w[f"blocks.{i}.gate.weight"], w[f"blocks.{i}.gate.bias"])
        h = h + u / (1 + torch.exp(-g))
    expected = F.conv2d(h, w["output.weight"], w["output.bias"])
    torch.testing.assert_close(network(x, context), expected, rtol=1e-12, atol=1e-12)


def test_a_pixel_sees_two_neighbours_per_block() -> None:
    network = _randomized(ResidualConvolutionalNetwork(1, 1, 6, residual_blocks=2))
    x = torch.randn(1, 15, 15, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x)[0, 7, 7], x)
    rows, columns = gradient[0].nonzero().T
    # two convolutions of two blocks: four pixels to each side
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 11, 3, 11)


def test_a_context_of_one_pixel_is_that_of_all_pixels() -> None:
    network = _randomized(ResidualConvolutionalNetwork(2, 3, 6, context_channels=4))
    x, context = torch.randn(5, 2, 7, 8), torch.randn(5, 4, 1, 1)
    torch.testing.assert_close(network(x, context), network(x, context.expand(5, 4, 7, 8)))


def test_a_context_of_another_size_is_explained() -> None:
    network = ResidualConvolutionalNetwork(2, 3, 6, context_channels=4)
    with pytest.raises(ValueError, match=r"height and width \(7, 8\) of x, .* got \(7, 9\)"):
        network(torch.randn(2, 7, 8), torch.randn(4, 7, 9))


def test_an_image_without_channels_is_explained() -> None:
    network = ResidualConvolutionalNetwork(2, 3, 6)
    with pytest.raises(ValueError, match=r"x must have shape \(..., 2, height, width\)"):
        network(torch.randn(7, 8))
