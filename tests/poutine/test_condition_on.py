"""Densities and draws of partly observed sites, and what is refused."""

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_ext.poutine import condition_on
from pyro_ext.poutine.condition_on import FillFreeElements, evidence_of, free_log_prob

ROWS, SIZE = 3, 4

FAMILIES: dict[str, Callable[[Tensor], Any]] = {
    "bernoulli": lambda eta: dist.Bernoulli(logits=eta),
    "normal": lambda eta: dist.Normal(eta, 0.3),
    "log-normal": lambda eta: dist.LogNormal(eta, 0.3),
    "categorical": lambda eta: dist.Categorical(logits=torch.stack([eta, -eta, 0.5 * eta], -1)),
    "gamma": lambda eta: dist.Gamma(eta.exp(), 2.0),
}


def _decoder(z: Tensor) -> Tensor:
    return torch.stack([z[..., 0], z.sum(-1), z[..., 0] * z[..., 1], 1 - z[..., 1]], -1)


def _in_event(family: str) -> None:
    with pyro.plate("rows", ROWS):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", FAMILIES[family](_decoder(z)).to_event(1))


def _in_plates(family: str) -> None:
    with pyro.plate("rows", ROWS, dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1, 2), 1.0).to_event(1))
        with pyro.plate("elements", SIZE, dim=-1):
            pyro.sample("x", FAMILIES[family](_decoder(z).squeeze(-2)))


FORMS = {"event": _in_event, "plates": _in_plates}


def _case(form: str, family: str) -> tuple[Callable[[str], None], Tensor, Tensor]:
    """A model, latents, and data drawn from it."""
    model = FORMS[form]
    trace = poutine.trace(model).get_trace(family)
    return model, trace.nodes["z"]["value"], trace.nodes["x"]["value"]


def _trace(model: Callable[..., Any], z: Tensor, *args: Any) -> poutine.Trace:
    trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(*args)
    trace.compute_log_prob()
    return trace


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_evidence_is_scored_element_by_element(form: str, family: str) -> None:
    model, z, x = _case(form, family)
    eta = _decoder(z.reshape(ROWS, 2))
    each = FAMILIES[family](eta).log_prob(x)
    for mask in (torch.rand(ROWS, SIZE) < 0.5, torch.zeros(ROWS, SIZE) > 0, x == x):
        conditioned = condition_on(model, {"x": x}, {"x": mask})
        trace = _trace(conditioned, z, family)
        expected = (each * mask).sum(-1) if form == "event" else each * mask
        torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected)
        assert trace.nodes["x"]["is_observed"]
        # the rest is scored afterwards, at the value that it has
        drawn = FAMILIES[family](eta).log_prob(trace.nodes["x"]["value"])
        expected = (drawn * ~mask).sum(-1) if form == "event" else drawn * ~mask
        torch.testing.assert_close(free_log_prob(trace.nodes["x"]), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_free_elements_are_draws_and_the_others_the_evidence(form: str, family: str) -> None:
    model, z, x = _case(form, family)
    mask = torch.tensor([True, False, False, True])
    conditioned = condition_on(model, {"x": x}, {"x": mask})
    with pyro.plate("draws", 300, dim=-3 if form == "plates" else -2):
        trace = _trace(conditioned, z.expand(300, *z.shape), family)
    draws = trace.nodes["x"]["value"].to(torch.get_default_dtype())
    assert (draws[..., mask] == x[:, mask]).all()
    eta = _decoder(z.reshape(ROWS, 2))
    exact = FAMILIES[family](eta)
    many = exact.sample((20_000,)).to(torch.get_default_dtype())
    error = (draws.mean(0) - many.mean(0))[:, ~mask] / (many.std(0)[:, ~mask] / 300**0.5 + 1e-12)
    assert (error.abs() < 5).all()


def test_no_latent_is_added_and_engines_see_an_ordinary_observation(param_store: Any) -> None:
    model, _, x = _case("event", "bernoulli")
    conditioned = condition_on(model, {"x": x}, {"x": torch.rand(ROWS, SIZE) < 0.5})
    guide = AutoNormal(conditioned)
    svi = SVI(conditioned, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(3, True))
    svi.step("bernoulli")
    draws = Predictive(conditioned, guide=guide, num_samples=5)("bernoulli")
    assert draws["x"].shape == (5, ROWS, SIZE)
    assert set(draws) >= {"z", "x"}


@pytest.mark.parametrize("form", FORMS)
def test_evidence_in_vectorised_particles(form: str) -> None:
    model, _, x = _case(form, "normal")
    mask = torch.rand(ROWS, SIZE) < 0.5
    conditioned = condition_on(model, {"x": x}, {"x": mask})
    z = torch.randn(7, ROWS, *([1] if form == "plates" else []), 2)
    with pyro.plate("particles", 7, dim=-3 if form == "plates" else -2):
        together = _trace(conditioned, z, "normal").nodes["x"]["log_prob"]
    one_by_one = [_trace(conditioned, one, "normal").nodes["x"]["log_prob"] for one in z]
    torch.testing.assert_close(together, torch.stack(one_by_one))


def test_a_site_of_its_own_observation_only_needs_a_mask() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(_decoder(z), 1.0).to_event(1), obs=x)

    x, z, mask = torch.randn(2, SIZE), torch.randn(2, 2), torch.rand(2, SIZE) < 0.5
    own = _trace(condition_on(model, mask={"x": mask}), z, x)
    given = _trace(condition_on(model, {"x": x}, {"x": mask}), z, torch.zeros(2, SIZE))
    torch.testing.assert_close(own.log_prob_sum(), given.log_prob_sum())
    assert float(own.nodes["x"]["log_prob"].sum()) != float(_trace(model, z, x).log_prob_sum())


