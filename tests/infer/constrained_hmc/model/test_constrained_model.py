"""Constraint and density of models against formulas written by hand."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer.autoguide.initialization import init_to_sample, init_to_value
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor
from torch.func import grad, vmap

from pyro_ext.errors import ModelStructureError
from pyro_ext.infer.constrained_hmc.model.constrained_model import ConstrainedModel


def build(model: Callable[..., Any], *args: Any, **data: Any) -> ConstrainedModel:
    conditioned = pyro.condition(model, data) if data else model
    return ConstrainedModel(conditioned, args, {})


def log_normal_pdf(x: Tensor, loc: Tensor | float = 0.0, scale: Tensor | float = 1.0) -> Tensor:
    """Summed log density of a normal distribution."""
    z = (x - loc) / scale
    log_scale = torch.as_tensor(scale).log()
    return (-0.5 * z.square() - log_scale - 0.5 * math.log(2 * math.pi)).sum()


# -- constraints ---------------------------------------------------------------------------------


def several_sites() -> None:
    a = pyro.sample("a", dist.Normal(1.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    pyro.deterministic("scalar", a * b[0, 0])
    pyro.deterministic("free", a + 1)
    pyro.deterministic("matrix", b[:, :2] ** 2)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_several_sites_of_any_shape(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(7, generator=generator)
    scalar, matrix = (
        torch.randn((), generator=generator),
        torch.randn(2, 2, generator=generator),
    )
    model = build(several_sites, scalar=scalar, matrix=matrix)
    a, b = 1 + 2 * u[0], u[1:].reshape(2, 3)
    expected = torch.cat([(a * b[0, 0] - scalar).reshape(1), (b[:, :2] ** 2 - matrix).reshape(-1)])
    torch.testing.assert_close(model.constraint(u), expected)
    torch.testing.assert_close(-model.potential(u), log_normal_pdf(u))
    assert (model.dim, model.num_constraints) == (7, 5)
    torch.testing.assert_close(model.values(u), {"a": a, "b": b})
    torch.testing.assert_close(model.deterministics(u), {"free": a + 1})


@pytest.mark.parametrize("event_dim", [None, 0], ids=["default-event_dim", "event_dim-0"])
def test_output_inside_a_plate(event_dim: int | None) -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 3):
            b = pyro.sample("b", dist.Normal(a, 2.0))
            pyro.deterministic("y", a * b, event_dim=event_dim)

    y = torch.tensor([1.0, 2.0, 3.0])
    u = torch.randn(4)
    torch.testing.assert_close(build(model, y=y).constraint(u), u[0] * (u[0] + 2 * u[1:]) - y)


@pytest.mark.parametrize(
    ("event_dim", "shape"),
    [(None, (2, 3, 4)), (1, (2, 3, 4)), (1, (3, 4)), (None, (4,))],
    ids=str,
)
def test_output_inside_nested_plates(event_dim: int | None, shape: tuple[int, ...]) -> None:
    """Whatever dimensions Pyro broadcasts, the constraint is the value that was computed."""
    full = (2, 3, 4)

    def model() -> None:
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
            value = {(2, 3, 4): z, (3, 4): z[0], (4,): z[0, 0]}[shape]
            pyro.deterministic("y", value**3, event_dim=event_dim)
        pyro.sample("more", dist.Normal(0.0, 1.0))

    y = torch.randn(shape)
    model_ = build(model, y=y)
    u = torch.randn(25)
    z = u[:24].reshape(full)
    value = {(2, 3, 4): z, (3, 4): z[0], (4,): z[0, 0]}[shape]
    torch.testing.assert_close(model_.constraint(u), (value**3 - y).reshape(-1))


def test_output_in_a_plate_of_one() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("one", 1):
            pyro.deterministic("y", a.sum(), event_dim=0)
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.deterministic("w", b * a[0], event_dim=0)

    u = torch.randn(3)
    model_ = build(model, y=torch.tensor(2.0), w=torch.tensor([0.5]))
    torch.testing.assert_close(
        model_.constraint(u), torch.stack([u[0] + u[1] - 2, u[2] * u[0] - 0.5])
    )


def _delta_by_condition(y: Tensor) -> Callable[[], None]:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        pyro.sample("y", dist.Delta(z[:2] * z[2], event_dim=1))

    return pyro.condition(model, {"y": y})


def _delta_by_obs(y: Tensor) -> Callable[[], None]:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        pyro.sample("y", dist.Delta(z[:2] * z[2], event_dim=1), obs=y)

    return model


def _delta_in_plate(y: Tensor) -> Callable[[], None]:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        with pyro.plate("items", 2):
            pyro.sample("y", dist.Delta(z[:2] * z[2]), obs=y)

    return model


@pytest.mark.parametrize("make", [_delta_by_condition, _delta_by_obs, _delta_in_plate])
def test_given_delta_sites_are_constraints(make: Callable[[Tensor], Any]) -> None:
    y = torch.tensor([0.5, -1.0])
    u = torch.randn(3)
    model = build(make(y))
    torch.testing.assert_close(model.constraint(u), 4 * u[:2] * u[2] - y)
    torch.testing.assert_close(-model.potential(u), log_normal_pdf(u))


def test_sampled_delta_sites_are_deterministic() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        d = pyro.sample("d", dist.Delta(z.sum()))
        pyro.deterministic("y", d**2)

    u = torch.randn(2)
    model_ = build(model, y=torch.tensor(1.0))
    torch.testing.assert_close(model_.constraint(u), u.sum().square().reshape(1) - 1)
    torch.testing.assert_close(model_.deterministics(u), {"d": u.sum()})


def test_a_given_output_is_handed_on() -> None:
    """One site per time step: each residual starts from the observed state before it."""
    observed = torch.tensor([0.5, -0.2, 1.5])

    def walk() -> None:
        rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        state = torch.ones(())
        for t in range(3):
            noise = pyro.sample(f"noise_{t}", dist.Normal(0.0, 1.0))
            state = pyro.deterministic(f"y_{t}", rate * state + 0.1 * noise)

    u = torch.randn(4)
    before = torch.cat([torch.ones(1), observed[:2]])
    model = build(walk, **{f"y_{t}": observed[t] for t in range(3)})
    torch.testing.assert_close(model.constraint(u), u[0] * before + 0.1 * u[1:] - observed)


def test_a_number_serves_as_observation() -> None:
    u = torch.randn(7)
    torch.testing.assert_close(
        build(several_sites, scalar=0.5).constraint(u),
        build(several_sites, scalar=torch.tensor(0.5)).constraint(u),
    )


def test_arguments_reach_the_model() -> None:
    def model(shift: Tensor, *, power: int) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.deterministic("y", (z.sum() + shift) ** power)

    conditioned = pyro.condition(model, {"y": torch.tensor(0.0)})
    built = ConstrainedModel(conditioned, (torch.tensor(2.0),), {"power": 3})
    assert float(built.constraint(torch.zeros(2))) == 8.0


# -- densities -----------------------------------------------------------------------------------


def test_observed_sites_join_the_density() -> None:
    data = torch.tensor([1.0, 2.0, -1.0])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(1.0, 2.0).expand([3]).to_event(1))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(z[0], 0.5), obs=data)
        pyro.factor("bonus", -z[1].square())
        pyro.deterministic("y", z.sum())

    u = torch.randn(3)
    z = 1 + 2 * u
    expected = log_normal_pdf(u) + log_normal_pdf(data, z[0], 0.5) - z[1].square()
    torch.testing.assert_close(-build(model, y=torch.tensor(0.0)).potential(u), expected)


def test_conditioned_latent_sites_join_the_density() -> None:
    u = torch.randn(3)

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        b = pyro.sample("b", dist.Normal(a, 1.0).expand([2]).to_event(1))
        c = pyro.sample("c", dist.Normal(a, 3.0))
        pyro.deterministic("y", a + b.sum() + c)

    model_ = build(model, y=torch.tensor(0.0), c=torch.tensor(1.0))
    assert model_.dim == 3
    expected = log_normal_pdf(u) + log_normal_pdf(torch.tensor(1.0), 2 * u[0], 3.0)
    torch.testing.assert_close(-model_.potential(u), expected)


def test_constrained_supports_and_a_hierarchical_scale() -> None:
    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
        shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        z = pyro.sample("z", dist.Normal(rate, scale))
        pyro.deterministic("y", z * shares[0])

    built = build(model, y=torch.tensor(0.3))

    def free(u: Tensor) -> Tensor:
        values = built.values(u)
        first = torch.stack([values["rate"], *values["shares"][:2]])
        return torch.cat([first, torch.stack([values["scale"], values["z"]])])

    for _ in range(5):
        u = torch.randn(5)
        values = built.values(u)
        conditioned = poutine.condition(model, values)
        trace = poutine.trace(conditioned).get_trace()
        log_prob = sum(trace.nodes[name]["fn"].log_prob(values[name]) for name in values)
        log_prob = log_prob + torch.linalg.slogdet(torch.func.jacrev(free)(u))[1]
        torch.testing.assert_close(-built.potential(u), log_prob)


def _weighted(kind: str) -> Callable[[], None]:
    data = torch.tensor([1.0, 2.0])
    keep = torch.tensor([True, False])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        if kind == "scaled-observed":
            with poutine.scale(scale=0.3):
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data)
        elif kind == "masked-observed":
            with poutine.mask(mask=keep), pyro.plate("p", 2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=data)
        elif kind == "masked-fn-observed":
            with pyro.plate("p", 2):
                pyro.sample("x", dist.Normal(z, 1.0).mask(keep), obs=data)
        elif kind == "scaled-latent":
            with poutine.scale(scale=0.3):
                pyro.sample("w", dist.Exponential(2.0))
        elif kind == "masked-latent":
            with poutine.mask(mask=keep), pyro.plate("p", 2):
                pyro.sample("w", dist.Gamma(2.0, 3.0))
        elif kind == "masked-fn-latent":
            with pyro.plate("p", 2):
                pyro.sample("w", dist.LogNormal(0.0, 3.0).mask(keep))
        pyro.deterministic("y", z.sum())

    return model


@pytest.mark.parametrize(
    "kind",
    [
        "scaled-observed", "masked-observed", "masked-fn-observed",
        "scaled-latent", "masked-latent", "masked-fn-latent",
    ],
)  # fmt: skip
def test_scales_and_masks_weigh_densities(kind: str) -> None:
    """As in Pyro's own ``log_prob_sum``, with the Jacobian of the inputs at full weight."""
    model = _weighted(kind)
    built = build(model, y=torch.tensor(0.3))

    def flat(u: Tensor) -> Tensor:
        return torch.cat([value.reshape(-1) for value in built.values(u).values()])

    u = torch.randn(built.dim)
    trace = poutine.trace(poutine.condition(model, built.values(u))).get_trace()
    expected = trace.log_prob_sum() + torch.linalg.slogdet(torch.func.jacrev(flat)(u))[1]
    torch.testing.assert_close(-built.potential(u), expected)


