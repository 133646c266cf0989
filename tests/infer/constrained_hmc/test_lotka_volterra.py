"""The stochastic Lotka-Volterra model of Graham and Storkey (2017), section 7.1, to the truth."""

import arviz
import numpy as np
import pyro
import pytest
import torch
from torch import Tensor

from pyro_ext import MCMC, ConstrainedHMC
from tests.sampling import LARGEST_RESIDUAL, residuals
from tests.statistics import assert_moments
from tutorials.lotka_volterra.simulator import model, observed_data

# By quadrature over two independent pairs of parameters, and within one Monte Carlo standard
# error of 100,000 NUTS draws from the tractable likelihood.
MEAN = torch.tensor([0.407212, 0.00504589, 0.0537741, 0.00101746], dtype=torch.float64)
SD = torch.tensor([0.008363, 9.570e-5, 0.0029784, 4.153e-5], dtype=torch.float64)
LOG_MEAN = torch.tensor([-0.898632, -5.289360, -2.924505, -6.891286], dtype=torch.float64)
LOG_SD = torch.tensor([0.020548, 0.018974, 0.055600, 0.040903], dtype=torch.float64)

NUM_CHAINS = 64
NUM_SAMPLES = 30
MIN_ESS = 400


@pytest.mark.slow
def test_every_chain_goes_from_the_prior_to_the_posterior() -> None:
    x = observed_data()
    kernel = ConstrainedHMC(pyro.condition(model, {"x": x}))
    mcmc = MCMC(kernel, NUM_SAMPLES, warmup_steps=70, num_chains=NUM_CHAINS, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)
    theta = draws["theta"]
    assert theta.shape == (NUM_CHAINS, NUM_SAMPLES, 4)

    assert residuals(mcmc).max() <= LARGEST_RESIDUAL
    check_chains(theta.log(), mcmc)
    for i in range(4):
        log_theta = theta[..., i].log().numpy()
        for method in ("bulk", "tail", "sd"):
            ess = float(arviz.ess(log_theta, method=method))
            assert ess >= MIN_ESS, f"too few effective draws ({method}) for theta{i + 1}: {ess}"
        assert float(arviz.rhat(log_theta)) < 1.05

    assert_moments(theta, MEAN, SD, min_ess=MIN_ESS, name="theta")
    assert_moments(theta.log(), LOG_MEAN, LOG_SD, min_ess=MIN_ESS, name="log theta")
    # given the data the two pairs of parameters are independent
    z = (theta.log() - LOG_MEAN) / LOG_SD
    correlation = torch.tensor(
        [[1, 0.971, 0, 0], [0.971, 1, 0, 0], [0, 0, 1, 0.834], [0, 0, 0.834, 1]]
    )
    assert_moments(z, torch.zeros(4), covariance=correlation, min_ess=MIN_ESS, name="z")


def check_chains(log_theta: Tensor, mcmc: MCMC) -> None:
    """No chain is stuck or elsewhere."""
    distance = (log_theta.mean(1) - LOG_MEAN).abs() / LOG_SD
    far = (distance.amax(-1) > 3).nonzero().flatten().tolist()
    assert not far, f"chains {far} are {distance.amax(-1)[far].tolist()} posterior sd away"
    # the spread within every chain, from 30 draws or the equivalent of far fewer
    spread = log_theta.std(1) / LOG_SD
    assert spread.min() > 0.3
    assert spread.max() < 3
    rates = mcmc.diagnostics()["acceptance rate"]
    assert np.min(list(rates.values())) > 0.3
