"""Lengths of the trajectories of ConstrainedHMC: given, jittered, adapted."""

import math
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext import MCMC, ConstrainedHMC
from pyro_ext.errors import SamplingWarning
from tests.infer.constrained_hmc.test_kernel import CONDITIONED, curved
from tests.infer.constrained_hmc.test_targets import sphere_model
from tests.sampling import sample
from tests.statistics import assert_moments

# -- given and jittered ---------------------------------------------------------------------------


def trajectories(kernel: ConstrainedHMC, step_size: float, number: int = 300) -> list[Any]:
    """Step size and number of steps of some trajectories."""
    kernel.setup(0)
    chains = kernel._chains._replace(step_size=step_size)
    return [kernel._trajectory(chains._replace(iteration=i)) for i in range(number)]


@pytest.mark.parametrize("jitter", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("step_size", [0.05, 0.31, 2.0])
def test_jitter_bounds_the_length_and_never_lengthens_the_step(
    jitter: float, step_size: float
) -> None:
    kernel = ConstrainedHMC(CONDITIONED, jitter=jitter, trajectory_length=1.5)
    lengths = []
    for step, num_steps in trajectories(kernel, step_size):
        assert step <= step_size * (1 + 1e-12)
        lengths.append(step * num_steps)
    assert max(lengths) <= 1.5 * (1 + jitter) * (1 + 1e-9)
    if step_size < 1.0:
        assert min(lengths) >= 1.5 * (1 - jitter) * (1 - 1e-6)
        assert (max(lengths) - min(lengths) > 0.5 * jitter) or jitter == 0


def test_number_of_steps() -> None:
    fixed = ConstrainedHMC(CONDITIONED, num_steps=4, jitter=0.0)
    assert set(trajectories(fixed, 0.1)) == {(0.1, 4)}
    jittered = ConstrainedHMC(CONDITIONED, num_steps=4, jitter=0.5)
    counts = {num_steps for _, num_steps in trajectories(jittered, 0.1)}
    assert counts == {2, 3, 4, 5, 6} or counts == {3, 4, 5, 6}
    bounded = ConstrainedHMC(CONDITIONED, max_num_steps=7)
    assert {num_steps for _, num_steps in trajectories(bounded, 1e-3)} == {7}
    assert all(step <= 1e-3 for step, _ in trajectories(bounded, 1e-3))


def test_num_steps_of_a_draw_are_recorded() -> None:
    kernel = ConstrainedHMC(CONDITIONED, num_steps=3, jitter=0.0, step_size=0.05)
    mcmc = MCMC(kernel, 4, 0, num_chains=2, disable_progbar=True)
    mcmc.run()
    for i in range(2):
        assert mcmc.diagnostics()["num_steps"][f"chain {i}"].tolist() == [3] * 4
        torch.testing.assert_close(
            mcmc.diagnostics()["step_size"][f"chain {i}"], torch.full((4,), 0.05)
        )


# -- adapted --------------------------------------------------------------------------------------


def line(sd: float, dim: int = 3) -> Any:
    """Data that give inputs of a posterior standard deviation, on a hyperplane."""
    noise = sd / math.sqrt(1 - sd**2)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([dim]).to_event(1))
        pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=torch.zeros(dim))
        pyro.deterministic("y", z.sum())

    return pyro.condition(model, {"y": torch.tensor(0.0)})


def adapted(
    model: Any, *, num_chains: int | None, warmup_steps: int, **settings: Any
) -> ConstrainedHMC:
    """A kernel after its warm-up."""
    kernel = ConstrainedHMC(model, trajectory_length="adapt", **settings)
    kernel.num_chains = num_chains
    kernel.setup(warmup_steps)
    for _ in range(warmup_steps):
        kernel.sample({})
    return kernel


def length_of(kernel: ConstrainedHMC) -> float:
    adaptation = kernel._chains.length
    assert adaptation is not None
    return math.exp(adaptation.log_length)


@pytest.mark.parametrize(
    ("num_chains", "warmup_steps"), [(50, 30), (8, 60), (None, 120)], ids=["many", "some", "one"]
)
@pytest.mark.parametrize("sd", [0.05, 0.9])
def test_the_length_follows_the_scale(
    sd: float, num_chains: int | None, warmup_steps: int
) -> None:
    """Somewhat less than a quarter turn of the oscillation around the mean."""
    kernel = adapted(line(sd), num_chains=num_chains, warmup_steps=warmup_steps)
    assert 1.0 < length_of(kernel) / sd < 2.0


def test_the_length_follows_the_radius() -> None:
    found = [
        length_of(adapted(curved(r), num_chains=20, warmup_steps=30, use_fallback=False))
        for r in (0.5, 3.0)
    ]
    assert found[1] > 2.5 * found[0]


def test_the_length_is_frozen_after_warm_up() -> None:
    kernel = ConstrainedHMC(CONDITIONED, trajectory_length="adapt")
    kernel.num_chains = 4
    kernel.setup(8)
    lengths = []
    for _ in range(14):
        kernel.sample({})
        lengths.append(length_of(kernel))
    assert len(set(lengths[:7])) > 4
    assert len(set(lengths[7:])) == 1
    kernel.setup(0)
    assert kernel._chains.length is None, "a new run starts anew"


def test_lengths_of_a_run_are_reported() -> None:
    mcmc = MCMC(ConstrainedHMC(CONDITIONED, trajectory_length="adapt"), 7, 8, num_chains=3)
    mcmc._disable_progbar = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SamplingWarning)
        mcmc.run()
    diagnostics = mcmc.diagnostics()
    reported = diagnostics["trajectory_length"]["chain 1"]
    taken = diagnostics["num_steps"]["chain 1"] * diagnostics["step_size"]["chain 1"]
    completed = diagnostics["status"]["chain 1"] == 0
    torch.testing.assert_close(reported[completed], taken[completed])
    assert "trajectory length" in mcmc.kernel.summary()


def test_a_number_of_steps_wins() -> None:
    kernel = adapted(CONDITIONED, num_chains=4, warmup_steps=6, num_steps=2, jitter=0.0)
    assert kernel._chains.length is None
    assert kernel._trajectory(kernel._chains) == (kernel._chains.step_size, 2)


def test_too_few_steps_are_warned_of() -> None:
    kernel = adapted(
        line(0.9), num_chains=8, warmup_steps=60, step_size=0.05, adapt_step_size=False,
        max_num_steps=6, jitter=0.0,
    )  # fmt: skip
    with pytest.warns(SamplingWarning, match=r"max_num_steps=6 steps.*Raise max_num_steps"):
        kernel.cleanup()


@pytest.mark.parametrize("length", ["adaptive", "", -1.0, 0])
def test_lengths_that_are_none_are_refused(length: Any) -> None:
    with pytest.raises(ValueError, match=rf"trajectory_length must be .*got {length!r}"):
        ConstrainedHMC(CONDITIONED, trajectory_length=length)


def test_sphere() -> None:
    """Where the distance from the mean never changes."""
    model, data = sphere_model(3, "square")
    how: dict[str, Any] = {"trajectory_length": "adapt", "use_fallback": False, "num_chains": 50}
    x: Tensor = sample(model, data, **how)["x"]
    radius = float(data["output"]) ** 0.5
    assert_moments(
        x, torch.zeros(3), covariance=radius**2 / 3 * torch.eye(3), min_ess=300, name="x"
    )
