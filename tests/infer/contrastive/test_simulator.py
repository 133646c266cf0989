import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.autograd.functional import jacobian as jacobian_of

from pyro_ext.errors import VectorizationWarning
from pyro_ext.infer.contrastive.inspection import inspect_model
from pyro_ext.infer.contrastive.simulator import Simulator
from pyro_ext.infer.contrastive.sites import constrain, log_abs_det, unconstrain
from tests.infer.contrastive.problems import linear_gaussian, sites_of_all_kinds, two_moons

WAYS = ["vmap", "plate", "loop"]


def _simulator(
    model: Callable[[], Any],
    vectorize: str | None = None,
    observed: tuple[str, ...] = ("x",),
    nuisance: tuple[str, ...] = (),
) -> Simulator:
    return Simulator(model, inspect_model(model, observed, None, nuisance), vectorize)


def _all_kinds(way: str | None = None) -> Simulator:
    return _simulator(sites_of_all_kinds, way, ("x", "count"), ("noise",))


def test_sites_on_several_supports_round_trip() -> None:
    structure = _all_kinds("loop").structure
    assert structure.latent_names == ("rate", "weights", "level")
    assert structure.nuisance == ("noise",)
    assert structure.features == 1 + 2 + 2
    u = torch.randn(4, 3, structure.features)
    values = constrain(u, structure)
    assert {name: value.shape for name, value in values.items()} == {
        "rate": (4, 3),
        "weights": (4, 3, 3),
        "level": (4, 3, 2),
    }
    torch.testing.assert_close(unconstrain(values, structure), u)
    jacobian = jacobian_of(lambda u: torch.cat(_free(constrain(u, structure))), u[0, 0])
    expected = torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(log_abs_det(u, structure)[0, 0], expected)


def _free(values: dict[str, Tensor]) -> list[Tensor]:
    # a point of the simplex is two numbers
    return [values["rate"].reshape(1), values["weights"][:2], values["level"]]


@pytest.mark.parametrize("way", ["plate", "loop"])
def test_prior_density_is_that_of_a_trace(way: str) -> None:
    simulator = _all_kinds(way)
    u = simulator.draw_prior(5)
    log_prior = simulator.log_prior(u)
    assert log_prior.shape == (5,)
    values = constrain(u, simulator.structure)
    for i in range(5):
        given = {name: value[i] for name, value in values.items()}
        trace = poutine.trace(poutine.condition(sites_of_all_kinds, given)).get_trace()
        expected = trace.log_prob_sum(lambda name, _, given=given: name in given)
        expected = expected + log_abs_det(u[i], simulator.structure)
        torch.testing.assert_close(log_prior[i], expected)


@pytest.mark.parametrize("way", WAYS)
def test_draws_have_the_moments_of_the_model(way: str) -> None:
    simulator = _simulator(linear_gaussian, way)
    num = 300 if way == "loop" else 2000
    u = simulator.draw_prior(num)
    x = simulator.simulate(u).observations["x"]
    joint = torch.cat([u, x], 1)
    error = 5 / math.sqrt(num)
    assert abs(float(u[:, 0].mean())) < error
    assert abs(float(u[:, 1].mean()) - 0.5) < 1.5 * error
    residual = x - u @ torch.tensor([[1.0, -0.3], [0.5, 1.2]])
    assert (residual.mean(0).abs() < 0.6 * error).all()
    assert ((residual.std(0) / 0.6 - 1).abs() < error).all()
    # every run has noise of its own
    assert len(joint.unique(dim=0)) == num
    assert abs(float(torch.corrcoef(residual.T)[0, 1])) < error


def test_prior_is_drawn_without_running_the_simulator() -> None:
    runs = []

    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        runs.append(1)
        pyro.deterministic("x", theta)

    simulator = _simulator(model, "vmap")
    runs.clear()
    simulator.log_prior(simulator.draw_prior(10))
    assert not runs
    simulator.simulate(simulator.draw_prior(10))
    assert runs == [1]


@pytest.mark.parametrize("way", WAYS)
def test_model_inside_of_other_handlers_is_alone(way: str) -> None:
    simulator = _simulator(two_moons, way, nuisance=("angle", "radius"))
    with poutine.trace() as trace, pyro.plate("outside", 3):
        assert simulator.draw_prior(4).shape == (4, 2)
    assert list(trace.trace.nodes) == ["outside"] or not trace.trace.nodes


@pytest.mark.parametrize("way", ["plate", "loop"])
def test_same_simulations_from_the_same_seed(way: str) -> None:
    simulator = _all_kinds(way)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(simulator.simulate(simulator.draw_prior(6)).observations["count"])
    assert torch.equal(*results)


def test_models_for_one_run_are_vectorised() -> None:
    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        # elements by their place: wrong under a plate, right under vmap
        pyro.sample("x", dist.Normal(theta[0] * theta[1], 1.0))

    assert _simulator(model).vectorize == "vmap"