def test_reparameterisation_by_the_user_leaves_the_density_alone() -> None:
    def model() -> None:
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(tau, tau).expand([2]).to_event(1))
        pyro.deterministic("y", z.sum())

    conditioned = pyro.condition(model, {"y": torch.tensor(1.0)})
    plain = build(conditioned)
    theirs = build(poutine.reparam(conditioned, {"z": LocScaleReparam(0.0)}))
    u = torch.randn(3)
    torch.testing.assert_close(theirs.constraint(u), plain.constraint(u))
    torch.testing.assert_close(theirs.potential(u), plain.potential(u))
    assert set(theirs.values(u)) == {"tau", "z_decentered"}
    torch.testing.assert_close(theirs.deterministics(u)["z"], plain.values(u)["z"])


def test_simple_models_do_not_run_for_the_potential() -> None:
    calls = []

    def model() -> None:
        calls.append(1)
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.deterministic("y", z.sum())

    built = build(model, y=torch.tensor(1.0))
    calls.clear()
    u = torch.randn(2)
    torch.testing.assert_close(built.potential(u), -log_normal_pdf(u))
    assert not calls


# -- discrete latent sites -----------------------------------------------------------------------

_WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
_LOCS = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
_DATA = torch.tensor([0.1, 1.7], dtype=torch.float64)