def test_several_sites_of_different_kinds() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("count", dist.Poisson(z[..., 0].exp()))
        pyro.sample("kind", dist.Categorical(logits=z))
        pyro.sample("size", dist.Normal(z, 1.0).to_event(1))

    z = torch.tensor([0.3, -1.0])
    data = {"count": torch.tensor(2.0), "size": torch.tensor([float("nan"), 1.0])}
    mask = {"kind": torch.tensor(False), "size": torch.tensor([False, True])}
    trace = _trace(condition_on(model, data, mask), z)
    expected = (
        dist.Normal(0.0, 1.0).log_prob(z).sum()
        + dist.Poisson(z[0].exp()).log_prob(data["count"])
        + dist.Normal(z[1], 1.0).log_prob(data["size"][1])
    )
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    assert evidence_of(trace.nodes["z"]) is None
    trace = poutine.trace(condition_on(model, data, mask)).get_trace()
    assert list(trace.stochastic_nodes) == ["z"]


def test_data_in_a_pyro_sample_site_are_replaced_and_nothing_else() -> None:
    def model() -> Tensor:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)
        return pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    trace = _trace(condition_on(model, {"x": torch.tensor(3.0)}), torch.tensor(0.0))
    assert float(trace.nodes["_RETURN"]["value"]) == 3.0
    assert float(trace.nodes["twice"]["value"]) == 0.0


def test_gradients_through_evidence_only() -> None:
    model, z, x = _case("event", "normal")
    mask = torch.tensor([True, False, False, False])  # x[0] depends on z[0] only
    z = z.clone().requires_grad_()
    trace = _trace(condition_on(model, {"x": x}, {"x": mask}), z, "normal")
    (gradient,) = torch.autograd.grad(trace.nodes["x"]["log_prob"].sum(), z)
    assert (gradient[:, 0] != 0).all()
    assert (gradient[:, 1] == 0).all()


def test_free_elements_can_be_given_values() -> None:
    model, z, x = _case("event", "bernoulli")
    mask, y = torch.rand(ROWS, SIZE) < 0.5, torch.ones(ROWS, SIZE)
    conditioned = condition_on(model, {"x": x}, {"x": mask})
    with FillFreeElements({"x": y}):
        trace = _trace(conditioned, z, "bernoulli")
    torch.testing.assert_close(trace.nodes["x"]["value"], torch.where(mask, x, y))
    complete = torch.where(mask, x, y)
    expected = dist.Bernoulli(logits=_decoder(z)).to_event(1).log_prob(complete)
    total = trace.nodes["x"]["log_prob"] + free_log_prob(trace.nodes["x"])
    torch.testing.assert_close(total, expected)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.lists(st.integers(1, 3), max_size=3),
    st.integers(0, 2**20),
)
def test_evidence_and_query_add_up_to_the_whole(
    plates: list[int], event: list[int], bits: int
) -> None:
    """Any shape, any mask, and masks without the first dimensions."""
    shape = torch.Size([*plates, *event])
    loc = torch.linspace(-1, 1, shape.numel()).reshape(shape)
    whole = dist.Normal(loc, 1.0).to_event(len(event))
    value = loc.flip(tuple(range(loc.dim()))).clone()

    def model() -> None:
        with _plates(plates):
            pyro.sample("x", whole)

    for drop in range(len(shape) + 1):
        mask_shape = shape[drop:]
        mask = ((bits >> torch.arange(mask_shape.numel())) % 2 == 1).reshape(mask_shape)
        trace = poutine.trace(condition_on(model, {"x": value}, {"x": mask})).get_trace()
        trace.compute_log_prob()
        each = dist.Normal(loc, 1.0).log_prob(trace.nodes["x"]["value"])
        for part, found in ((mask, "log_prob"), (~mask, None)):
            site = trace.nodes["x"]
            log_prob = site[found] if found else free_log_prob(site)
            torch.testing.assert_close(log_prob.sum(), (each * part).sum())
            assert log_prob.shape == torch.Size(plates)


