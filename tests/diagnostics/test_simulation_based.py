"""Simulation-based calibration: passes right posteriors, and says how others are wrong."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext.diagnostics import RankCalibration, simulation_based_calibration
from tests.diagnostics.problems import NUM_DRAWS, SCALES, gaussian_model, sampler

Values = dict[str, Tensor]


def calibrate(posterior: Callable[[Values], Values], **settings: Any) -> RankCalibration:
    options = {"observed": "x", "num_simulations": 300, "disable_progbar": True, **settings}
    model = options.pop("model", gaussian_model)
    return simulation_based_calibration(model, posterior, **options)


@pytest.mark.parametrize("batch_size", [None, 7, 1000], ids=["single", "batches", "at once"])
@pytest.mark.parametrize("kind", SCALES)
def test_gaussian(kind: str, batch_size: int | None) -> None:
    result = calibrate(sampler(*SCALES[kind]), batch_size=batch_size)
    assert result.ranks["z"].shape == (300, 2)
    assert result.num_draws == NUM_DRAWS
    location, spread = result.location["z"], result.spread["z"]
    if kind == "right":
        assert result.p_value > 0.01
    else:
        assert result.p_value < 1e-6
    if kind == "narrow":
        assert (spread > 1.3).all()
    elif kind == "wide":
        assert (spread < 0.7).all()
    elif kind == "high":  # draws too high: the truth has low ranks
        assert (location < 0.4).all()


def test_a_posterior_that_ignores_the_data_fails_by_the_likelihood_only() -> None:
    """Modrák et al. 2023, section 2: parameters from the prior have uniform ranks."""

    def prior(observation: Values) -> Values:
        del observation
        return {"z": torch.randn(NUM_DRAWS, 2)}

    def log_likelihood(latents: Values, observation: Values) -> Tensor:
        return dist.Normal(latents["z"], 1.0).to_event(1).log_prob(observation["x"])

    result = calibrate(prior, quantities={"log likelihood": log_likelihood})
    assert set(result.ranks) == {"z", "log likelihood"}
    parameters = torch.cat([result.chi_square["z"], result.kolmogorov_smirnov["z"]])
    assert parameters.min() > 0.002
    assert result.p_value < 1e-6
    assert result.location["log likelihood"] > 0.6


def test_discrete_sites_and_deterministic_ones() -> None:
    """Ties are broken at random; deterministic sites are ranked where the posterior has them."""
    prior = torch.tensor([0.5, 0.3, 0.2])
    likelihood = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.1, 0.9]])

    def model() -> None:
        k = pyro.sample("k", dist.Categorical(prior))
        pyro.deterministic("squared", k**2)
        pyro.deterministic("x", pyro.sample("seen", dist.Categorical(likelihood[k])))

    def posterior(observation: Values) -> Values:
        k = dist.Categorical(prior * likelihood[:, observation["x"]]).sample((20,))
        return {"k": k, "squared": (k**2).numpy()}

    result = calibrate(posterior, model=model)
    assert set(result.ranks) == {"k", "squared"}
    assert result.p_value > 0.01
    assert set(calibrate(posterior, model=model, sites=["k"]).ranks) == {"k"}


def test_values_given_to_the_model_are_not_used() -> None:
    conditioned = pyro.condition(gaussian_model, {"x": torch.full((2,), 100.0)})
    assert calibrate(sampler(), model=conditioned).p_value > 0.01


def test_failed_simulations_are_replaced_and_counted() -> None:
    """The posterior given data that are finite is right whatever else might have happened."""

    def failing() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        mean = z.where(z.sum() < 1.0, torch.full_like(z, torch.nan))
        with pyro.validation_enabled(False):
            pyro.sample("x", dist.Normal(mean, 1.0, validate_args=False).to_event(1))

    def posterior(observation: Values) -> Values:
        kept = torch.empty(0, 2)
        while len(kept) < NUM_DRAWS:
            z = 0.5 * observation["x"] + 0.5**0.5 * torch.randn(200, 2)
            kept = torch.cat([kept, z[z.sum(-1) < 1.0]])
        return {"z": kept[:NUM_DRAWS]}

    result = calibrate(posterior, model=failing)
    # P(N(0, 2) > 1) = 0.24 of the runs fail
    assert 50 < result.num_failed < 150
    assert result.p_value > 0.01


def test_arguments_of_the_model() -> None:
    def model(scale: float, *, shift: float) -> None:
        z = pyro.sample("z", dist.Normal(shift, scale))
        pyro.sample("x", dist.Normal(z, 1.0))

    def prior(observation: Values) -> Values:
        del observation
        return {"z": 50 + 3 * torch.randn(NUM_DRAWS)}

    result = calibrate(prior, model=model, args=(3.0,), kwargs={"shift": 50.0})
    assert result.p_value > 0.01


def _with_factor() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("weight", -z.abs())
    pyro.sample("x", dist.Normal(z, 1.0))


def _always_fails() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.deterministic("x", torch.tensor(torch.nan))


def _quantity_of_wrong_shape(latents: Values, observation: Values) -> Tensor:
    del observation
    return latents["z"].sum()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_simulations": 19}, r"num_simulations=19 .*at least 20"),
        ({"batch_size": 0}, r"batch_size .*got 0"),
        ({"observed": "X"}, r"observed: the model has no site 'X'"),
        ({"observed": []}, "observed must name"),
        ({"observed": ["x", "z"]}, "Nothing is left to infer"),
        ({"sites": ["zz"]}, r"sites: the model has no site 'zz'; did you mean 'z'"),
        ({"model": _with_factor}, r"factors \['weight'\]"),
        ({"model": _always_fails}, r"fails nearly everywhere"),
        ({"quantities": {"z": lambda latents, data: latents["z"]}}, r"'z' is the name of a site"),
        ({"quantities": {"q": _quantity_of_wrong_shape}}, r"\['q'\] returned shape \(\)"),
    ],
    ids=[
        "few", "batch", "misspelt", "nothing observed", "all observed", "unknown site", "factor",
        "failing", "name taken", "quantity",
    ],
)  # fmt: skip
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(sampler(), **settings)


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        ({}, "no draws"),
        ({"zz": torch.zeros(5, 2)}, r"no site 'zz'; did you mean 'z'"),
        ({"z": torch.zeros(5)}, r"'z' of shape \(5,\); expected \(num_draws,\) \+ \(2,\)"),
        ({"z": torch.zeros(0, 2)}, r"shape \(0, 2\)"),
        ({"z": torch.full((5, 2), torch.nan)}, "not finite"),
    ],
    ids=["empty", "misspelt", "shape", "no draws", "nan"],
)
def test_bad_draws(draws: Values, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(lambda observation: draws)


def test_the_number_of_draws_must_not_change() -> None:
    numbers = iter([10, 11])
    with pytest.raises(ValueError, match=r"11 draws of 'z', but 10 before"):
        calibrate(lambda observation: {"z": torch.randn(next(numbers), 2)})
