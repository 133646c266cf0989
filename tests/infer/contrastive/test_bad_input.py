import math
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ext import NeuralLikelihoodEstimator, NeuralPosteriorEstimator, NeuralRatioEstimator
from pyro_ext.errors import ModelStructureError, PyroExtError, SamplingWarning
from tests.infer.contrastive.problems import (
    ESTIMATORS,
    SMALL_FLOW,
    linear_gaussian,
    make,
    sites_of_all_kinds,
    two_moons,
)


def _normal() -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(theta, 0.5))


def _two_observed() -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(theta, 0.5))
    pyro.sample("y", dist.Normal(theta, 0.5))


def _discrete() -> None:
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    pyro.sample("x", dist.Normal(k.double(), 1.0))


def _moving_support() -> None:
    low = pyro.sample("low", dist.Normal(0.0, 1.0))
    pyro.sample("theta", dist.Uniform(low, low + 1.0))
    pyro.sample("x", dist.Normal(low, 1.0))


def _latent_after_observation() -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(theta, 1.0))
    pyro.sample("later", dist.Normal(theta, 1.0))


def _prior_given_nuisance() -> None:
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, scale))
    pyro.sample("x", dist.Normal(theta, 1.0))


def _with_data() -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(theta, 1.0))
    pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor(1.0))


MODELS: dict[str, tuple[Callable[[], None], dict[str, Any], str]] = {
    "misspelt": (_normal, {"observed": ["X"]}, "Did you mean 'x'|does not have"),
    "no observed": (_normal, {"observed": []}, "observed is empty"),
    "observed twice": (_normal, {"observed": ["x", "x"]}, "names a site twice"),
    "unknown latent": (_normal, {"latents": ["thetas"]}, "Did you mean 'theta'"),
    "unknown nuisance": (_normal, {"nuisance": ["noise_*"]}, "noise_"),
    "both lists": (_two_observed, {"latents": ["theta"], "nuisance": ["y"]}, "Give either"),
    "nothing left": (_normal, {"nuisance": ["theta"]}, "no latent site"),
    "discrete": (_discrete, {}, "discrete distribution"),
    "moving support": (_moving_support, {}, "support of latent site 'theta' depends"),
    "latent after": (_latent_after_observation, {}, "before latent site 'later'"),
    "prior given nuisance": (_prior_given_nuisance, {"nuisance": ["scale"]}, "depends on sites"),
    "other evidence": (_with_data, {}, "'y' is observed in the model"),
    "max_failed": (_normal, {"max_failed": 1.0}, "max_failed=1.0"),
    "vectorize": (_normal, {"vectorize": "gpu"}, "vectorize='gpu'"),
    "embedding of nothing": (_normal, {"embedding": {"y": nn.Linear(1, 1)}}, "networks for"),
    "whose embedding": (
        _two_observed,
        {"observed": ["x", "y"], "embedding": nn.Linear(1, 1)},
        "which one the network is for",
    ),
    "shape of embedding": (_normal, {"embedding": nn.Flatten(0)}, r"expected \(2, features\)"),
    "support": (_normal, {"support": "clip"}, "support='clip'"),
    "one atom": (_normal, {"num_atoms": 1}, "num_atoms=1"),
    "simplex to reject": (
        sites_of_all_kinds,
        {"nuisance": ["noise", "count"], "support": "reject"},
        "degrees of freedom",
    ),
}


@pytest.mark.parametrize(("model", "settings", "message"), MODELS.values(), ids=MODELS)
def test_models_and_settings_that_are_refused(
    model: Callable[[], None], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        NeuralPosteriorEstimator(model, **{"observed": ["x"], **settings})


def test_an_embedding_that_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"nn\.Module.*got function"):
        NeuralRatioEstimator(_normal, observed=["x"], embedding=lambda x: x)


def test_names_in_a_string_are_refused() -> None:
    with pytest.raises(TypeError, match=r"\['x'\]"):
        NeuralRatioEstimator(_normal, observed="x")


def test_observation_inside_the_model_is_taken_out() -> None:
    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(theta, 1.0), obs=torch.tensor(7.0))

    estimator = NeuralRatioEstimator(model, observed=["x"])
    assert (estimator.simulate(50).observations["x"] != 7.0).all()


def test_shapes_that_change_are_refused() -> None:
    def model() -> None:
        n = int(pyro.sample("n", dist.Poisson(20.0)))
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(theta, 1.0).expand([n]).to_event(1))

    with pytest.raises(ModelStructureError, match="'x' had shape"):
        NeuralRatioEstimator(model, observed=["x"], nuisance=["n"])


def test_sites_that_come_and_go_are_refused() -> None:
    count = iter(range(100))

    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        if next(count) % 2 == 0:
            pyro.sample("other", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(theta, 1.0))

    with pytest.raises(ModelStructureError, match="'other' occurs"):
        NeuralRatioEstimator(model, observed=["x"])


def test_too_many_failures() -> None:
    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.deterministic("x", theta / 0.0 * 0.0)

    estimator = NeuralRatioEstimator(model, observed=["x"])
    with pytest.raises(PyroExtError, match="100 of 100 simulations failed"):
        estimator.simulate(100)
    assert estimator.simulations is None


