"""The energy network: shapes, bounds, what it reads, bad settings."""

from typing import Any

import pytest
import torch

from pyro_ext.nn import EnergyNetwork


@pytest.mark.parametrize("bound", [0.5, 20.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
def test_values_stay_between_minus_the_bound_and_zero(bound: float, dtype: torch.dtype) -> None:
    network = EnergyNetwork(3, 8, residual_blocks=1, bound=bound).to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(100.0)
    x, context = torch.linspace(-1e6, 1e6, 101, dtype=dtype), torch.randn(101, 3, dtype=dtype)
    extremes = []
    for _ in range(2):
        values = network(x, context)
        assert values.min() >= -bound
        assert values.max() <= 0.0
        extremes.append(float(values.detach().min()))
        with torch.no_grad():
            network.output.weight.neg_()
    assert min(extremes) == pytest.approx(-bound, rel=1e-3)


def test_it_is_the_output_of_the_network_where_that_is_small_against_the_bound() -> None:
    network, raw = EnergyNetwork(3, 8, bound=1e4), []
    network.output.register_forward_hook(lambda module, args, output: raw.append(output))
    values = network(torch.randn(50), torch.randn(50, 3))
    torch.testing.assert_close(values + 5e3, raw[0].squeeze(-1), rtol=1e-5, atol=1e-9)


def test_a_context_is_shared_by_many_numbers() -> None:
    network, x, context = EnergyNetwork(3, 8), torch.randn(5, 7), torch.randn(5, 3)
    shared = network(x, context.unsqueeze(1))
    separate = network(x, context.unsqueeze(1).expand(5, 7, 3))
    torch.testing.assert_close(shared, separate)


def test_it_depends_on_the_number_and_on_the_context() -> None:
    network = EnergyNetwork(2, 8)
    x, context = torch.randn(4, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    network(x, context).sum().backward()
    for leaf in (x, context):
        assert leaf.grad is not None
        assert (leaf.grad != 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"context_features": 0},
        {"hidden_features": 0},
        {"residual_blocks": -1},
        {"bound": 0.0},
        {"bound": float("inf")},
        {"dropout": 1.0},
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        EnergyNetwork(**{"context_features": 2, **settings})
