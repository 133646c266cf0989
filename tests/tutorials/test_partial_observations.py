"""The tutorial on partial observations: simulator, particle filter, weights and figures."""

import io
import math
from types import ModuleType
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from pyro_ext import MCMC, ConstrainedHMC
from tests.statistics import effective_sample_size
from tests.tutorials.conftest import load_siblings


@pytest.fixture(scope="module")
def neuron() -> ModuleType:
    return load_siblings("partial_observations", "neuron")[0]


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    pytest.importorskip("matplotlib")
    return load_siblings("partial_observations", "figures")[0]


def recorded(neuron: ModuleType, recording: Any, seed: int = 1) -> Tensor:
    every = recording.steps_between
    return neuron.true_path(recording, seed)[every - 1 :: every, 0]


def test_model_follows_the_equations(neuron: ModuleType) -> None:
    recording = neuron.Recording(3, 2)
    nodes = pyro.poutine.trace(neuron.neuron_model).get_trace(recording).nodes
    epsilon, gamma, beta, sigma = nodes["theta"]["value"].tolist()
    noise = nodes["noise"]["value"].reshape(-1, 2).tolist()
    v, r = neuron.START_VOLTAGE, float(nodes["start"]["value"])
    path = []
    for noise_v, noise_r in noise:
        v, r = (
            v + 0.05 * (v - v**3 - r) / epsilon + math.sqrt(0.05) * 0.1 * noise_v,
            r + 0.05 * (gamma * v - r + beta) + math.sqrt(0.05) * sigma * noise_r,
        )
        path.append([v, r])
    torch.testing.assert_close(nodes["path"]["value"], torch.tensor(path))
    for i in range(3):
        assert float(nodes[f"v_{i}"]["value"]) == pytest.approx(path[2 * i + 1][0], rel=1e-12)


def test_true_path_is_one_of_the_models(neuron: ModuleType) -> None:
    recording = neuron.Recording(4, 3)
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(12, 2, generator=generator, dtype=torch.float64).reshape(4, 3, 2)
    loc, scale = torch.tensor(neuron.PRIOR_LOC), torch.tensor(neuron.PRIOR_SCALE)
    epsilon, gamma, beta, sigma = neuron.THETA_TRUE
    raw = torch.tensor([math.log(epsilon), math.log(gamma), beta, math.log(sigma)])
    latents = {"inputs": (raw - loc) / scale, "start": torch.tensor(0.0), "noise": noise}
    nodes = pyro.poutine.trace(pyro.condition(neuron.neuron_model, latents)).get_trace(recording)
    torch.testing.assert_close(nodes.nodes["theta"]["value"], torch.tensor(neuron.THETA_TRUE))
    torch.testing.assert_close(nodes.nodes["path"]["value"], neuron.true_path(recording, 7))


def test_simulation_goes_on_from_recorded_voltages(neuron: ModuleType) -> None:
    recording = neuron.Recording(2, 1)
    data = neuron.recorded_sites(torch.tensor([0.7, -0.2]))
    assert list(data) == ["v_0", "v_1"]
    conditioned = pyro.condition(neuron.neuron_model, data)
    nodes = pyro.poutine.trace(conditioned).get_trace(recording).nodes
    epsilon = float(nodes["theta"]["value"][0])
    r = float(nodes["path"]["value"][0, 1])
    noise = float(nodes["noise"]["value"][1, 0, 0])
    expected = 0.7 + 0.05 * (0.7 - 0.7**3 - r) / epsilon + math.sqrt(0.05) * 0.1 * noise
    assert float(nodes["path"]["value"][1, 0]) == pytest.approx(expected, rel=1e-12)


def test_likelihood_of_a_first_step_is_normal(neuron: ModuleType) -> None:
    """With one step before the only record, the start is all there is to integrate over."""
    recording = neuron.Recording(1, 1)
    theta = torch.tensor([neuron.THETA_TRUE, (0.1, 1.0, 0.5, 0.2)])
    voltage = torch.tensor([-0.55])
    estimates = torch.stack(
        [neuron.log_likelihood(theta, voltage, recording, num_particles=20_000) for _ in range(5)]
    )
    v, mean, sd = neuron.START_VOLTAGE, *neuron.START_RECOVERY
    rate = 0.05 / theta[:, 0]
    scale = (0.05 * 0.1**2 + (rate * sd).square()).sqrt()
    loc = v + rate * (v - v**3 - mean)
    expected = pyro.distributions.Normal(loc, scale).log_prob(voltage)
    error = estimates.std(0) / math.sqrt(5)
    assert (error < 0.02).all()
    assert ((estimates.mean(0) - expected).abs() < 8 * error + 1e-4).all()


