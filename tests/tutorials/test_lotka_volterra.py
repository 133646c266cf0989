"""The Lotka-Volterra tutorial: simulator, exact posterior, ABC baselines and figures."""

import io
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import torch
from scipy.stats import truncnorm
from torch import Tensor

from tests.statistics import assert_mean, assert_moments

# Another implementation's sums on a 1601 x 1601 grid over the same data.
EXPECTED = {
    "mean": [0.4072123350248309, 0.005045893544211052, 0.05377406414959054, 0.0010174551828281604],
    "sd": [
        0.008363003693556388,
        9.569715297357702e-05,
        0.0029783755857243264,
        4.153062052117338e-05,
    ],
    "log_mean": [-0.8986315438260302, -5.289360465410946, -2.924504935800446, -6.891285817906717],
    "log_sd": [
        0.02054804268785498,
        0.01897388363247751,
        0.055600182619025273,
        0.040902791357720195,
    ],
}
EXPECTED_QUANTILES = {
    0.025: [0.3908209852127129, 0.004858330407191466, 0.04793777771570111, 0.0009360761570229866],
    0.05: [0.39345630389545827, 0.004888485165176454, 0.04887573625767842, 0.0009491538364519702],
    0.25: [0.40157140533951485, 0.00498134483259234, 0.05176484626407325, 0.000989438515091861],
    0.5: [0.40721227952152744, 0.005045892827460338, 0.053773602513489366, 0.001017448061711605],
    0.75: [0.4128532089031647, 0.0051104415974812375, 0.055782780220811005, 0.0010454643040558901],
    0.95: [0.4209686972976895, 0.005203305103209316, 0.05867397708212655, 0.0010857808298065147],
    0.975: [0.42360408514254777, 0.005233460882628435, 0.05961299230610611, 0.001098874857028289],
}


@pytest.fixture(scope="module")
def data(simulator: ModuleType) -> Tensor:
    return simulator.observed_data()


@pytest.fixture(scope="module")
def posterior(simulator: ModuleType) -> Any:
    return simulator.exact_posterior()


# ------------------------------------------------------------------------------------- simulator


def plain_loop(theta: list[float], noise: list[list[float]]) -> list[list[float]]:
    """The recursion as it is written on paper."""
    q1, q2 = 100.0, 100.0
    trajectory = []
    for n1, n2 in noise:
        q1, q2 = (
            q1 + theta[0] * q1 - theta[1] * q1 * q2 + n1,
            q2 - theta[2] * q2 + theta[3] * q1 * q2 + n2,
        )
        trajectory.append([q1, q2])
    return trajectory


def some_inputs(simulator: ModuleType, *batch: int) -> tuple[Tensor, Tensor]:
    theta = torch.tensor(simulator.THETA_TRUE) * (0.05 * torch.randn(*batch, 4)).exp()
    return theta, torch.randn(*batch, 50, 2)


def test_data_are_those_of_the_frozen_seed(simulator: ModuleType, data: Tensor) -> None:
    noise = np.random.RandomState(1234).normal(size=100).reshape(50, 2)
    expected = torch.tensor(plain_loop(list(simulator.THETA_TRUE), noise.tolist()))
    assert data.dtype == torch.float64
    torch.testing.assert_close(data, expected, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(data[-1], torch.tensor([50.09121415113761, 126.38003397292029]))


def test_simulate_matches_a_plain_loop_for_every_element_of_a_batch(simulator: ModuleType) -> None:
    theta, noise = some_inputs(simulator, 3, 2)
    outputs = simulator.simulate(theta, noise)
    assert outputs.shape == (3, 2, 50, 2)
    for i in range(3):
        for j in range(2):
            expected = torch.tensor(plain_loop(theta[i, j].tolist(), noise[i, j].tolist()))
            torch.testing.assert_close(outputs[i, j], expected, rtol=1e-10, atol=1e-9)


def test_simulate_broadcasts_its_batch_dimensions(simulator: ModuleType) -> None:
    theta, noise = some_inputs(simulator, 4)
    one_theta = simulator.simulate(theta[0], noise)
    one_noise = simulator.simulate(theta, noise[0])
    torch.testing.assert_close(one_theta, simulator.simulate(theta[:1].expand(4, 4), noise))
    torch.testing.assert_close(one_noise[2], simulator.simulate(theta[2], noise[0]))


@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.jacrev])
def test_simulate_can_be_vmapped_and_differentiated(
    simulator: ModuleType, transform: Callable[..., Any]
) -> None:
    theta, noise = some_inputs(simulator, 3)
    outputs = torch.func.vmap(simulator.simulate)(theta, noise)
    torch.testing.assert_close(outputs, simulator.simulate(theta, noise))
    jacobian = torch.func.vmap(transform(simulator.simulate))(theta, noise)
    assert jacobian.shape == (3, 50, 2, 4)
    step = 1e-6 * theta[0, 1]
    shift = torch.tensor([0.0, step, 0.0, 0.0])
    slope = simulator.simulate(theta + shift, noise) - simulator.simulate(theta - shift, noise)
    torch.testing.assert_close(jacobian[..., 1], slope / (2 * step), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("theta_shape", "noise_shape"), [((3,), (50, 2)), ((4,), (100,)), ((4,), (50, 3))]
)
def test_simulate_refuses_wrong_shapes(
    simulator: ModuleType, theta_shape: tuple[int, ...], noise_shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="must have shape"):
        simulator.simulate(torch.ones(theta_shape), torch.ones(noise_shape))


