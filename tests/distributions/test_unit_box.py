"""The uniform distribution on a closed box."""

import pyro.distributions as dist
import pytest
import torch

from pyro_ext.distributions.unit_box import UnitBox


def _box(features: int = 2, *batch_shape: int) -> UnitBox:
    return UnitBox(torch.zeros(features)).expand(torch.Size(batch_shape))


def test_the_density_is_one_in_the_closed_box_and_zero_outside() -> None:
    x = torch.tensor([[0.0, 1.0], [0.3, 0.7], [-1e-12, 0.5], [0.5, 1.0 + 1e-12], [0.5, torch.nan]])
    log_density = _box().log_prob(x)
    assert log_density.tolist()[:4] == [0.0, 0.0, -torch.inf, -torch.inf]
    assert not log_density[4] == 0.0


@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)], ids=str)
def test_shapes(batch_shape: tuple[int, ...]) -> None:
    box = _box(4, *batch_shape)
    assert box.batch_shape == batch_shape
    assert box.event_shape == (4,)
    draws = box.rsample((5,))
    assert draws.shape == (5, *batch_shape, 4)
    assert box.log_prob(draws).shape == (5, *batch_shape)
    wider = box.expand((7, *batch_shape))
    assert wider.sample().shape == (7, *batch_shape, 4)


def test_draws_are_those_of_uniform_numbers() -> None:
    torch.manual_seed(3)
    draws = _box(3).rsample((4000,))
    torch.manual_seed(3)
    assert torch.equal(draws, dist.Uniform(torch.zeros(3), torch.ones(3)).sample((4000,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_precision_is_that_of_the_tensor_it_is_like(dtype: torch.dtype) -> None:
    box = UnitBox(torch.zeros(2, dtype=dtype))
    draws = box.sample((3,))
    assert draws.dtype == dtype
    assert box.log_prob(draws).dtype == dtype