def mixture(output: str = "deterministic") -> None:
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Gamma(2.0, 1.0))
    with pyro.plate("items", 2):
        k = pyro.sample("k", dist.Categorical(_WEIGHTS))
        pyro.sample("x", dist.Normal(a + _LOCS[k], b), obs=_DATA)
    if output == "deterministic":
        pyro.deterministic("y", a * b)
    else:
        pyro.sample("y", dist.Delta(a * b))


def mixture_log_density(a: Tensor, b: Tensor) -> Tensor:
    total = dist.Normal(0.0, 2.0).log_prob(a) + dist.Gamma(2.0, 1.0).log_prob(b)
    terms = []
    for choice in itertools.product(range(3), repeat=2):
        index = torch.tensor(choice)
        terms.append(
            _WEIGHTS[index].log().sum() + log_normal_pdf(_DATA, a + _LOCS[index], b.expand(2))
        )
    return total + torch.logsumexp(torch.stack(terms), 0)


@pytest.mark.parametrize("output", ["deterministic", "delta"])
def test_discrete_sites_are_summed_out(output: str) -> None:
    built = ConstrainedModel(pyro.condition(mixture, {"y": torch.tensor(1.0)}), (output,), {})

    def flat(u: Tensor) -> Tensor:
        values = built.values(u)
        return torch.stack([values["a"], values["b"]])

    inputs = torch.randn(4, 2)
    for u in inputs:
        a, b = flat(u)
        log_det = torch.linalg.slogdet(torch.func.jacrev(flat)(u))[1]
        torch.testing.assert_close(-built.potential(u), mixture_log_density(a, b) + log_det)
        torch.testing.assert_close(built.constraint(u), (a * b - 1).reshape(1))
    batched = vmap(built.potential)(inputs)
    torch.testing.assert_close(batched, torch.stack([built.potential(u) for u in inputs]))
    assert vmap(grad(built.potential))(inputs).isfinite().all()


