"""Standardisation: mean and scale from data, and what to do where there is no scale."""

import pytest
import torch

from pyro_ext.distributions.transforms import ShiftAndScale, Standardize


def _layer(features: int = 3) -> Standardize:
    return Standardize(torch.zeros(features), torch.ones(features))


def test_data_are_standardised() -> None:
    layer = _layer()
    x = torch.tensor([5.0, -1e3, 1e-4]) + torch.tensor([1.0, 100.0, 1e-6]) * torch.randn(500, 3)
    layer.initialize(x)
    z, log_det = layer.to_noise(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), rtol=0, atol=1e-8)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3), rtol=0, atol=1e-8)
    torch.testing.assert_close(log_det, -layer.scale.log().sum().expand(500))
    torch.testing.assert_close(layer.to_data(z)[0], x, rtol=1e-12, atol=1e-12)


def test_it_is_saved_but_not_trained() -> None:
    layer = _layer()
    layer.initialize(torch.randn(10, 3))
    assert not list(layer.parameters())
    other = _layer()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.loc, layer.loc)
    assert torch.equal(other.scale, layer.scale)


@pytest.mark.parametrize("value", [0.0, 0.1, -1.7, 1e6 / 3, 1e-20])
@pytest.mark.parametrize("number", [1, 2, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_constant_features_keep_the_scale_one(
    value: float, number: int, dtype: torch.dtype
) -> None:
    """Also where the mean is rounded, and so the deviation not quite zero."""
    layer = _layer(2).to(dtype)
    x = torch.full((number, 2), value, dtype=dtype)
    x[:, 1] = torch.arange(number)
    layer.initialize(x)
    assert float(layer.scale[0]) == 1.0
    assert number == 1 or float(layer.scale[1]) == pytest.approx(float(x[:, 1].std(correction=0)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_are_no_numbers_are_refused(bad: float) -> None:
    layer = _layer()
    x = torch.randn(10, 3)
    x[4, 1] = bad
    with pytest.raises(ValueError, match=r"finite"):
        layer.initialize(x)
    assert torch.equal(layer.loc, torch.zeros(3))  # nothing half done


@pytest.mark.parametrize("shape", [(0, 3), (10, 2), (3,), (10, 3, 1)], ids=str)
def test_data_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(n, 3\)"):
        _layer().initialize(torch.randn(shape))


@pytest.mark.parametrize(
    ("loc", "scale"),
    [(0.0, 0.0), (0.0, -1.0), (0.0, float("inf")), (float("nan"), 1.0), (float("inf"), 1.0)],
)
def test_bad_scales_are_refused(loc: float, scale: float) -> None:
    with pytest.raises(ValueError, match="has to be positive"):
        Standardize(torch.full((2,), loc), torch.full((2,), scale))


def test_trained_shift_and_scale() -> None:
    layer = ShiftAndScale(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1e-12]))
    x = torch.randn(5, 2)
    z, log_det = layer.to_noise(x)
    torch.testing.assert_close(z, (x - layer.loc) / torch.tensor([0.5, 1e-12]))
    jacobian = torch.autograd.functional.jacobian(lambda row: layer.to_noise(row)[0], x[0])
    torch.testing.assert_close(log_det[0], jacobian.logdet())
    back, log_det_back = layer.to_data(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(log_det_back, -log_det)
    assert [name for name, _ in layer.named_parameters()] == ["loc", "log_scale"]
