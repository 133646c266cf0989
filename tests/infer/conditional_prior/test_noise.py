"""Noise that is drawn once."""

import pyro.distributions as dist
import pytest
import torch

from pyro_ext.infer.conditional_prior.noise import base_distribution, check_base, fixed_noise

LIKE = torch.zeros(1, dtype=torch.float64)


@pytest.mark.parametrize("features", [1, 2, 10])
@pytest.mark.parametrize("num", [30, 500])
def test_first_two_moments_are_exact(num: int, features: int) -> None:
    noise = fixed_noise("normal", num, features, LIKE)
    assert noise.shape == (num, features)
    torch.testing.assert_close(noise.mean(0), torch.zeros(features), rtol=0, atol=1e-12)
    torch.testing.assert_close(noise.T @ noise / num, torch.eye(features), rtol=0, atol=1e-10)


def test_higher_moments_are_closer_than_those_of_draws() -> None:
    def error(noise: torch.Tensor) -> torch.Tensor:
        x = noise[:, 0]
        return (x.cos().mean() - torch.tensor(-0.5).exp()).abs() + (x.pow(4).mean() - 3).abs()

    fixed = torch.stack([error(fixed_noise("normal", 500, 2, LIKE)) for _ in range(20)]).mean()
    drawn = torch.stack([error(torch.randn(500, 2)) for _ in range(20)]).mean()
    assert fixed < 0.3 * drawn


def test_noise_follows_torch_seed_and_dtype() -> None:
    like = torch.zeros(1, dtype=torch.float32)
    torch.manual_seed(1)
    first, other = fixed_noise("normal", 50, 3, like), fixed_noise("normal", 50, 3, like)
    torch.manual_seed(1)
    again = fixed_noise("normal", 50, 3, like)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "base", [dist.StudentT(5.0), dist.Laplace(torch.zeros(3), 1.0).to_event(1)], ids=["one", "vec"]
)
def test_other_noise(base: dist.TorchDistribution) -> None:
    check_base(base)
    assert fixed_noise(base, 20, 3, LIKE).shape == (20, 3)
    assert base_distribution(base, 3, LIKE).event_shape == (3,)


def test_noise_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"base='cauchy': give 'normal'"):
        check_base("cauchy")
    with pytest.raises(ValueError, match=r"batch shape \(3,\).*without a batch"):
        check_base(dist.Normal(torch.zeros(3), 1.0))
    with pytest.raises(ValueError, match=r"distribution of 3 numbers, but .* 2 latents"):
        base_distribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), 2, LIKE)
