"""Chains run together, in turn or by Pyro's own driver give draws of one distribution."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from torch import Tensor

from pyro_ext import MCMC, ConstrainedHMC
from tests.statistics import Quadrature, assert_moments, assert_same_mean

OBSERVED = 1.0
MIN_ESS = 100


def model() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.Gamma(3.0, 2.0))
    pyro.deterministic("y", z.exp() - noise)


def kernel() -> ConstrainedHMC:
    return ConstrainedHMC(pyro.condition(model, {"y": torch.tensor(OBSERVED)}))


def vectorized(num_samples: int = 50, warmup_steps: int = 30) -> dict[str, Tensor]:
    mcmc = MCMC(kernel(), num_samples, warmup_steps, num_chains=40, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples(group_by_chain=True)


def sequential(num_samples: int = 150, warmup_steps: int = 50) -> dict[str, Tensor]:
    mcmc = MCMC(
        kernel(),
        num_samples,
        warmup_steps,
        num_chains=2,
        chain_method="sequential",
        disable_progbar=True,
    )
    mcmc.run()
    return mcmc.get_samples(group_by_chain=True)


def stock(num_samples: int = 600, warmup_steps: int = 50) -> dict[str, Tensor]:
    mcmc = pyro.infer.MCMC(kernel(), num_samples, warmup_steps=warmup_steps, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples(group_by_chain=True)


RUNNERS = {"vectorized": vectorized, "sequential": sequential, "stock": stock}


def truth() -> Quadrature:
    """Of ``z``; the noise is what is left of the output."""

    def log_density(z: Tensor) -> Tensor:
        return dist.Normal(0.0, 1.0).log_prob(z) + dist.Gamma(3.0, 2.0).log_prob(
            z.exp() - OBSERVED
        )

    return Quadrature(log_density, (0.0, 8.0, 20_000))


@pytest.mark.slow
def test_chain_methods_agree() -> None:
    exact = truth()
    draws = {name: run() for name, run in RUNNERS.items()}
    for name, values in draws.items():
        assert_moments(values["z"], exact.mean(), exact.sd(), min_ess=MIN_ESS, name=name)
    for other in ("sequential", "stock"):
        for site in ("z", "noise"):
            a, b = draws["vectorized"][site], draws[other][site]
            name = f"{site}, vectorized and {other},"
            assert_same_mean(a, b, min_ess=MIN_ESS, name=f"mean of {name}")
            assert_same_mean(a.log(), b.log(), min_ess=MIN_ESS, name=f"mean log of {name}")
            assert_same_mean(a.square(), b.square(), min_ess=MIN_ESS, name=f"square of {name}")


@pytest.mark.parametrize("run", RUNNERS.values(), ids=RUNNERS.keys())
def test_seed_decides_the_draws(run: Callable[[int, int], dict[str, Tensor]]) -> None:
    runs = []
    for seed in (3, 3, 4):
        pyro.set_rng_seed(seed)
        runs.append(run(3, 3))
    for site in ("z", "noise"):
        assert torch.equal(runs[0][site], runs[1][site])
        assert not torch.isclose(runs[0][site], runs[2][site]).all()


def test_chains_differ() -> None:
    z = vectorized(3, 3)["z"]
    assert len(z[:, 0].unique()) == len(z)
