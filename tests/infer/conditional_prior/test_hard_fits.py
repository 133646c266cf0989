"""Thousands of fits to hard evidence: none ends in NaN, and none worse than it began."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_ext import ConditionalPriorGuide
from pyro_ext.ops.rows import RowStatus
from pyro_ext.poutine import condition_on

ROWS, SIZE, LATENTS = 625, 16, 3


def _hard_problem(likelihood: str, dtype: torch.dtype, gain: float) -> tuple[nn.Module, Tensor]:
    """A steep decoder, and data that are noise to it."""
    decoder = nn.Sequential(nn.Linear(LATENTS, 24), nn.ReLU(), nn.Linear(24, SIZE)).to(dtype)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(gain)
    noise = torch.randn(ROWS, SIZE, dtype=dtype)
    return decoder, (noise > 0).to(dtype) if likelihood == "bernoulli" else 5 * noise


def _fit(flow: str, likelihood: str, dtype: torch.dtype, gain: float) -> None:
    decoder, data = _hard_problem(likelihood, dtype, gain)
    # from no pixel to all of them, most rows with few
    count = (SIZE * torch.rand(ROWS, 1) ** 3).round()
    mask = torch.rand(ROWS, SIZE).argsort(-1) < count

    def model() -> None:
        with pyro.plate("rows", ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS, dtype=dtype), 1.0).to_event(1))
            h = decoder(z)
            fn = dist.Bernoulli(logits=h) if likelihood == "bernoulli" else dist.Normal(h, 0.01)
            pyro.sample("x", fn.to_event(1))

    options = {"num_layers": 4} if flow == "planar" else {}
    guide = ConditionalPriorGuide(condition_on(model, {"x": data}, {"x": mask}), flow, **options)
    guide.setup()
    torch.manual_seed(1)
    start = guide.c_elbo(200)
    result = guide.fit(progress=False, num_particles=60, max_iter=25)
    torch.manual_seed(1)
    end = guide.c_elbo(200)
    assert guide.psi.isfinite().all()
    assert result.c_elbo.isfinite().all()
    assert result.held_out_c_elbo.isfinite().all()
    assert (result.status != RowStatus.NOT_FINITE).all()
    # on the noise of the fit up to rounding, on fresh noise up to what 60 draws can tell
    assert (result.c_elbo >= result.trace[0] - 1e-6).all()
    assert (end >= start - 0.05 * start.abs() - 0.5).all()
    assert guide.sample_query(2)["x"].isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_ext.errors.SamplingWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
@pytest.mark.parametrize("flow", ["gvi", "planar"])
def test_5000_hard_fits(flow: str, likelihood: str, dtype: torch.dtype) -> None:
    """625 rows for each of eight cases."""
    _fit(flow, likelihood, dtype, gain=10.0)


@pytest.mark.filterwarnings("ignore::pyro_ext.errors.SamplingWarning")
@pytest.mark.parametrize("flow", ["spline", "fcn"])
def test_hard_fits_of_the_other_flows(flow: str) -> None:
    decoder, data = _hard_problem("bernoulli", torch.float32, 10.0)
    data, rows = data[:40], 40

    def model() -> None:
        with pyro.plate("rows", rows):
            prior = dist.Normal(torch.zeros(LATENTS, dtype=torch.float32), 1.0)
            z = pyro.sample("z", prior.to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1))

    guide = ConditionalPriorGuide(condition_on(model, {"x": data}), flow, hidden_features=8)
    result = guide.fit(progress=False, num_particles=60, max_iter=30)
    assert guide.psi.isfinite().all()
    assert result.held_out_c_elbo.isfinite().all()
    assert (result.c_elbo >= result.trace[0]).all()
