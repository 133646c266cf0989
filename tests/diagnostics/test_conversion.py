"""Conversion to ArviZ: what was sampled, what follows from it, what was observed."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from torch import Tensor

from pyro_ext import MCMC, ConstrainedHMC, to_arviz
from pyro_ext.diagnostics import deterministic_values


def model(shift: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    w = pyro.sample("w", dist.Gamma(2.0, 1.0))
    pyro.sample("x", dist.Normal(z[0], 1.0), obs=torch.tensor(0.5))
    pyro.deterministic("ratio", z[:2] / w + shift)
    pyro.deterministic("y", z.sum() * w)


_SHIFT = torch.tensor(10.0, dtype=torch.float64)


def run(num_chains: int = 3, **settings: Any) -> MCMC:
    conditioned = pyro.condition(model, {"y": torch.tensor(1.0)})
    mcmc = MCMC(
        ConstrainedHMC(conditioned, step_size=0.2, num_steps=2, adapt_step_size=False),
        12,
        0,
        num_chains=num_chains,
        disable_progbar=True,
        **settings,
    )
    mcmc.run(_SHIFT)
    return mcmc


@pytest.fixture
def mcmc() -> MCMC:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run()


def test_posterior_and_recomputed_deterministics(mcmc: MCMC) -> None:
    data = to_arviz(mcmc)
    samples = mcmc.get_samples(group_by_chain=True)
    assert set(data.posterior.data_vars) == {"z", "w", "ratio"}
    assert data.posterior["z"].shape == (3, 12, 3)
    np.testing.assert_array_equal(data.posterior["z"].values, samples["z"].numpy())
    expected = samples["z"][..., :2] / samples["w"][..., None] + _SHIFT
    np.testing.assert_allclose(data.posterior["ratio"].values, expected.numpy(), rtol=1e-14)


def test_observed_data(mcmc: MCMC) -> None:
    observed = to_arviz(mcmc).observed_data
    assert set(observed.data_vars) == {"x", "y"}
    # ArviZ before 1.0 gives a number one dimension
    assert observed["x"].values.item() == 0.5
    assert observed["y"].values.item() == 1.0


def test_statistics_of_the_draws(mcmc: MCMC) -> None:
    stats = to_arviz(mcmc).sample_stats
    assert set(stats.data_vars) == {
        "acceptance_rate", "n_steps", "energy", "step_size",
        "projection_iterations", "constraint_residual", "status", "diverging",
    }  # fmt: skip
    diagnostics = mcmc.diagnostics()
    for i in range(3):
        np.testing.assert_array_equal(
            stats["energy"].values[i], diagnostics["energy"][f"chain {i}"].numpy()
        )
    assert stats["diverging"].dtype == bool


def test_deterministics_can_be_left_out(mcmc: MCMC) -> None:
    assert set(to_arviz(mcmc, deterministics=False).posterior.data_vars) == {"z", "w"}


def test_divergences_of_many_chains_are_where_they_were(mcmc: MCMC) -> None:
    """Sorted as text, chain 10 would come before chain 2."""
    del mcmc
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        many = run(num_chains=12)
    for i, chain in enumerate(many._diagnostics):
        chain["divergences"] = [i % 6] if i in (2, 10, 11) else []
        chain["energy"] = torch.full((12,), float(i))
    stats = to_arviz(many).sample_stats
    expected = np.zeros((12, 12), dtype=bool)
    expected[2, 2] = expected[10, 4] = expected[11, 5] = True
    np.testing.assert_array_equal(stats["diverging"].values, expected)
    np.testing.assert_array_equal(stats["energy"].values[:, 0], np.arange(12.0))


def test_runs_of_stock_pyro() -> None:
    def plain() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.deterministic("total", z.sum())
        pyro.sample("x", dist.Normal(z[0], 1.0), obs=torch.tensor(0.5))

    stock = pyro.infer.MCMC(
        pyro.infer.NUTS(plain), num_samples=8, warmup_steps=5, disable_progbar=True
    )
    stock.run()
    data = to_arviz(stock)
    z = stock.get_samples(group_by_chain=True)["z"]
    np.testing.assert_allclose(data.posterior["total"].values, z.sum(-1).numpy())
    assert data.sample_stats["diverging"].shape == (1, 8)
    assert data.observed_data["x"].values.item() == 0.5


def test_the_constrained_kernel_under_stock_pyro() -> None:
    conditioned = pyro.condition(model, {"y": torch.tensor(1.0)})
    kernel = ConstrainedHMC(conditioned, step_size=0.2, num_steps=2, adapt_step_size=False)
    stock = pyro.infer.MCMC(kernel, num_samples=6, warmup_steps=0, disable_progbar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock.run(_SHIFT)
    data = to_arviz(stock)
    assert data.posterior["ratio"].shape == (1, 6, 2)
    assert data.sample_stats["energy"].shape == (1, 6)


def branching() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.deterministic("y", z**2 if z > 0 else -(z**2))


def in_plate() -> None:
    with pyro.plate("p", 2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("y", z * z.abs(), event_dim=0)


@pytest.mark.parametrize(
    ("program", "shape"), [(branching, ()), (in_plate, (2,))], ids=["branch", "plate"]
)
def test_deterministic_values(program: Callable[[], None], shape: tuple[int, ...]) -> None:
    z = torch.randn(2, 700, *shape)
    values = deterministic_values(program, {"z": z})
    torch.testing.assert_close(values, {"y": z * z.abs()})


def test_a_model_without_deterministics() -> None:
    def program() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    assert deterministic_values(program, {"z": torch.zeros(2, 3)}) == {}


def test_deterministics_are_not_made_up_from_prior_draws() -> None:
    """Of a latent site that was not saved, or that was summed out."""

    def program() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.deterministic("y", z + k)

    with pytest.raises(ValueError, match=r"\['k'\].*deterministics=False"):
        deterministic_values(program, {"z": torch.zeros(2, 3)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        some = run(save_params=["z"])
    with pytest.raises(ValueError, match=r"\['w'\].*deterministics=False"):
        to_arviz(some)
    assert set(to_arviz(some, deterministics=False).posterior.data_vars) == {"z"}


def test_without_arviz_the_cure_is_named(mcmc: MCMC, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install arviz"):
        to_arviz(mcmc)


def test_before_a_run_there_is_nothing_to_convert() -> None:
    kernel = ConstrainedHMC(pyro.condition(model, {"y": torch.tensor(1.0)}))
    with pytest.raises(RuntimeError, match=r"call MCMC\.run"):
        to_arviz(MCMC(kernel, 5))
