"""The reference tasks: simulators against closed forms, references against simulators."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import scipy.stats
import torch
from torch import Tensor

from benchmarks.simulators import TASKS, Task, cached_reference, task
from benchmarks.simulators.gaussian_linear import MATRIX, NOISE, posterior
from benchmarks.simulators.lotka_volterra_jump import START, simulate, summaries
from benchmarks.simulators.queue import departure_gaps, quantiles
from benchmarks.simulators.slcp import likelihood
from benchmarks.simulators.two_moons import TwoMoons
from pyro_ext.diagnostics import simulation_based_calibration
from tests.statistics import Quadrature, assert_moments
from tutorials.lotka_volterra import simulator

WITH_REFERENCE = [name for name, each in TASKS.items() if each.reference is not None]


def the(name: str) -> Task:
    return TASKS[name]


def _reference(name: str, x: Tensor, num_draws: int) -> Tensor:
    draw = the(name).reference
    assert draw is not None
    return draw(x, num_draws).draws


def _log_posterior(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    result = the(name).log_posterior
    assert result is not None
    return result


# ----------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", TASKS)
def test_models_run_alone_and_in_a_plate(name: str) -> None:
    model = the(name).model
    trace = poutine.trace(model).get_trace()
    shape = the(name).observation().shape
    assert trace.nodes["x"]["value"].shape == shape
    latents = {n for n in trace.stochastic_nodes if n != "x"}
    assert latents == {"theta", *the(name).nuisance}
    with pyro.plate("runs", 30):
        trace = poutine.trace(model).get_trace()
    assert trace.nodes["x"]["value"].shape == (30, *shape)
    assert len(trace.nodes["theta"]["value"].unique(dim=0)) == 30
    outputs = trace.nodes["x"]["value"].flatten(1)
    finite = outputs[torch.isfinite(outputs).all(-1)]
    if name != "lotka_volterra_sde":  # whose prior is that of the literature
        assert len(finite) > 20
    assert len(finite.unique(dim=0)) == len(finite)


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_the_same_run(name: str) -> None:
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(the(name).model())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("name", TASKS)
def test_observations_are_fixed(name: str) -> None:
    state = torch.get_rng_state()
    x = the(name).observation()
    assert torch.isfinite(x).all()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(x, the(name).observation())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gaussian_linear", "two_moons", "slcp"])
def test_references_are_calibrated(name: str) -> None:
    """Of posteriors given many different observations, not only that of the literature."""
    log_posterior = _log_posterior(name)
    result = simulation_based_calibration(
        the(name).model,
        lambda observation: {"theta": _reference(name, observation["x"], 39)},
        observed="x",
        num_simulations=120,
        quantities={"density": lambda a, b: log_posterior(a["theta"], b["x"])},
        disable_progbar=True,
    )
    assert result.p_value > 0.01, result.summary()


def test_references_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "_CACHE", tmp_path)
    state = torch.get_rng_state()
    first = cached_reference(the("two_moons"), 50)
    assert torch.equal(state, torch.get_rng_state())
    assert first.draws.shape == (50, 2)
    monkeypatch.delattr(task.Task, "reference")  # cannot be asked again
    (path,) = tmp_path.iterdir()
    assert torch.equal(torch.load(path, weights_only=True)["draws"], first.draws)


def test_tasks_without_reference_say_so() -> None:
    assert set(TASKS) - set(WITH_REFERENCE) == {"lotka_volterra_jump"}
    with pytest.raises(ValueError, match="'lotka_volterra_jump'"):
        cached_reference(the("lotka_volterra_jump"), 10)


def test_too_few_effective_draws_are_refused() -> None:
    weights = torch.zeros(1000)
    weights[0] = 20.0
    with pytest.raises(ValueError, match=r"effective draws are too few to choose 5"):
        task.resample(torch.randn(1000, 2), weights, 5)


def test_draws_on_a_grid() -> None:
    """Weighted, they have the moments of the density, on a grid as coarse as this."""

    def log_density(points: Tensor) -> Tensor:
        return 2 * points[:, 0].log() - points[:, 0] - 0.5 * points[:, 1].square()

    draws, log_weights = task.draw_on_grid(log_density, [(0, 25, 40), (-7, 7, 30)], 40_000)
    weights = torch.softmax(log_weights, 0)
    ess = float(1 / weights.square().sum())
    assert ess > 30_000
    assert abs(float(weights @ draws[:, 0]) - 3) < 5 * (3 / ess) ** 0.5
    assert abs(float(weights @ draws[:, 1].square()) - 1) < 5 * (2 / ess) ** 0.5


# ------------------------------------------------------------------------------- gaussian_linear


def test_posterior_of_the_linear_model() -> None:
    """Against the conditional of the joint normal distribution."""
    matrix = torch.tensor(MATRIX)
    joint = torch.cat([torch.cat([torch.eye(3), matrix.T], 1), torch.zeros(4, 7)])
    joint[3:] = torch.cat([matrix, matrix @ matrix.T + NOISE**2 * torch.eye(4)], 1)
    gain = joint[:3, 3:] @ torch.linalg.inv(joint[3:, 3:])
    x = the("gaussian_linear").observation()
    torch.testing.assert_close(posterior(x).loc, gain @ x)
    covariance = joint[:3, :3] - gain @ joint[3:, :3]
    torch.testing.assert_close(posterior(x).covariance_matrix, covariance)
    with pyro.plate("runs", 20_000):
        outputs = the("gaussian_linear").model()
    assert_moments(outputs[None], 0.0, covariance=joint[3:, 3:], name="x")


# ------------------------------------------------------------------------------------- two_moons


def test_the_crescent_is_a_density_of_what_is_drawn() -> None:
    theta = torch.tensor([0.3, -0.1])
    crescent = TwoMoons(theta)
    draws = crescent.sample((20_000,))
    centre = draws.mean(0)

    def log_density(first: Tensor, second: Tensor) -> Tensor:
        return crescent.log_prob(torch.stack([first, second], -1))

    axes = [(float(c) - 0.2, float(c) + 0.2, 800) for c in centre]
    grid = Quadrature(log_density, *axes)
    area = (0.4 / 800) ** 2
    assert abs(float(log_density(*grid.points).exp().sum()) * area - 1) < 1e-3
    means = [grid.mean(lambda a, b: a), grid.mean(lambda a, b: b)]
    spreads = [grid.sd(lambda a, b: a), grid.sd(lambda a, b: b)]
    assert_moments(draws[None], torch.tensor(means), torch.tensor(spreads), name="crescent")


@pytest.mark.parametrize("x", [(0.0, 0.0), (0.2, 1.2)], ids=["origin", "edge of the prior"])
def test_reference_of_two_moons(x: tuple[float, float]) -> None:
    log_posterior = _log_posterior("two_moons")
    observation = torch.tensor(x)

    def log_density(first: Tensor, second: Tensor) -> Tensor:
        return log_posterior(torch.stack([first, second], -1), observation)

    grid = Quadrature(log_density, (-1, 1, 2000), (-1, 1, 2000))
    draws = _reference("two_moons", observation, 20_000)
    for i in range(2):
        assert_moments(
            draws[None, :, i], grid.mean(lambda *a, i=i: a[i]), grid.sd(lambda *a, i=i: a[i])
        )
    cross = grid.mean(lambda a, b: a * b)
    assert_moments(draws.prod(-1)[None], cross, name="product")
    assert torch.isfinite(log_posterior(draws, observation)).all()


# ------------------------------------------------------------------------------------------ slcp


def test_likelihood_of_slcp() -> None:
    """Element by element, from the formulas."""
    theta = 6 * torch.rand(5, 5) - 3
    x = 3 * torch.randn(4, 2)
    for row, value in zip(theta, likelihood(theta).log_prob(x), strict=True):
        first, second, rho = float(row[2]) ** 2, float(row[3]) ** 2, math.tanh(float(row[4]))
        covariance = [[first**2, rho * first * second], [rho * first * second, second**2]]
        normal = scipy.stats.multivariate_normal(row[:2].numpy(), covariance)
        exact = normal.logpdf(x.numpy()).sum()
        assert abs(float(value) - exact) < 1e-8 * abs(exact)


def test_reference_of_slcp() -> None:
    """Moments that long Markov chains had: 4,000 chains, ten draws of each."""
    draws = _reference("slcp", the("slcp").observation().double(), 20_000)
    mean = torch.tensor([-0.800, -2.636, 0.0, 0.0, -0.962])
    sd = torch.tensor([0.426, 0.438, 0.897, 0.989, 0.833])
    difference = (draws.mean(0) - mean) / (sd / 20_000**0.5)
    # the published digits, and those chains, are no better than 0.015
    assert (difference.abs() < 5 + 0.015 / (sd / 20_000**0.5)).all()
    squares = (draws - draws.mean(0)).square()
    error = squares.std(0) * (2 / 20_000) ** 0.5
    assert ((squares.mean(0) - sd.square()).abs() < 5 * error).all()
    quarters = (draws[:, 2:4] > 0).double()
    assert (quarters.mean(0) - 0.5).abs().max() < 5 * 0.5 / 20_000**0.5


# ---------------------------------------------------------------------------- lotka_volterra_sde


def test_density_of_the_sde_is_that_of_the_tutorial() -> None:
    x = simulator.observed_data()
    theta = torch.tensor(simulator.THETA_TRUE) * (1 + 0.01 * torch.randn(6, 4))
    exact = []
    for row in theta:
        conditioned = poutine.condition(simulator.tractable_model, {"theta": row})
        exact.append(poutine.trace(conditioned).get_trace(x).log_prob_sum())
    ours = _log_posterior("lotka_volterra_sde")(theta, x)
    torch.testing.assert_close(ours.diff(), torch.stack(exact).diff())
    assert _log_posterior("lotka_volterra_sde")(-theta, x).isneginf().all()


def test_reference_of_the_sde() -> None:
    draws = _reference("lotka_volterra_sde", simulator.observed_data(), 5000)
    exact = simulator.exact_posterior()
    assert_moments(draws[None], exact.mean, exact.sd, name="theta")
    assert_moments(draws.log()[None], exact.log_mean, exact.log_sd, name="log theta")
    # the parameters of different equations are independent
    standard = (draws - exact.mean) / exact.sd
    assert abs(float((standard[:, 0] * standard[:, 2]).mean())) < 5 / 5000**0.5
    assert abs(float((standard[:, 0] * standard[:, 1]).mean())) > 0.2


def test_the_plausible_prior_weighs_the_same_likelihood() -> None:
    x = simulator.observed_data()
    draws = _reference("lotka_volterra_sde", x, 5000)
    log_prior = dist.LogNormal(torch.tensor([0.4, 0.005, 0.05, 0.001]).log(), 0.3).log_prob(draws)
    log_ratio = log_prior.sum(-1) - dist.LogNormal(-2.0, 1.0).log_prob(draws).sum(-1)
    ours = _log_posterior("lotka_volterra_sde_plausible")(draws, x)
    torch.testing.assert_close(
        (ours - _log_posterior("lotka_volterra_sde")(draws, x)).diff(), log_ratio.diff()
    )
    weights = torch.softmax(log_ratio, 0)
    mean = weights @ draws
    sd = (weights @ (draws - mean).square()).sqrt()
    other = _reference("lotka_volterra_sde_plausible", x, 5000)
    # both are estimates
    error = sd * (weights.square().sum() + 1 / 5000).sqrt()
    assert ((other.mean(0) - mean).abs() < 5 * error).all()
    assert (other.std(0) / sd - 1).abs().max() < 0.1


# --------------------------------------------------------------------------- lotka_volterra_jump

NEVER = -60.0


def test_deaths_alone_are_binomial() -> None:
    """Beside simulations that fail."""
    theta = torch.tensor([[NEVER, math.log(0.1), NEVER, NEVER]]).repeat(2000, 1)
    theta[::4] = torch.tensor([NEVER, NEVER, 2.0, NEVER])  # prey multiplies without end
    populations = simulate(theta, max_events=1000)
    failed = populations.isnan().flatten(1)
    assert (failed.all(1) == failed.any(1)).all()
    assert failed[::4].all()
    predators, prey = populations[~failed.any(1)].unbind(-1)
    assert len(predators) == 1500
    assert (prey == START[1]).all()
    for index in (5, 50, 150):
        survival = math.exp(-0.1 * 0.2 * index)
        values = predators[None, :, index]
        mean, variance = START[0] * survival, START[0] * survival * (1 - survival)
        assert_moments(values, mean, variance**0.5, name=f"predators at {index}")


def test_births_alone_are_a_yule_process() -> None:
    rate, time = 0.02, 30.0
    theta = torch.tensor([[NEVER, NEVER, math.log(rate), NEVER]]).repeat(2000, 1)
    prey = simulate(theta)[:, -1, 1]
    mean = START[1] * math.exp(rate * time)
    assert_moments(prey[None], mean, (mean * (math.exp(rate * time) - 1)) ** 0.5, name="prey")


def _one_by_one(theta: list[float], time: float, generator: random.Random) -> tuple[int, int]:
    """Gillespie's algorithm, word for word."""
    predators, prey, now = int(START[0]), int(START[1]), 0.0
    rates = [math.exp(each) for each in theta]
    while True:
        numbers = (predators * prey, predators, prey, predators * prey)
        hazards = [rate * number for rate, number in zip(rates, numbers, strict=True)]
        if sum(hazards) == 0:
            return predators, prey
        now += generator.expovariate(sum(hazards))
        if now > time:
            return predators, prey
        event = generator.choices(range(4), hazards)[0]
        predators += (1, -1, 0, 0)[event]
        prey += (0, 0, 1, -1)[event]