def test_a_chain_of_discrete_sites() -> None:
    """Summed over pairs; one of the sites is shared by the elements of a plate."""
    transition = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    data = torch.tensor([0.1, 1.7, -0.4])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        first = pyro.sample("first", dist.Bernoulli(0.3))
        with pyro.plate("items", 3):
            second = pyro.sample("second", dist.Categorical(transition[first.long()]))
            pyro.sample("x", dist.Normal(z[0] * second, 1.0), obs=data)
        pyro.deterministic("y", z.sum())

    built = build(model, y=torch.tensor(1.0))
    u = torch.randn(2)
    outer = []
    for first, weight in enumerate([0.7, 0.3]):
        total = torch.tensor(weight).log()
        for x in data:
            terms = [transition[first, k].log() + log_normal_pdf(x, u[0] * k) for k in range(2)]
            total = total + torch.logsumexp(torch.stack(terms), 0)
        outer.append(total)
    expected = torch.logsumexp(torch.stack(outer), 0) + log_normal_pdf(u)
    torch.testing.assert_close(-built.potential(u), expected)


def test_continuous_site_below_a_discrete_one() -> None:
    """Its distribution has one more dimension while the discrete site is enumerated."""

    def model() -> None:
        k = pyro.sample("k", dist.Categorical(_WEIGHTS))
        z = pyro.sample("z", dist.Normal(_LOCS[k], 0.5))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.deterministic("y", z * w)

    built = build(model, y=torch.tensor(1.0))
    u = torch.randn(2)
    z, w = u  # through the support: no standardisation by a distribution that is not one
    terms = [_WEIGHTS[k].log() + log_normal_pdf(z, _LOCS[k], 0.5) for k in range(3)]
    expected = torch.logsumexp(torch.stack(terms), 0) + log_normal_pdf(w)
    torch.testing.assert_close(-built.potential(u), expected)
    torch.testing.assert_close(built.values(u)["z"], z)
    torch.testing.assert_close(built.constraint(u), (z * w - 1).reshape(1))


