"""Waves of numbers: values, masks, evaluation input by input."""

import torch

from pyro_ext.nn import EnergyNetwork, ResMADE
from pyro_ext.nn.fourier import MaskedFourierLinear, waves


def test_waves_of_one_number_stand_together() -> None:
    x = torch.tensor([[0.3, -1.2]])
    expected = [
        torch.stack([each, each.sin(), (2 * each).sin(), each.cos(), (2 * each).cos()])
        for each in x[0]
    ]
    torch.testing.assert_close(waves(x, 2), torch.cat(expected)[None])
    assert waves(x, 0) is x


def test_masks_hold_for_all_waves_of_an_input() -> None:
    layer = MaskedFourierLinear(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), 3)
    x = torch.randn(5, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[:, 0].sum(), x)
    assert (gradient[:, 1] == 0).all()
    assert (gradient[:, 0] != 0).all()


def test_rows_are_those_of_the_whole_layer() -> None:
    layer, x = MaskedFourierLinear(torch.ones(4, 3).tril(), 2), torch.randn(5, 3)
    torch.testing.assert_close(layer.rows(x[:, :2], 1, 2), layer(x)[:, 1:2])


def test_a_network_with_waves_is_evaluated_feature_by_feature() -> None:
    made, x = ResMADE(4, 2, 12), torch.randn(7, 4)
    made.initial = MaskedFourierLinear(made.initial.mask, 3)
    whole = made(x)
    for has_gradients in (True, False):
        with torch.set_grad_enabled(has_gradients):
            state = made.start((7,))
            for feature in range(4):
                output, state = made.step(state, x[:, feature - 1] if feature else None)
                torch.testing.assert_close(output, whole[:, feature])


def test_energies_learn_what_varies_fast_with_waves_and_not_without() -> None:
    x = torch.linspace(-2, 2, 200)
    target, errors = (30 * x).sin(), []
    for frequencies in (0, 6):
        torch.manual_seed(0)
        network = EnergyNetwork(1, 32, residual_blocks=1, frequencies=frequencies)
        optimizer = torch.optim.Adam(network.parameters(), 5e-3)
        for _ in range(100):
            optimizer.zero_grad()
            loss = (network(x, torch.zeros(1)) + 10.0 - target).square().mean()
            loss.backward()
            optimizer.step()
        errors.append(float(loss.detach()))
    assert errors[0] > 0.4  # half is that of a constant
    assert errors[1] < 0.05