def test_all_at_once_is_as_one_by_one() -> None:
    theta = [math.log(each) for each in (0.005, 0.25, 0.5, 0.005)]
    generator = random.Random(0)
    number, index = 300, 16
    single = torch.tensor([_one_by_one(theta, 0.2 * index, generator) for _ in range(number)])
    together = simulate(torch.tensor([theta]).repeat(number, 1))[:, index]
    assert torch.isfinite(together).all()
    for i, name in enumerate(("predators", "prey")):
        p_value = scipy.stats.ks_2samp(single[:, i].numpy(), together[:, i].numpy()).pvalue
        assert p_value > 1e-3, name


def test_summaries() -> None:
    series = torch.randn(3, 151, 2).cumsum(1).abs()
    for row, values in zip(series.numpy(), summaries(series).numpy(), strict=True):
        standard = (row - row.mean(0)) / row.std(0, ddof=1)
        expected = [
            *np.log1p(row.mean(0)),
            *np.log1p(row.var(0, ddof=1)),
            *((standard[k:, i] * standard[:-k, i]).sum() / 150 for i in range(2) for k in (1, 2)),
            standard.prod(1).sum() / 150,
        ]
        np.testing.assert_allclose(values, expected, rtol=1e-10)
    constant = summaries(torch.ones(1, 151, 2))
    torch.testing.assert_close(constant[0, 2:], torch.zeros(7))