def test_solved_noise_reproduces_the_data(simulator: ModuleType, data: Tensor) -> None:
    theta, _ = some_inputs(simulator, 5)
    outputs = simulator.simulate(theta, simulator.solve_noise(theta, data))
    torch.testing.assert_close(outputs, data.expand(5, 50, 2), rtol=0, atol=1e-9)
    z, noise = simulator.start_on_data(theta, data)
    torch.testing.assert_close(simulator.parameters_from_normals(z), theta)
    flat = simulator.simulate_from_normals(z, noise)
    torch.testing.assert_close(flat, data.flatten().expand(5, 100), rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------------- models


def test_model_keeps_the_simulation_when_its_site_is_conditioned(
    simulator: ModuleType, data: Tensor
) -> None:
    conditioned = pyro.condition(simulator.model, {"x": data})
    trace = poutine.trace(conditioned).get_trace()
    theta, noise = trace.nodes["theta"]["value"], trace.nodes["noise"]["value"]
    assert theta.dtype == noise.dtype == torch.float64
    torch.testing.assert_close(trace.nodes["x"]["value"], data)
    simulated = trace.nodes["x"]["fn"].base_dist.v
    torch.testing.assert_close(simulated, simulator.simulate(theta, noise))


def test_tractable_model_scores_the_noise_that_explains_the_data(
    simulator: ModuleType, data: Tensor
) -> None:
    theta = torch.tensor(simulator.THETA_TRUE)
    conditioned = pyro.condition(simulator.tractable_model, {"theta": theta})
    trace = poutine.trace(conditioned).get_trace()
    noise = simulator.solve_noise(theta, data)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum()
    torch.testing.assert_close(trace.nodes["x"]["fn"].log_prob(data), expected)
    prior = torch.distributions.LogNormal(-2.0, 1.0).log_prob(theta).sum()
    torch.testing.assert_close(trace.nodes["theta"]["fn"].log_prob(theta), prior)


# ------------------------------------------------------------------------------- exact posterior


@pytest.mark.parametrize("statistic", list(EXPECTED))
def test_quadrature_matches_recorded_values(posterior: Any, statistic: str) -> None:
    expected = torch.tensor(EXPECTED[statistic])
    torch.testing.assert_close(getattr(posterior, statistic), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("level", list(EXPECTED_QUANTILES))
def test_quantiles_match_recorded_values(posterior: Any, level: float) -> None:
    expected = torch.tensor(EXPECTED_QUANTILES[level])
    torch.testing.assert_close(posterior.quantiles[level], expected, rtol=1e-5, atol=0)


def test_quadrature_does_not_depend_on_its_grid(simulator: ModuleType, posterior: Any) -> None:
    coarse = simulator.exact_posterior(num_points=301, half_width=8.0)
    for statistic in ("mean", "sd", "log_mean", "log_sd"):
        torch.testing.assert_close(
            getattr(coarse, statistic), getattr(posterior, statistic), rtol=1e-8, atol=0
        )


def test_quadrature_agrees_with_gauss_hermite_on_the_pyro_model(
    simulator: ModuleType, data: Tensor, posterior: Any
) -> None:
    """All four parameters at once, other nodes, and the density as Pyro computes it."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(14))

    def log_density(log_theta: Tensor) -> Tensor:
        theta = log_theta.exp()
        trace = poutine.trace(pyro.condition(simulator.tractable_model, {"theta": theta}))
        return trace.get_trace(data).log_prob_sum() + log_theta.sum()

    centre = posterior.log_mean
    with pyro.validation_enabled(False):
        precision = -torch.func.hessian(log_density)(centre)
    scale = torch.linalg.inv(torch.linalg.cholesky(precision)).T
    unit = torch.cartesian_prod(nodes, nodes, nodes, nodes)
    points = centre + unit @ scale.T
    with pyro.validation_enabled(False):
        log_densities = torch.func.vmap(log_density, chunk_size=5000)(points)
    log_weights = torch.cartesian_prod(*[weights.log()] * 4).sum(-1)
    mass = torch.softmax(log_densities + log_weights + 0.5 * unit.square().sum(-1), 0)
    theta = points.exp()
    mean, log_mean = mass @ theta, mass @ points
    sd = (mass @ (theta - mean).square()).sqrt()
    log_sd = (mass @ (points - log_mean).square()).sqrt()
    torch.testing.assert_close(mean, posterior.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(log_mean, posterior.log_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(sd, posterior.sd, rtol=1e-5, atol=0)
    torch.testing.assert_close(log_sd, posterior.log_sd, rtol=1e-5, atol=0)


def test_marginal_densities_integrate_to_one(posterior: Any) -> None:
    for k, (theta, density) in enumerate(posterior.marginals):
        torch.testing.assert_close(
            torch.trapezoid(density, theta), torch.tensor(1.0), rtol=1e-4, atol=0
        )
        mean = torch.trapezoid(density * theta, theta)
        torch.testing.assert_close(mean, posterior.mean[k], rtol=1e-4, atol=0)


def test_exact_posterior_refuses_a_level_that_is_no_probability(simulator: ModuleType) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        simulator.exact_posterior(levels=(0.5, 95.0))


# ----------------------------------------------------------------------------------- ABC samplers


# A toy whose ABC posterior is known: a weighted sum of the inputs is near 1.5. The sum is a
# truncated normal variable, and given the sum the inputs are normal.
Z_WEIGHTS = torch.tensor([1.0, -0.5], dtype=torch.float64)
NOISE_WEIGHTS = torch.tensor([1.2, 0.8, -0.4], dtype=torch.float64)
TARGET, RADIUS = 1.5, 0.6


def weighted_sum(z: Tensor, noise: Tensor) -> Tensor:
    return (z @ Z_WEIGHTS + noise @ NOISE_WEIGHTS).unsqueeze(-1)


def toy_moments() -> tuple[Tensor, Tensor]:
    """Mean and covariance of the two parameters."""
    variance = (Z_WEIGHTS.square().sum() + NOISE_WEIGHTS.square().sum()).item()
    sd = math.sqrt(variance)
    total = truncnorm((TARGET - RADIUS) / sd, (TARGET + RADIUS) / sd, scale=sd)
    gain = Z_WEIGHTS / variance
    given_sum = torch.eye(2) - torch.outer(gain, Z_WEIGHTS)
    return gain * total.mean(), given_sum + torch.outer(gain, gain) * total.var()


def toy_start(num_chains: int) -> tuple[Tensor, Tensor]:
    z = torch.randn(num_chains, 2)
    first = (TARGET - z @ Z_WEIGHTS) / NOISE_WEIGHTS[0]
    return z, torch.cat([first.unsqueeze(-1), torch.zeros(num_chains, 2)], -1)


def run_sampler(abc: ModuleType, name: str, **changes: Any) -> Any:
    arguments = {
        "rejection": {"num_parameters": 2, "num_noise": 3, "num_simulations": 40_000},
        "random_walk": {"num_draws": 2000, "warmup_steps": 200, "step_size": 1.0},
        "elliptical_slice": {"num_draws": 600, "warmup_steps": 50},
    }[name]
    arguments = {**arguments, **changes}
    if name != "rejection" and "start" not in arguments:
        arguments["start"] = toy_start(32)
    target = torch.tensor([TARGET])
    return getattr(abc, name)(weighted_sum, target, RADIUS, **arguments)


SAMPLERS = ["rejection", "random_walk", "elliptical_slice"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_has_the_moments_of_a_conditioned_gaussian(
    abc_baselines: ModuleType, name: str
) -> None:
    samples = run_sampler(abc_baselines, name)
    mean, covariance = toy_moments()
    assert_moments(samples.theta, mean, covariance=covariance, min_ess=800, name="theta")


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_draw_is_inside_the_ball(abc_baselines: ModuleType, name: str) -> None:
    samples = run_sampler(abc_baselines, name)
    assert samples.theta.shape[:2] == samples.distance.shape
    assert (samples.distance < RADIUS).all()
    assert ((samples.outputs - TARGET).abs() < RADIUS).all()
    last = samples.distance[0] if name == "rejection" else samples.distance[:, -1]
    torch.testing.assert_close((samples.outputs - TARGET).abs().squeeze(-1), last)


def half_line(z: Tensor, noise: Tensor) -> Tensor:
    """A simulator that overflows for positive parameters and is on the data otherwise."""
    bad = torch.where(noise > 0, math.nan, math.inf)
    return torch.where(z > 0, bad, torch.zeros_like(z))


@pytest.mark.parametrize("name", SAMPLERS)
def test_overflowing_simulations_are_outside_the_ball(
    abc_baselines: ModuleType, name: str
) -> None:
    if name == "rejection":
        arguments: dict[str, Any] = {"num_parameters": 1, "num_noise": 1, "num_simulations": 9999}
    else:
        arguments = {"start": (-torch.rand(32, 1), torch.randn(32, 1)), "num_draws": 400}
    if name == "random_walk":
        arguments["step_size"] = 1.5
    samples = getattr(abc_baselines, name)(half_line, torch.zeros(1), 1.0, **arguments)
    assert (samples.theta <= 0).all()
    half_normal_mean = -math.sqrt(2 / math.pi)
    assert_mean(samples.theta[..., 0], half_normal_mean, min_ess=1000, name="theta")


@pytest.mark.parametrize("name", SAMPLERS)
def test_generator_makes_a_run_repeatable_and_leaves_the_global_one_alone(
    abc_baselines: ModuleType, name: str
) -> None:
    small = {"num_simulations": 500} if name == "rejection" else {"num_draws": 20}
    if name != "rejection":
        small["start"] = toy_start(4)
    state = torch.get_rng_state()
    runs = [
        run_sampler(abc_baselines, name, generator=torch.Generator().manual_seed(1), **small)
        for _ in range(2)
    ]
    assert torch.equal(runs[0].theta, runs[1].theta)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["random_walk", "elliptical_slice"])
def test_chains_keep_the_draws_asked_for(abc_baselines: ModuleType, name: str) -> None:
    start = toy_start(4)

    def run(**arguments: Any) -> Any:
        generator = torch.Generator().manual_seed(1)
        return run_sampler(abc_baselines, name, start=start, generator=generator, **arguments)

    every = run(num_draws=60, warmup_steps=0)
    some = run(num_draws=10, warmup_steps=30, thinning=3)
    assert every.theta.shape == (4, 60, 2)
    assert torch.equal(some.theta, every.theta[:, 32::3])
    assert torch.equal(some.distance, every.distance[:, 32::3])
    assert torch.equal(some.outputs, every.outputs)


def test_rejection_without_a_hit_returns_no_draws(abc_baselines: ModuleType) -> None:
    samples = abc_baselines.rejection(
        weighted_sum,
        torch.tensor([1e3]),
        1.0,
        num_parameters=2,
        num_noise=3,
        num_simulations=100,
        batch_size=30,
    )
    assert samples.theta.shape == (1, 0, 2)
    assert samples.outputs.shape == (0, 1)
    assert samples.acceptance_rate.item() == 0
    assert samples.evaluations == 100


@pytest.mark.parametrize("name", ["random_walk", "elliptical_slice"])
def test_start_outside_the_ball_is_refused(abc_baselines: ModuleType, name: str) -> None:
    z, noise = toy_start(3)
    with pytest.raises(ValueError, match="1 of 3 starting points simulate outside the ball"):
        run_sampler(abc_baselines, name, start=(z + torch.tensor([[9.0], [0], [0]]), noise))


@pytest.mark.parametrize("name", SAMPLERS)
def test_radius_must_be_positive(abc_baselines: ModuleType, name: str) -> None:
    with pytest.raises(ValueError, match="epsilon must be positive"):
        getattr(abc_baselines, name)(
            weighted_sum,
            torch.tensor([TARGET]),
            -1.0,
            **(
                {"num_parameters": 2, "num_noise": 3, "num_simulations": 10}
                if name == "rejection"
                else {"start": toy_start(2), "num_draws": 2}
            ),
        )


@pytest.mark.parametrize("epsilon", [10.0, 100.0])
def test_elliptical_slice_stays_in_the_ball_on_lotka_volterra(
    simulator: ModuleType, abc_baselines: ModuleType, data: Tensor, epsilon: float
) -> None:
    theta, _ = some_inputs(simulator, 8)
    samples = abc_baselines.elliptical_slice(
        simulator.simulate_from_normals,
        data.flatten(),
        epsilon,
        simulator.start_on_data(theta, data),
        num_draws=10,
        transform=simulator.parameters_from_normals,
    )
    assert (samples.distance < epsilon).all()
    assert (samples.theta > 0).all()
    assert (samples.theta.diff(dim=1) != 0).all(), "every update moves"
    steps = (samples.outputs - data.flatten()).square().sum(-1).sqrt()
    torch.testing.assert_close(steps, samples.distance[:, -1])


# --------------------------------------------------------------------------------------- figures


def style_settings() -> dict[str, Any]:
    settings = pytest.importorskip("matplotlib").rcParams
    return {key: settings[key] for key in settings if key != "backend"}  # reading that sets it


def rendered(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=50)
    return file.getvalue()


def test_trajectories_figure_shows_every_method(
    figures: ModuleType, simulator: ModuleType, data: Tensor
) -> None:
    settings = style_settings()
    theta, noise = some_inputs(simulator, 6)
    figure = figures.trajectories_figure(
        data, {"free": simulator.simulate(theta, noise), "exact": data.expand(3, 50, 2).numpy()}
    )
    assert rendered(figure).startswith(b"\x89PNG")
    free, exact, *residuals = figure.axes
    assert [axes.get_title("left") for axes in (free, exact)] == ["free", "exact"]
    assert len(free.lines) == 2 * (6 + 1), "two species: six simulations and the data of each"
    assert "largest: 0" in residuals[1].texts[0].get_text()
    assert style_settings() == settings


def test_marginals_figure_shows_every_method_and_parameter(
    figures: ModuleType, simulator: ModuleType, posterior: Any
) -> None:
    settings = style_settings()
    draws = posterior.mean + posterior.sd * torch.randn(500, 4)
    wide = (posterior.log_mean + 10 * posterior.log_sd * torch.randn(300, 4)).exp()
    figure = figures.marginals_figure(
        posterior.marginals,
        {"narrow": draws, "wide": wide.numpy()},
        reference=draws,
        true_values=simulator.THETA_TRUE,
    )
    assert rendered(figure).startswith(b"\x89PNG")
    assert len(figure.axes) == 8
    heights = [patch.get_height() * patch.get_width() for patch in figure.axes[0].patches[:40]]
    assert 0.98 < sum(heights) <= 1.0 + 1e-9, "the histogram is a density"
    low, high = figure.axes[4].get_xlim()
    assert low < posterior.quantiles[0.025][0] < posterior.quantiles[0.975][0] < high
    assert "theta_4" in figure.axes[-1].get_xlabel()
    assert style_settings() == settings


def test_overview_shows_every_method_over_the_exact_density(
    figures: ModuleType, simulator: ModuleType, data: Tensor, posterior: Any
) -> None:
    settings = style_settings()
    theta, noise = some_inputs(simulator, 6)
    draws = posterior.mean + posterior.sd * torch.randn(500, 4)
    figure = figures.overview_figure(
        data,
        {"free": simulator.simulate(theta, noise)},
        posterior.marginals,
        {"narrow": draws, "free": theta},
        true_values=simulator.THETA_TRUE,
    )
    assert rendered(figure).startswith(b"\x89PNG")
    trajectories, marginals = figure.subfigs
    assert (len(trajectories.axes), len(marginals.axes)) == (2, 4)
    labels = [text.get_text() for text in marginals.legends[0].get_texts()]
    assert labels == ["narrow", "free", "exact posterior (quadrature)", "true value"]
    assert style_settings() == settings


def test_figures_name_what_has_the_wrong_shape(
    figures: ModuleType, data: Tensor, posterior: Any
) -> None:
    with pytest.raises(ValueError, match="observed must have shape"):
        figures.trajectories_figure(data.flatten(), {"a": data[None]})
    with pytest.raises(ValueError, match="at least one method"):
        figures.trajectories_figure(data, {})
    with pytest.raises(ValueError, match="simulations of 'a' must have shape"):
        figures.trajectories_figure(data, {"a": data})
    with pytest.raises(ValueError, match="draws of 'b' must have shape"):
        figures.marginals_figure(posterior.marginals, {"b": torch.ones(10, 3)})
    with pytest.raises(ValueError, match="4 exact densities for 3 parameters"):
        figures.marginals_figure(
            posterior.marginals, {"b": torch.ones(9, 3)}, parameters=figures.PARAMETER_AXES[:3]
        )
    with pytest.raises(ValueError, match="at least one method"):
        figures.marginals_figure(posterior.marginals, {})