def test_filter_is_unbiased_whatever_the_number_of_particles(neuron: ModuleType) -> None:
    recording = neuron.Recording(3, 2)
    voltages = recorded(neuron, recording)
    theta = torch.tensor([neuron.THETA_TRUE])
    few = neuron.log_likelihood(theta.expand(8000, 4), voltages, recording, num_particles=10).exp()
    many = neuron.log_likelihood(
        theta.expand(40, 4), voltages, recording, num_particles=4000
    ).exp()
    error = math.hypot(few.std() / math.sqrt(len(few)), many.std() / math.sqrt(len(many)))
    assert error < 0.05 * many.mean()
    assert (few.mean() - many.mean()).abs() < 5 * error


def test_impossible_voltages_have_no_likelihood(neuron: ModuleType) -> None:
    recording = neuron.Recording(2, 2)
    theta = torch.tensor([neuron.THETA_TRUE])
    found = neuron.log_likelihood(theta, torch.tensor([1e6, 0.0]), recording, num_particles=20)
    assert found.shape == (1,)
    assert float(found) < -1e6
    lost = torch.tensor([[1e-300, 1.0, 0.5, 0.2]])  # the voltage leaves the range of numbers
    assert neuron.log_likelihood(lost, torch.zeros(2), recording) == -math.inf


def test_weighted_draws_estimate_means_with_their_errors(neuron: ModuleType) -> None:
    inputs = torch.randn(20_000, 4)
    shift = torch.tensor([0.5, 0.0, 0.0, 0.0])
    weights = (inputs @ shift).softmax(0)  # of a normal distribution around the shift
    draws = neuron.WeightedDraws(inputs, weights)
    mean, error = draws.mean_and_error(inputs)
    assert error.max() < 0.02
    assert ((mean - shift).abs() < 5 * error).all()
    assert draws.effective_size == pytest.approx(20_000 / math.exp(0.25), rel=0.1)


@pytest.mark.slow
def test_constrained_hmc_and_the_particle_filter_agree(neuron: ModuleType) -> None:
    recording = neuron.Recording(5, 2)
    voltages = recorded(neuron, recording)
    model = pyro.condition(neuron.neuron_model, neuron.recorded_sites(voltages))
    mcmc = MCMC(
        ConstrainedHMC(model, structure="dense"),
        num_samples=120,
        warmup_steps=80,
        num_chains=8,
        disable_progbar=True,
    )
    mcmc.run(recording)
    draws = mcmc.get_samples(group_by_chain=True)["inputs"]
    reference = neuron.importance_posterior(
        voltages, draws.flatten(0, 1), recording, num_draws=2000, num_particles=200
    )
    assert reference.effective_size > 500
    for i, name in enumerate(neuron.PARAMETER_NAMES):
        for power in (1, 2):
            values = draws[..., i] ** power
            truth, its_error = reference.mean_and_error(reference.inputs[:, i] ** power)
            ess = effective_sample_size(values)
            assert ess > 200, f"too few effective draws of {name}: {ess:.0f}"
            error = math.hypot(values.std() / math.sqrt(ess), its_error)
            difference = float(values.mean() - truth)
            assert abs(difference) < 5 * error, f"moment {power} of {name} differs"


def test_figures_are_drawn(figures: ModuleType) -> None:
    times, truth, paths = torch.arange(10.0), torch.randn(10, 2), torch.randn(20, 10, 2)
    drawn = [
        figures.paths_figure(times, truth, paths, (times[::3], truth[::3, 0])),
        figures.marginals_figure(
            torch.randn(99, 2), (torch.randn(50, 2), torch.ones(50) / 50), ["a", "b"], (0, 0.5)
        ),
    ]
    for figure in drawn:
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=40)
        assert file.getvalue().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="truth and paths must have shapes"):
        figures.paths_figure(times, truth[:5], paths, (times, truth[:, 0]))