# ----------------------------------------------------------------------------------------- queue


def test_queue_one_customer_after_the_other() -> None:
    theta = torch.tensor([[1.0, 4.0, 0.2], [0.5, 1.0, 0.3]])
    service, arrival = torch.rand(2, 50), torch.empty(2, 50).exponential_()
    gaps = departure_gaps(theta, service, arrival)
    for i, (shortest, width, rate) in enumerate(theta.tolist()):
        come = left = 0.0
        for j in range(50):
            come += float(arrival[i, j]) / rate
            before, left = left, max(left, come) + shortest + width * float(service[i, j])
            assert abs(left - before - float(gaps[i, j])) < 1e-10
    # an empty queue leaves when it comes, a full one when it has been served
    idle = departure_gaps(torch.tensor([0.0, 0.0, 1.0]), service[0], arrival[0])
    torch.testing.assert_close(idle, arrival[0])
    busy = departure_gaps(torch.tensor([2.0, 1.0, 1e6]), service[0], arrival[0])
    torch.testing.assert_close(busy[1:], 2 + service[0, 1:])


def test_quantiles_are_those_of_numpy() -> None:
    values = torch.randn(3, 50)
    expected = np.quantile(values.numpy(), np.linspace(0, 1, 5), axis=-1).T
    np.testing.assert_allclose(quantiles(values).numpy(), expected)