def test_too_few_simulations() -> None:
    estimator = NeuralRatioEstimator(_normal, observed=["x"], num_atoms=5)
    with pytest.raises(ValueError, match="nothing to train on"):
        estimator.fit()
    estimator.simulate(100)
    with pytest.raises(ValueError, match="too few for minibatches of batch_size=200"):
        estimator.fit(batch_size=200)
    with pytest.raises(ValueError, match=r"num_atoms=5 parameters.*batch_size=4"):
        estimator.fit(batch_size=4)
    with pytest.raises(ValueError, match="no posterior yet"):
        estimator.posterior(torch.tensor(0.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_epochs": 0}, "num_epochs"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"batch_size": 2.5}, "batch_size"),
    ],
    ids=["num_epochs", "validation_fraction", "learning_rate", "batch_size"],
)
def test_settings_of_a_fit(arguments: dict[str, Any], message: str) -> None:
    estimator = NeuralRatioEstimator(_normal, observed=["x"])
    estimator.simulate(300)
    with pytest.raises(ValueError, match=message):
        estimator.fit(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"num_simulations": 0}, {"num_simulations": 5, "timeout": 1.0}, {"num_simulations": True}],
    ids=["none", "timeout without workers", "bool"],
)
def test_settings_of_simulations(arguments: dict[str, Any]) -> None:
    estimator = NeuralRatioEstimator(_normal, observed=["x"])
    with pytest.raises(ValueError, match="num_"):
        estimator.simulate(**arguments)


OBSERVATIONS: dict[str, tuple[Any, str]] = {
    "name": ({"z": torch.zeros(2)}, "needed are"),
    "shape": (torch.zeros(3), "has shape"),
    "NaN": (torch.tensor([0.0, math.nan]), "not finite"),
}


@pytest.mark.parametrize(("value", "message"), OBSERVATIONS.values(), ids=OBSERVATIONS)
def test_observations_that_do_not_fit(value: Any, message: str) -> None:
    estimator = _trained("ratio")
    with pytest.raises(ValueError, match=message):
        estimator.posterior(value)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_observations_far_outside_are_warned_of_with_the_measure(kind: str) -> None:
    estimator = _trained(kind)
    estimator.posterior(torch.tensor([0.5, 0.5]))
    with pytest.warns(SamplingWarning, match=r"element \(1,\) of site 'x' is 100.* range away"):
        estimator.posterior(torch.tensor([0.5, 100.0]))


def _trained(kind: str) -> Any:
    estimator = make(kind, linear_gaussian)
    estimator.simulate(300)
    estimator.fit(num_epochs=1)
    return estimator


