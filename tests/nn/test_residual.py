"""The fully connected network against formulas written out."""

import pytest
import torch
from torch import nn

from pyro_ext.nn import ResidualNetwork


def _randomized(network: ResidualNetwork) -> ResidualNetwork:
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def test_values_are_those_of_the_formula() -> None:
    network = _randomized(ResidualNetwork(2, 3, 8, residual_blocks=2, activation=torch.tanh))
    x = torch.randn(5, 2)
    w = dict(network.named_parameters())
    h = x @ w["initial.weight"].T + w["initial.bias"]
    for i in range(2):
        u = torch.tanh(h) @ w[f"blocks.{i}.first.weight"].T + w[f"blocks.{i}.first.bias"]
        u = torch.tanh(u) @ w[f"blocks.{i}.second.weight"].T + w[f"blocks.{i}.second.bias"]
        h = h + u
    expected = h @ w["output.weight"].T + w["output.bias"]
    torch.testing.assert_close(network(x), expected, rtol=1e-12, atol=1e-12)


def test_a_context_is_concatenated_and_gates() -> None:
    """Appendix B.2 of Neural Spline Flows, on the concatenation itself."""
    network = _randomized(ResidualNetwork(2, 3, 8, context_features=4, residual_blocks=2))
    x, context = torch.randn(5, 2), torch.randn(5, 4)
    w = dict(network.named_parameters())
    weight = torch.cat([w["initial.weight"], w["initial_context.weight"]], 1)
    h = torch.cat([x, context], 1) @ weight.T + w["initial.bias"]
    for i in range(2):
        u = h.clamp(min=0) @ w[f"blocks.{i}.first.weight"].T + w[f"blocks.{i}.first.bias"]
        u = u.clamp(min=0) @ w[f"blocks.{i}.second.weight"].T + w[f"blocks.{i}.second.bias"]
        g = context @ w[f"blocks.{i}.gate.weight"].T + w[f"blocks.{i}.gate.bias"]
        h = h + u / (1 + torch.exp(-g))
    expected = h @ w["output.weight"].T + w["output.bias"]
    torch.testing.assert_close(network(x, context), expected, rtol=1e-12, atol=1e-12)


def test_without_input_it_is_a_function_of_the_context() -> None:
    network = _randomized(ResidualNetwork(0, 3, 8, context_features=4))
    context = torch.randn(5, 4)
    output = network(torch.empty(7, 5, 0), context)
    assert output.shape == (7, 5, 3)
    for row in output:
        torch.testing.assert_close(row, network(torch.empty(5, 0), context))
    alone = torch.stack([network(torch.empty(0), one) for one in context])
    torch.testing.assert_close(output[0], alone)
    assert (output[0].std(0) > 1e-3).all()


def test_without_input_and_context_there_is_no_network() -> None:
    with pytest.raises(ValueError, match="both 0"):
        ResidualNetwork(0, 3)