def test_models_for_batches_run_under_a_plate() -> None:
    def model() -> None:
        theta = pyro.sample("theta", dist.Beta(2.0, 2.0))  # which vmap cannot draw
        pyro.sample("x", dist.Normal(theta, 1.0))

    simulator = _simulator(model)
    assert simulator.vectorize == "plate"
    assert simulator.simulate(simulator.draw_prior(7)).observations["x"].shape == (7,)


def test_draws_that_take_any_number_of_random_numbers_run_under_a_plate() -> None:
    def model() -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))  # which vmap cannot draw
        pyro.sample("binomial", dist.Binomial(100, p))
        pyro.sample("gamma", dist.Gamma(0.5 + p, 1.0))
        pyro.sample("x", dist.Normal(p, 1.0))

    for _ in range(5):
        assert _simulator(model, observed=("binomial", "gamma", "x")).vectorize == "plate"


def _mixes_runs() -> None:
    theta = pyro.sample("theta", dist.Beta(2.0, 2.0))
    pyro.sample("x", dist.Normal(theta.sum(), 1.0))


def _shares_noise() -> None:
    theta = pyro.sample("theta", dist.Beta(2.0, 2.0))
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
    pyro.deterministic("x", theta + noise.mean())


def _looks_at_values() -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.deterministic("x", 2.0 * theta if theta > 0 else theta)


def _noise_of_numpy() -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(theta + np.random.normal(), 1.0))


def _noise_without_a_batch() -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    if theta.isnan().any():  # which vmap cannot ask
        raise ValueError("theta is NaN")
    pyro.deterministic("x", theta + torch.randn(()))


@pytest.mark.parametrize(
    "model",
    [_mixes_runs, _shares_noise, _looks_at_values, _noise_of_numpy, _noise_without_a_batch],
)
def test_models_that_cannot_be_vectorised_run_one_by_one(model: Callable[[], None]) -> None:
    nuisance = ("noise",) if model is _shares_noise else ()
    with pytest.warns(VectorizationWarning, match="once per simulation"):
        simulator = _simulator(model, nuisance=nuisance)
    assert simulator.vectorize == "loop"
    assert simulator.simulate(simulator.draw_prior(4)).observations["x"].shape == (4,)


def test_the_prior_is_vectorised_where_the_simulator_is_not() -> None:
    num_runs = 0

    def model() -> None:
        nonlocal num_runs
        num_runs += 1
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        pyro.deterministic("x", torch.tensor(float(rate) * float(weights[0])))

    simulator = _simulator(model, "loop")
    latents = simulator.draw_prior(100)
    num_runs = 0
    found = simulator.log_prior(latents)
    assert num_runs == 1
    values = constrain(latents, simulator.structure)
    expected = dist.Gamma(2.0, 1.0).log_prob(values["rate"]) + math.log(2.0)
    expected = expected + log_abs_det(latents, simulator.structure)
    torch.testing.assert_close(found, expected)


def test_a_prior_that_looks_at_values_is_scored_one_by_one() -> None:
    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        other = pyro.sample("other", dist.Normal(0.0, 1.0 if theta > 0.0 else 2.0))
        pyro.deterministic("x", theta + other)

    found = _simulator(model, "loop").log_prior(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    torch.testing.assert_close(found[0] - found[1], torch.tensor(math.log(2.0)))


def test_a_plate_around_a_model_for_one_run_fails() -> None:
    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(theta[0], 1.0))

    simulator = _simulator(model, "plate")
    outcome = simulator.simulate(simulator.draw_prior(4))
    assert outcome.observations["x"].isnan().all()
    assert "Shape mismatch" in outcome.failure


@pytest.mark.parametrize("way", WAYS)
def test_runs_that_raise_have_failed_and_the_others_have_not(way: str) -> None:
    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(10.0, 0.1))
        factor = torch.linalg.cholesky(theta[..., None, None])
        pyro.deterministic("x", factor.squeeze(-1).squeeze(-1))

    simulator = _simulator(model, way)
    outcome = simulator.simulate(torch.tensor([[1.0], [-1.0], [4.0]]))
    expected = torch.tensor([1.0, torch.nan, 2.0])
    torch.testing.assert_close(outcome.observations["x"], expected, equal_nan=True)
    assert "cholesky" in outcome.failure


def test_log_joint_is_that_of_a_trace() -> None:
    simulator = _simulator(linear_gaussian, "vmap")
    u = torch.randn(3, 2)
    x = torch.tensor([0.3, -0.2])
    given = {"first": u[1, 0], "second": u[1, 1], "x": x}
    trace = poutine.trace(poutine.condition(linear_gaussian, given)).get_trace()
    found = simulator.log_joint(u, {"x": x})
    torch.testing.assert_close(found[1], trace.log_prob_sum())
