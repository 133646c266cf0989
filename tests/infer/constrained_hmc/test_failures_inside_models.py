"""An operation that raises inside the model costs the chain that caused it, not the run."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext.errors import VectorizationWarning
from pyro_ext.infer import MCMC, ConstrainedHMC
from pyro_ext.infer.constrained_hmc.dynamics.status import Status

X = torch.tensor([2.2, 2.1], dtype=torch.float64)


def model() -> None:
    rho = pyro.sample("rho", dist.Normal(0.0, 0.3))
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    one = torch.ones_like(rho)
    # positive definite for |rho| < 1 only, and the data pull rho towards one
    covariance = torch.stack([torch.stack([one, rho]), torch.stack([rho, one])])
    pyro.deterministic("x", torch.linalg.cholesky(covariance) @ noise)


def conditioned() -> object:
    return pyro.condition(model, {"x": X})


def log_density(rho: Tensor) -> Tensor:
    """Posterior of the correlation: p(rho) N(x; 0, [[1, rho], [rho, 1]])."""
    determinant = 1 - rho.square()
    quadratic = (X.square().sum() - 2 * rho * X.prod()) / determinant
    return -0.5 * (rho / 0.3).square() - 0.5 * quadratic - 0.5 * determinant.log()


def test_chains_whose_model_raises_are_rejected_and_the_others_are_right() -> None:
    kernel = ConstrainedHMC(conditioned(), step_size=0.9, num_steps=2, adapt_step_size=False)
    mcmc = MCMC(kernel, 150, 10, num_chains=8, disable_progbar=True)
    mcmc.run()
    rho = mcmc.get_samples()["rho"]
    status = torch.stack(list(mcmc.diagnostics()["status"].values()))
    assert (status == Status.DIVERGENT).any(), "no chain met the operation that raises"
    grid = torch.linspace(-0.9999, 0.9999, 20_001)
    weights = (log_density(grid) - log_density(grid).max()).exp()
    mean = float((weights * grid).sum() / weights.sum())
    assert mcmc.diagnostics()["rho"]["n_eff"] > 150
    error = rho.std() / mcmc.diagnostics()["rho"]["n_eff"].sqrt()
    assert abs(float(rho.mean()) - mean) < 5 * float(error)


def test_a_model_that_overwrites_what_its_derivative_needs_is_refused() -> None:
    def overwriting() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        series = torch.zeros(4)
        for t in range(3):
            series[t + 1] = a * series[t] + noise[t]
        pyro.deterministic("x", series[1:])

    kernel = ConstrainedHMC(pyro.condition(overwriting, {"x": torch.ones(3)}))
    with (
        pytest.warns(VectorizationWarning, match="once per chain"),
        pytest.raises(ValueError, match=r"overwrites a tensor.*torch\.stack"),
    ):
        kernel.setup(0)
