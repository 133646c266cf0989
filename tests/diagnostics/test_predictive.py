"""Posterior predictive checks against closed forms."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor

from pyro_ext.diagnostics import posterior_predictive_check

Values = dict[str, Tensor]
X = torch.tensor([0.3, -1.2, 2.1, 0.8], dtype=torch.float64)
NUM_DRAWS = 4000

QUANTITIES = {
    "mean": lambda latents, data: data["x"].mean(-1),
    "largest": lambda latents, data: data["x"].max(-1).values,
    "discrepancy": lambda latents, data: (data["x"] - latents["z"][:, None]).square().sum(-1),
    "elements": lambda latents, data: data["x"],
}


def model() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 10.0))
    with pyro.plate("data", 4):
        pyro.sample("x", dist.Normal(z, 1.0))


def draws(number: int = NUM_DRAWS) -> Values:
    variance = 1 / (4 + 0.01)
    return {"z": variance * X.sum() + variance**0.5 * torch.randn(number)}


@pytest.mark.parametrize("parallel", [False, True], ids=["one by one", "parallel"])
def test_tail_probabilities(parallel: bool) -> None:
    number = NUM_DRAWS if parallel else 500
    check = posterior_predictive_check(
        model, draws(number), {"x": X}, QUANTITIES, parallel=parallel
    )
    assert check.replicated["elements"].shape == (number, 4)
    # the replicated mean is normal around the posterior mean
    variance = 1 / 4.01
    loc, scale = float(variance * X.sum()), (variance + 0.25) ** 0.5
    exact = {"mean": scipy.stats.norm.sf(float(X.mean()), loc, scale)}
    exact["elements"] = scipy.stats.norm.sf(X.numpy(), loc, (variance + 1) ** 0.5)
    # replicated: chi-square with 4 degrees of freedom; realized: of all draws, by simulation
    z = draws(100_000)["z"]
    realized = (X - z[:, None]).square().sum(-1)
    exact["discrepancy"] = float(torch.from_numpy(scipy.stats.chi2.sf(realized, 4)).mean())
    for name, value in exact.items():
        truth = torch.as_tensor(value)
        error = (truth * (1 - truth) / number).sqrt()
        assert ((check.tail_probability[name] - truth).abs() < 5 * error + 2e-3).all(), name
    assert (check.realized["mean"] == X.mean()).all()
    assert check.realized["discrepancy"].std() > 0


def test_a_model_that_is_too_narrow_is_found_out() -> None:
    check = posterior_predictive_check(model, draws(200), {"x": 10 * X}, QUANTITIES)
    assert check.tail_probability["discrepancy"] < 0.01
    assert check.tail_probability["largest"] < 0.01


def test_ties_count_by_half() -> None:
    def coin() -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.sample("x", dist.Bernoulli(p))

    check = posterior_predictive_check(
        coin,
        {"p": torch.full((NUM_DRAWS,), 0.8)},
        {"x": torch.tensor(1.0)},
        {"x": lambda latents, data: data["x"]},
        parallel=True,
    )
    # tied with probability 0.8, and never above
    assert abs(float(check.tail_probability["x"]) - 0.4) < 5 * 0.5 * (0.16 / NUM_DRAWS) ** 0.5


def test_simulators_and_deterministic_sites() -> None:
    """The observation may be deterministic, and draws may hold deterministic sites too."""

    def simulator() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.deterministic("x", z + 0.1 * noise)

    z = torch.linspace(-1, 1, 50)
    check = posterior_predictive_check(
        pyro.condition(simulator, {"x": torch.tensor(5.0)}),
        {"z": z.numpy(), "twice": 2 * z},
        {"x": 0.0},
        {"error": lambda latents, data: (data["x"] - 0.5 * latents["twice"]).abs()},
    )
    assert 0 < float(check.replicated["error"].max()) < 0.5
    torch.testing.assert_close(check.realized["error"], z.abs())


def _scalar(latents: Values, data: Values) -> Tensor:
    del latents
    return data["x"].sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observation": {}}, "at least one entry"),
        ({"quantities": {}}, "at least one entry"),
        ({"observation": {"y": X}}, r"observed: the model has no site 'y'"),
        ({"observation": {"x": X[:3]}}, r"'x' has shape \(3,\).*\(4,\)"),
        ({"draws": {"zz": torch.zeros(5)}}, r"draws: .*'zz'; did you mean 'z'"),
        ({"draws": {}}, "none of the sites"),
        ({"quantities": {"sum": _scalar}}, r"\['sum'\] returned shape \(\)"),
    ],
    ids=["no data", "no quantity", "misspelt", "shape", "draws", "no draws", "quantity"],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "draws": draws(30), "observation": {"x": X}, "quantities": QUANTITIES, **changes
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        posterior_predictive_check(model, **arguments)


def test_sites_must_have_the_same_number_of_draws() -> None:
    def two() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a + b, 1.0))

    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        posterior_predictive_check(
            two, {"a": torch.zeros(3), "b": torch.zeros(4)}, {"x": torch.tensor(0.0)}, QUANTITIES
        )
