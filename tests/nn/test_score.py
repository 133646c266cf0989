"""Networks over noisy data and time."""

import pytest
import torch

from pyro_ext.nn import ScoreNetwork, TimeEmbedding, UNet


def _randomize(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))


def test_features_of_time_tell_times_apart() -> None:
    t = torch.linspace(0, 1, 200)
    angles = t.unsqueeze(-1) * TimeEmbedding(16).frequencies
    features = torch.cat([angles.sin(), angles.cos()], -1)
    distances = torch.cdist(features, features) + torch.eye(200) * 10
    assert float(distances.min()) > 0.05


@pytest.mark.parametrize("context_features", [0, 2])
def test_vectors(context_features: int) -> None:
    network = ScoreNetwork(3, 16, context_features=context_features, frequencies=2)
    x, t = torch.randn(5, 3), torch.rand(5)
    context = torch.randn(5, context_features) if context_features else None
    assert float(network(x, t, context).detach().abs().max()) == 0.0
    _randomize(network)
    output = network(x, t, context)
    assert output.shape == x.shape
    # every row is on its own
    torch.testing.assert_close(
        network(x[2:3], t[2:3], None if context is None else context[2:3]), output[2:3]
    )
    assert not torch.equal(output, network(x, 0.5 * t, context))
    if context is not None:
        assert not torch.equal(output, network(x, t, context + 1))


def test_waves_are_trained_and_fade_with_time() -> None:
    network = ScoreNetwork(2, 16, frequencies=4, max_frequency=10.0)
    assert network.waves is not None
    assert network.wave_gates is not None
    lengths = network.waves.detach().norm(dim=0)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 4.0, 7.0, 10.0]))
    _randomize(network)
    x, t = torch.randn(5, 2), torch.rand(5)
    network(x, t).square().sum().backward()
    for parameter in (network.waves, network.wave_gates.weight):
        assert parameter.grad is not None
        assert bool((parameter.grad.abs().sum(0) > 0).all())
    with torch.no_grad():
        before = network(x, t)
        network.waves.mul_(2)
        assert not torch.equal(network(x, t), before)
        network.wave_gates.weight.zero_()
        network.wave_gates.bias.fill_(-1000.0)
        faded = network(x, t)
        network.waves.mul_(2)
        torch.testing.assert_close(network(x, t), faded)
    assert ScoreNetwork(2).waves is None


def test_waves_that_are_finer_than_the_noise_fade() -> None:
    network = ScoreNetwork(
        2, 16, frequencies=3, max_frequency=9.0, noise_level=lambda t: 8 * t, residual_blocks=1
    )
    _randomize(network)
    x = torch.randn(5, 2)
    assert network.waves is not None
    with torch.no_grad():
        network.waves.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 9.0, 9.0]]))
        quiet, noisy = (network(x, torch.full((5,), t)) for t in (0.0, 1.0))
        network.waves[:, 1:].mul_(2)
        assert not torch.allclose(network(x, torch.zeros(5)), quiet)
        torch.testing.assert_close(network(x, torch.ones(5)), noisy, rtol=1e-9, atol=1e-9)
        network.waves[:, 0].mul_(2)
        assert not torch.allclose(network(x, torch.ones(5)), noisy)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("residual_blocks", [1, 2])
def test_images(shape: tuple[int, ...], residual_blocks: int) -> None:
    network = UNet(
        shape, 8, multipliers=(1, 2, 2), context_features=2, residual_blocks=residual_blocks
    )
    x, t, context = torch.randn(4, *shape), torch.rand(4), torch.randn(4, 2)
    assert float(network(x, t, context).detach().abs().max()) == 0.0
    _randomize(network)
    output = network(x, t, context)
    assert output.shape == x.shape
    torch.testing.assert_close(network(x[1:2], t[1:2], context[1:2]), output[1:2])
    assert not torch.equal(output, network(x, t, context + 1))
    loss = output.square().sum()
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert all(bool(g.abs().sum() > 0) for g in gradients)


@pytest.mark.parametrize(
    "settings",
    [{"hidden_channels": 12}, {"hidden_channels": 0}, {"multipliers": ()}, {"dropout": 1.0}],
    ids=str,
)
def test_settings_of_images_out_of_range(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        UNet((1, 8, 8), **settings)