# -- inputs from values --------------------------------------------------------------------------


def test_inputs_give_back_the_values() -> None:
    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
        with pyro.plate("items", 2):
            z = pyro.sample("z", dist.Normal(rate, 2.0))
        pyro.deterministic("y", z.sum())

    built = build(model, y=torch.tensor(0.0))
    values = {"rate": torch.tensor(1.3), "z": torch.tensor([0.2, 5.0])}
    torch.testing.assert_close(built.values(built.inputs(values, init_to_sample)), values)
    # sites left out are drawn, given the others
    some = built.values(built.inputs({"rate": values["rate"]}, init_to_sample))
    torch.testing.assert_close(some["rate"], values["rate"])
    strategy = init_to_value(values=values)
    torch.testing.assert_close(built.values(built.inputs({}, strategy)), values)


def test_inputs_of_unknown_sites_are_refused() -> None:
    built = build(several_sites, scalar=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"\['c'\].*not latent sites.*\['a', 'b'\]"):
        built.inputs({"c": torch.tensor(0.0)}, init_to_sample)


def test_inputs_of_the_wrong_shape_are_refused() -> None:
    built = build(several_sites, scalar=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"'b'.*\(5,\).*\(2, 3\)"):
        built.inputs({"b": torch.zeros(5)}, init_to_sample)


def test_inputs_outside_the_support_are_refused() -> None:
    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 3.0).expand([2]).to_event(1))
        pyro.deterministic("y", rate.sum())

    with pytest.raises(ValueError, match=r"'rate' lies outside the support .*Gamma"):
        build(model, y=torch.tensor(1.0)).inputs(
            {"rate": torch.tensor([1.0, -1.0])}, init_to_sample
        )


@pytest.mark.parametrize("change", ["another latent", "no latent", "no output"])
def test_sites_that_change_later_are_reported(change: str) -> None:
    is_changed = False

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        if not (is_changed and change == "no latent"):
            pyro.sample("w", dist.Normal(0.0, 1.0))
        if is_changed and change == "another latent":
            pyro.sample("late", dist.Normal(0.0, 1.0))
        if not (is_changed and change == "no output"):
            pyro.deterministic("y", z.sum())

    built = build(model, y=torch.tensor(0.0))
    built.constraint(torch.zeros(3))
    is_changed = True
    name = {"another latent": "late", "no latent": "w", "no output": "y"}[change]
    with pytest.raises(ModelStructureError, match=rf"'{name}'.*torch\.where"):
        built.constraint(torch.zeros(3))


@pytest.mark.parametrize("family", ["normal", "gamma"])
def test_prior_draws(family: str) -> None:
    """A model of standard normal inputs need not run for them."""
    runs = 0

    def model() -> None:
        nonlocal runs
        runs += 1
        prior = dist.Normal(3.0, 2.0) if family == "normal" else dist.Gamma(3.0, 2.0)
        x = pyro.sample("x", prior.expand([40]).to_event(1))
        pyro.deterministic("y", x.sum())

    inspected = ConstrainedModel(pyro.condition(model, {"y": torch.tensor(1.0)}), (), {})
    before = runs
    draws = inspected.prior_draws(20)
    assert runs == before + (0 if family == "normal" else 20)
    assert draws.shape == (20, 40)
    assert draws.mean().abs() < 5 / 800**0.5
    assert 0.8 < draws.std() < 1.2
