"""Measures against other libraries and numbers worked out by hand."""

import arviz
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from pyro_ext.infer.conditional_prior.importance import importance_bound, pareto_k
from pyro_ext.infer.conditional_prior.metrics import (
    average_ssim,
    average_standard_deviation,
    log_mean_exp,
)


@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("window", [3, 7])
def test_average_ssim_is_that_of_every_draw(batch_shape: tuple[int, ...], window: int) -> None:
    original = torch.rand(*batch_shape, 13, 9)
    draws = original + torch.rand(5, *batch_shape, 13, 9)
    found = average_ssim(draws, original, data_range=2.0, window=window)
    assert found.shape == batch_shape
    one = original.reshape(-1, 13, 9)[-1].numpy()
    expected = [
        structural_similarity(
            draw.reshape(-1, 13, 9)[-1].numpy(), one, data_range=2.0, win_size=window
        )
        for draw in draws
    ]
    assert float(found.reshape(-1)[-1]) == pytest.approx(sum(expected) / 5, abs=1e-10)


def test_ssim_of_constant_images() -> None:
    """Without variance only the term of the means is left."""
    a, b, c1 = 0.2, 0.8, 0.01**2
    found = average_ssim(torch.full((2, 8, 8), a), torch.full((8, 8), b))
    assert float(found) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))


@pytest.mark.parametrize("window", [1, 4, 9])
def test_windows_that_do_not_fit_are_refused(window: int) -> None:
    with pytest.raises(ValueError, match=rf"window={window} does not fit images of 8 x 8"):
        average_ssim(torch.rand(2, 8, 8), torch.rand(8, 8), window=window)


def test_draws_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 8, 7\), which is not .* \(8, 8\)"):
        average_ssim(torch.rand(2, 8, 7), torch.rand(8, 8))


def test_average_standard_deviation() -> None:
    completed = torch.tensor([[[0.0, 1.0], [2.0, 2.0]], [[2.0, 1.0], [2.0, 2.0]]])
    expected = torch.tensor([2.0**0.5 / 2, 0.0])
    torch.testing.assert_close(average_standard_deviation(completed), expected)
    torch.testing.assert_close(average_standard_deviation(completed, 2), expected.mean())
    assert average_standard_deviation(completed.long(), 0).shape == (2, 2)


def test_log_mean_exp() -> None:
    values = torch.tensor([[-1000.0, 0.0], [-1000.0, 1.0]])
    expected = torch.tensor([-1000.0, float(torch.tensor([0.0, 1.0]).exp().mean().log())])
    torch.testing.assert_close(log_mean_exp(values), expected)


def _log_weights(k: float, num: int) -> Tensor:
    """Weights whose tail has shape k: those of a Pareto distribution."""
    uniform = (torch.arange(num) + 0.5) / num
    return -k * uniform.log()


@pytest.mark.parametrize("k", [0.1, 0.5, 0.9])
def test_pareto_k_of_pareto_weights(k: float) -> None:
    assert float(pareto_k(_log_weights(k, 5000)[:, None])) == pytest.approx(k, abs=0.07)


def test_pareto_k_is_that_of_arviz() -> None:
    log_weights = 1.5 * torch.randn(2000, 4)
    _, expected = arviz.psislw(log_weights.T.numpy().copy())
    found = pareto_k(log_weights)
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=0.02)


def test_pareto_k_of_weights_that_say_nothing() -> None:
    equal = torch.zeros(100)
    one = torch.full((100,), -1e4)
    one[3] = 0.0
    broken = torch.zeros(100)
    broken[0] = float("nan")
    found = pareto_k(torch.stack([equal, one, broken], -1))
    assert found.tolist() == [-float("inf"), float("inf"), float("inf")]


def test_too_few_draws_for_a_tail() -> None:
    with pytest.raises(ValueError, match=r"10 draws are too few"):
        pareto_k(torch.randn(10, 1))


def test_importance_bound_lies_between_elbo_and_evidence() -> None:
    """Weights p/q of Normal(0, 1) over Normal(1, 1): the evidence is 1, its logarithm 0."""
    z = 1 + torch.randn(20_000, 2)
    log_weights = 0.5 * (z - 1) ** 2 - 0.5 * z**2
    bound = importance_bound(log_weights, torch.Size([2]))
    torch.testing.assert_close(bound.log_evidence, torch.zeros(2), rtol=0, atol=0.06)
    torch.testing.assert_close(bound.c_elbo, torch.full((2,), -0.5), rtol=0, atol=0.05)
    # E[w]^2 / E[w^2] = 1 / e
    fraction = bound.effective_sample_size / 20_000
    torch.testing.assert_close(fraction, torch.full((2,), 0.368), rtol=0, atol=0.06)