def test_simulations_from_elsewhere_that_do_not_fit() -> None:
    estimator = NeuralRatioEstimator(linear_gaussian, observed=["x"])
    latents = {"first": torch.zeros(3), "second": torch.zeros(3)}
    with pytest.raises(ValueError, match="'x' has shape"):
        estimator.add_simulations(latents, {"x": torch.zeros(3)})
    with pytest.raises(ValueError, match="has the sites"):
        estimator.add_simulations({"first": torch.zeros(3)}, {"x": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="different numbers of runs"):
        estimator.add_simulations(latents, {"x": torch.zeros(4, 2)})
    latents["first"][1] = math.nan
    with pytest.raises(ValueError, match="'first' has values that are not finite"):
        estimator.add_simulations(latents, {"x": torch.zeros(3, 2)})


def test_latents_from_elsewhere_outside_of_the_support() -> None:
    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        p = pyro.sample("p", dist.Uniform(0.0, 1.0))
        pyro.sample("x", dist.Normal(rate + p, 1.0))

    estimator = NeuralRatioEstimator(model, observed=["x"])
    rate, p, x = torch.ones(3), torch.tensor([0.0, 0.5, 1.0]), {"x": torch.zeros(3)}
    with pytest.raises(ValueError, match="'rate' has 1 of 3 values outside"):
        estimator.add_simulations({"rate": p - 0.1, "p": p}, x)
    with pytest.raises(ValueError, match="'p' has 2 of 3 values outside"):
        estimator.add_simulations({"rate": rate, "p": 2.1 * p - 0.1}, x)
    assert estimator.simulations is None
    estimator.add_simulations({"rate": rate, "p": p}, x)


def test_likelihoods_that_are_not_tractable() -> None:
    estimator = NeuralPosteriorEstimator(
        two_moons, observed=["x"], nuisance=["angle", "radius"], flow=SMALL_FLOW
    )
    estimator.simulate(300)
    estimator.fit(num_epochs=1)
    posterior = estimator.posterior(torch.zeros(2))
    with pytest.raises(ValueError, match=r"not tractable: \['x'\] are computed.*\['angle'"):
        posterior.refine()
    with pytest.raises(TypeError, match="without \\['method'\\]"):
        posterior.sample(3, method="nuts")
    with pytest.raises(ValueError, match="num_samples"):
        posterior.sample(0)
    with pytest.raises(ValueError, match=r"\['theta'\] are missing"):
        posterior.log_prob({})


def test_ways_of_sampling() -> None:
    posterior = _trained("ratio").posterior(torch.zeros(2))
    with pytest.raises(ValueError, match="method='gibbs'"):
        posterior.sample(3, method="gibbs")
    with pytest.raises(ValueError, match="num_particles=5"):
        posterior.sample(10, num_particles=5)
    with pytest.raises(ValueError, match="thinning=0"):
        posterior.sample(10, method="slice", thinning=0)
    with pytest.warns(SamplingWarning, match="draws from the prior, only"):
        posterior.sample(300, method="importance", num_draws=30)


def _sometimes_hangs() -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    if theta > 1.0:
        time.sleep(60)
    if theta < -1.0:
        raise ArithmeticError("negative")
    pyro.deterministic("x", 2.0 * theta)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_simulators_that_hang_and_raise_in_processes() -> None:
    with pytest.MonkeyPatch.context() as patch:
        # the first look at the model has to get through
        patch.setattr(time, "sleep", lambda seconds: None)
        estimator = NeuralRatioEstimator(
            _sometimes_hangs, observed=["x"], vectorize="loop", max_failed=0.9
        )
    simulations = estimator.simulate(16, num_workers=2, timeout=0.3, mp_context="fork")
    theta = simulations.latents["theta"]
    assert torch.equal(simulations.is_valid, theta.abs() <= 1.0)
    assert 0 < simulations.num_failed < 16
    x = simulations.observations["x"][simulations.is_valid]
    torch.testing.assert_close(x, 2.0 * theta[simulations.is_valid])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_give_the_same_whatever_their_number() -> None:
    estimator = NeuralLikelihoodEstimator(_normal, observed=["x"], flow=SMALL_FLOW)
    results = []
    for num_workers in (1, 2):
        torch.manual_seed(5)
        new = estimator.simulate(40, batch_size=10, num_workers=num_workers, mp_context="fork")
        results.append(new.observations["x"])
    assert torch.equal(*results)
    assert len(results[0].unique()) == 40


def _with_generators_of_others() -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    noise = np.random.normal() + random.gauss()
    pyro.deterministic("x", theta + noise)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_generators_of_numpy_and_python_differ_between_batches() -> None:
    estimator = NeuralRatioEstimator(_with_generators_of_others, observed=["x"], vectorize="loop")
    results = []
    for num_workers in (1, 2):
        torch.manual_seed(5)
        new = estimator.simulate(12, batch_size=3, num_workers=num_workers, mp_context="fork")
        results.append(new.observations["x"] - new.latents["theta"])
    torch.testing.assert_close(*results)
    assert len(results[0].unique()) == 12


def test_a_model_is_looked_at_where_it_works() -> None:
    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        if theta < 0.0:
            raise RuntimeError("did not converge")
        pyro.sample("noise", dist.Normal(0.0, 1.0))
        pyro.deterministic("x", theta.sqrt())

    for _ in range(5):
        NeuralRatioEstimator(model, observed=["x"], nuisance=["noise"], vectorize="loop")

    num_runs = 0

    def never() -> None:
        nonlocal num_runs
        num_runs += 1
        pyro.sample("theta", dist.Normal(0.0, 1.0))
        raise RuntimeError("did not converge")

    with pytest.raises(RuntimeError, match="did not converge"):
        NeuralRatioEstimator(never, observed=["x"])
    assert num_runs == 20


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_density_at_values_of_any_kind(kind: str) -> None:
    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        p = pyro.sample("p", dist.Uniform(0.0, 1.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(rate + p + weights[0], 1.0))

    estimator = make(kind, model, vectorize="loop")
    simulations = estimator.simulate(200)
    estimator.fit(num_epochs=1)
    posterior = estimator.posterior(torch.tensor(1.0))
    draws = {name: value[:6] for name, value in simulations.latents.items()}
    expected = posterior.log_prob(draws)
    grid = {name: value.reshape(2, 3, *value.shape[1:]) for name, value in draws.items()}
    torch.testing.assert_close(posterior.log_prob(grid), expected.reshape(2, 3))
    one = {name: value[0] for name, value in draws.items()}
    torch.testing.assert_close(posterior.log_prob(one | {"other": 1.0}), expected[0])
    single = {name: value.float() for name, value in draws.items()}
    torch.testing.assert_close(posterior.log_prob(single), expected, atol=1e-3, rtol=1e-3)
    for outside in ({"rate": -1.0}, {"p": 1.5}, {"weights": torch.tensor([0.5, 0.7, -0.2])}):
        assert posterior.log_prob(one | outside) == -math.inf
    with pytest.raises(ValueError, match=r"'weights' have shape \(2,\)"):
        posterior.log_prob(one | {"weights": torch.tensor([0.2, 0.8])})
    with pytest.raises(ValueError, match="different numbers"):
        posterior.log_prob(draws | {"rate": torch.ones(4)})
    with pytest.raises(ValueError, match="missing"):
        posterior.log_prob({"rate": torch.tensor(1.0)})