def _plates(sizes: list[int]) -> Any:
    class Nested:
        def __enter__(self) -> None:
            self.plates = [
                pyro.plate(f"p{i}", size, dim=i - len(sizes)) for i, size in enumerate(sizes)
            ]
            for plate in self.plates:
                plate.__enter__()

        def __exit__(self, *error: Any) -> None:
            for plate in reversed(self.plates):
                plate.__exit__(*error)

    return Nested()


def _joint() -> None:
    with pyro.plate("rows", ROWS):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.MultivariateNormal(z, torch.eye(2)))


def test_an_event_with_a_joint_density_is_observed_as_a_whole() -> None:
    x, z = torch.randn(ROWS, 2), torch.randn(ROWS, 2)
    rows = torch.tensor([True, False, True])
    each = dist.MultivariateNormal(z, torch.eye(2)).log_prob(x) * rows
    for mask in (rows, rows[:, None].expand(ROWS, 2)):
        trace = _trace(condition_on(_joint, {"x": x}, {"x": mask}), z)
        torch.testing.assert_close(trace.nodes["x"]["log_prob"], each)
        assert (trace.nodes["x"]["value"][rows] == x[rows]).all()
    of_one_element = condition_on(_joint, {"x": x}, {"x": torch.tensor([True, False])})
    with pytest.raises(ValueError, match="MultivariateNormal, of which all elements"):
        of_one_element()


def test_a_conditioned_model_can_be_run_again() -> None:
    model, z, x = _case("event", "normal")
    conditioned = condition_on(model, {"x": x})
    first, second = (_trace(conditioned, z, "normal").log_prob_sum() for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


X = torch.zeros(ROWS, SIZE, dtype=torch.float64)
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "misspelt data": ({"X": X}, {}, ValueError, "given 'X', but .* Did you mean 'x'"),
    "misspelt mask": ({"x": X}, {"xx": X > 0}, ValueError, "given 'xx', .* sites are \\['x', 'z"),
    "too few rows": ({"x": X[:2]}, {}, ValueError, r"shape \(3, 4\), .* shape \(2, 4\)"),
    "no rows": ({"x": X[0]}, {}, ValueError, r"shape \(3, 4\), .* shape \(4,\)"),
    "mask of another shape": (
        {"x": X},
        {"x": X[:, :3] > 0},
        ValueError,
        r"mask of shape \(3, 3\)",
    ),
    "mask of one column": ({"x": X}, {"x": X[:, :1] > 0}, ValueError, r"mask of shape \(3, 1\)"),
    "mask of numbers": ({"x": X}, {"x": X}, TypeError, "'x' is a tensor of torch.float64.*bool"),
    "mask in a list": ({"x": X}, {"x": [True]}, TypeError, "'x' is list"),
    "no value": ({}, {"x": X == 0}, ValueError, "'x' has observed elements .* but no value"),
    "NaN": ({"x": X / 0}, {}, ValueError, "12 of 12 elements .* site 'x' are NaN"),
    "NaN observed": ({"x": X / 0}, {"x": X[0] == 0}, ValueError, "12 of 12 elements .*isfinite"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("form", FORMS)
def test_bad_evidence_is_refused(form: str, case: str) -> None:
    data, mask, error, message = BAD[case]
    with pytest.raises(error, match=message):
        poutine.trace(condition_on(FORMS[form], data, mask)).get_trace("normal")


def test_evidence_not_by_name_is_refused() -> None:
    with pytest.raises(TypeError, match=r"takes data by the names of sites.*got a Tensor"):
        condition_on(_in_event, X)  # type: ignore[arg-type]


def test_own_observations_are_checked_too() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=X[0, :2] / 0)

    with pytest.raises(ValueError, match="2 of 2 elements"):
        condition_on(model, mask={"x": True})()


def test_a_deterministic_site_is_refused() -> None:
    def model() -> None:
        pyro.deterministic("y", torch.zeros(2))

    with pytest.raises(ValueError, match=r"'y' is deterministic.*ConstrainedHMC"):
        condition_on(model, {"y": torch.zeros(2)})()


def test_an_error_of_the_model_is_not_covered_up() -> None:
    def model() -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        condition_on(model, {"x": torch.zeros(2)})()


def test_only_sites_of_condition_on_have_free_elements() -> None:
    trace = poutine.trace(_in_event).get_trace("normal")
    with pytest.raises(ValueError, match="'x' has no free elements"):
        free_log_prob({"name": "x", **trace.nodes["x"]})


def test_every_combination_of_observed_elements() -> None:
    """The evidence of all masks of a small site, against the sum written out."""
    x, z = torch.randn(ROWS, SIZE), torch.randn(ROWS, 2)
    each = dist.Normal(_decoder(z), 0.3).log_prob(x)
    for bits in itertools.product([False, True], repeat=SIZE):
        mask = torch.tensor(bits)
        trace = _trace(condition_on(_in_event, {"x": x}, {"x": mask}), z, "normal")
        torch.testing.assert_close(trace.nodes["x"]["log_prob"], each[:, mask].sum(-1))
