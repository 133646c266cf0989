"""ConstrainedNUTS as a kernel: protocol, settings, known posteriors, warnings."""

import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from torch import Tensor

from pyro_ext import MCMC, ConstrainedNUTS
from pyro_ext.errors import SamplingWarning
from pyro_ext.infer.constrained_hmc import Status
from tests.infer.constrained_hmc.test_kernel import CONDITIONED, curved, residual
from tests.infer.constrained_hmc.test_posteriors import (
    SERIES,
    check_two,
    parameters,
    series_truth,
    step_by_step,
)
from tests.infer.constrained_hmc.test_targets import (
    check_skewed,
    gaussian_conditional,
    linear_problem,
    skewed_model,
)
from tests.sampling import sample
from tests.statistics import assert_moments

# runs this short are not good ones
pytestmark = pytest.mark.filterwarnings("ignore::pyro_ext.errors.SamplingWarning")


def statistic(mcmc: Any, name: str) -> Tensor:
    """Of every chain and draw."""
    return torch.stack(list(mcmc.diagnostics()[name].values()))


def test_protocol_of_stock_pyro() -> None:
    kernel = ConstrainedNUTS(CONDITIONED, max_tree_depth=3)
    mcmc = pyro.infer.MCMC(kernel, num_samples=8, warmup_steps=5, disable_progbar=True)
    mcmc.run(0.25)
    samples = mcmc.get_samples()
    assert {name: tuple(value.shape) for name, value in samples.items()} == {
        "a": (8,),
        "z": (8, 3),
    }
    assert residual(samples, 0.25) <= 1e-8
    names = {"divergences", "acceptance rate", "status", "tree_depth", "trajectory_length"}
    assert names <= mcmc.diagnostics().keys()
    copy = pickle.loads(pickle.dumps(kernel))
    assert copy.max_tree_depth == 3
    assert copy.chain_diagnostics() == []


@pytest.mark.parametrize(
    "settings",
    [
        {"projection": "newton"},
        {"num_inner_steps": 2},
        {"jacobian_mode": "reverse"},
        {"use_fallback": False},
        {"adapt_mass_matrix": True},
        {"max_tree_depth": 1},
        {"step_size": 0.2, "adapt_step_size": False},
    ],
    ids=str,
)
def test_every_setting_samples_the_manifold(settings: dict[str, Any]) -> None:
    settings = {"max_tree_depth": 3, **settings}
    kernel = ConstrainedNUTS(CONDITIONED, **settings)
    warmup_steps = 20 if kernel.adapt_mass_matrix else 4
    mcmc = MCMC(kernel, 5, warmup_steps, num_chains=4, disable_progbar=True)
    mcmc.run()
    assert residual(mcmc.get_samples()) <= 1e-8
    assert (statistic(mcmc, "tree_depth") <= kernel.max_tree_depth).all()
    z = mcmc.get_samples(group_by_chain=True)["z"]
    has_moved = (z[:, 1:] - z[:, :-1]).abs().amax((-1, -2)) > 1e-3
    assert int(has_moved.sum()) >= 2


def test_statistics_of_a_draw_fit_together() -> None:
    kernel = ConstrainedNUTS(
        CONDITIONED, step_size=0.4, adapt_step_size=False, use_fallback=False, max_tree_depth=5
    )
    mcmc = MCMC(kernel, 8, 0, num_chains=10, disable_progbar=True)
    mcmc.run()
    depth, steps = statistic(mcmc, "tree_depth"), statistic(mcmc, "num_steps")
    assert len(set(depth.flatten().tolist())) >= 2
    assert (steps >= 2**depth - 1).all()
    assert (steps < 2 ** (depth + 1)).all()
    length = statistic(mcmc, "trajectory_length")
    torch.testing.assert_close(length, 0.4 * (2.0**depth - 1))
    assert mcmc.kernel.summary().startswith("ConstrainedNUTS: 10 chains x 8 draws")
    assert "cut short: " in mcmc.kernel.summary()


# -- known posteriors -----------------------------------------------------------------------------


@pytest.mark.slow
def test_skewed_target() -> None:
    check_skewed(sample(skewed_model, {"y": 1.5}, kernel=ConstrainedNUTS))


def test_linear_generator_gives_the_conditional_normal() -> None:
    loc, scale, matrix, observed = linear_problem(5, 2)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(loc, scale).to_event(1))
        pyro.deterministic("y", matrix @ x)

    draws = sample(model, {"y": observed}, kernel=ConstrainedNUTS)["x"]
    mean, covariance = gaussian_conditional(
        loc, scale.square().diag(), matrix, torch.zeros(2, 2), observed
    )
    assert_moments(draws, mean, covariance=covariance, min_ess=1500, name="x")


@pytest.mark.slow
def test_time_series() -> None:
    data = {f"value_{t}": value for t, value in enumerate(SERIES)}
    draws = sample(step_by_step, data, kernel=ConstrainedNUTS, num_chains=60, num_samples=60)
    check_two(parameters(draws), series_truth())


# -- what goes wrong ------------------------------------------------------------------------------


def test_trajectories_at_the_largest_depth_are_warned_of() -> None:
    kernel = ConstrainedNUTS(CONDITIONED, step_size=0.01, adapt_step_size=False, max_tree_depth=2)
    mcmc = MCMC(kernel, 12, 0, num_chains=2, disable_progbar=True)
    with pytest.warns(SamplingWarning, match=r"reached max_tree_depth=2.*adapt_mass_matrix"):
        mcmc.run()


def test_many_failures_are_warned_of_and_the_rest_is_used() -> None:
    kernel = ConstrainedNUTS(
        CONDITIONED, step_size=1.5, adapt_step_size=False, use_fallback=False, max_tree_depth=4
    )
    mcmc = MCMC(kernel, 12, 0, num_chains=10, disable_progbar=True)
    with pytest.warns(SamplingWarning, match=r"of the trajectories failed"):
        mcmc.run()
    status, moved = statistic(mcmc, "status"), statistic(mcmc, "is_accepted").bool()
    assert (moved & (status != Status.CONVERGED)).any()


@pytest.mark.parametrize("depth", [0, -2])
def test_depth_must_be_positive(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"max_tree_depth must be .* whole number, got {depth}"):
        ConstrainedNUTS(CONDITIONED, max_tree_depth=depth)


@pytest.mark.parametrize("start", [1e-3, 3.0])
def test_the_step_size_adapts_to_the_curvature(start: float) -> None:
    """Though on a circle nothing but failed steps says that one is too long."""
    found = []
    for radius in (0.1, 1.0):
        kernel = ConstrainedNUTS(curved(radius), step_size=start, max_tree_depth=3)
        kernel.num_chains = 8
        kernel.setup(30)
        for _ in range(30):
            kernel.sample({})
        found.append(float(kernel._chains.step_size))
    assert 0.01 < found[0] < 0.3
    assert 0.1 < found[1] < 3.0
    assert found[0] < 0.4 * found[1]
