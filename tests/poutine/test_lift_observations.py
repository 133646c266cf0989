"""Lifted models have the same posterior, and what cannot be lifted is refused."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor

from pyro_ext import lift_observations
from pyro_ext.infer.constrained_hmc.model.constrained_model import ConstrainedModel

_DATA = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

FAMILIES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "normal": lambda m, s: dist.Normal(m, s),
    "student-t": lambda m, s: dist.StudentT(torch.tensor(4.0), m, s),
    "laplace": lambda m, s: dist.Laplace(m, s),
    "cauchy": lambda m, s: dist.Cauchy(m, s),
    "logistic": lambda m, s: dist.Logistic(m, s),
    "gumbel": lambda m, s: dist.Gumbel(m, s),
}


def decoder(family: str, how: str, x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    loc, scale = torch.stack([z[0], z.sum(), z[0] * z[1]]), (0.3 * z[1]).exp()
    fn = FAMILIES[family](loc, scale)
    if how == "event":
        pyro.sample("x", fn.to_event(1), obs=x)
    else:
        with pyro.plate("items", 3):
            pyro.sample("x", fn, obs=x)


@pytest.mark.parametrize("how", ["event", "plate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_lifted_joint_density_is_the_original_one(family: str, how: str) -> None:
    """With ``n = (x - m) / s``: p(z) p(n) |dn/dx| = p(z) p(x | z)."""
    model = lift_observations(decoder)
    for _ in range(3):
        z = torch.randn(2)
        loc, scale = torch.stack([z[0], z.sum(), z[0] * z[1]]), (0.3 * z[1]).exp()
        noise = (_DATA - loc) / scale
        lifted = poutine.trace(poutine.condition(model, {"z": z, "x_noise": noise}))
        original = poutine.trace(poutine.condition(decoder, {"z": z}))
        a, b = lifted.get_trace(family, how, _DATA), original.get_trace(family, how, _DATA)
        torch.testing.assert_close(a.log_prob_sum() - 3 * scale.log(), b.log_prob_sum())
        # the output computed from this noise is the observation
        fn = a.nodes["x"]["fn"]
        while not isinstance(fn, dist.Delta):
            fn = fn.base_dist
        torch.testing.assert_close(fn.v, _DATA)
        torch.testing.assert_close(a.nodes["x"]["value"], _DATA)


@pytest.mark.parametrize("how", ["event", "plate"])
def test_the_constrained_model_has_the_original_posterior(how: str) -> None:
    """Its density on the manifold, in the coordinates ``z``, is proportional to p(z) p(x | z)."""
    model = ConstrainedModel(lift_observations(decoder), ("normal", how, _DATA), {})
    assert (model.dim, model.num_constraints) == (5, 3)
    differences = []
    for _ in range(5):
        z = torch.randn(2)
        loc, scale = torch.stack([z[0], z.sum(), z[0] * z[1]]), (0.3 * z[1]).exp()
        u = torch.cat([z, (_DATA - loc) / scale])
        torch.testing.assert_close(model.constraint(u), torch.zeros(3), rtol=0, atol=1e-12)
        jacobian = torch.func.jacrev(model.constraint)(u)
        log_target = -model.potential(u) - 0.5 * torch.logdet(jacobian @ jacobian.T)

        # the surface element of the chart z -> (z, n(z))
        def chart(z: Tensor) -> Tensor:
            loc, scale = torch.stack([z[0], z.sum(), z[0] * z[1]]), (0.3 * z[1]).exp()
            return torch.cat([z, (_DATA - loc) / scale])

        tangents = torch.func.jacrev(chart)(z)
        log_area = 0.5 * torch.logdet(tangents.T @ tangents)
        trace = poutine.trace(poutine.condition(decoder, {"z": z})).get_trace("normal", how, _DATA)
        differences.append(log_target + log_area - trace.log_prob_sum())
    torch.testing.assert_close(torch.stack(differences), differences[0].expand(5))


def two_sites() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("a", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
    pyro.sample("b", dist.Poisson(z.exp()), obs=torch.tensor(2.0))
    pyro.deterministic("twice", 2 * z)
    pyro.factor("bonus", -z)


def test_only_the_named_sites_are_lifted() -> None:
    trace = poutine.trace(lift_observations(two_sites, sites=["a"])).get_trace()
    assert set(trace.stochastic_nodes) == {"z", "a_noise"}
    assert isinstance(trace.nodes["b"]["fn"], dist.Poisson)
    assert {"a", "b", "twice", "bonus"} <= set(trace.observation_nodes)


def test_latent_and_deterministic_sites_are_left_alone() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)

    trace = poutine.trace(lift_observations(model)).get_trace()
    assert set(trace.stochastic_nodes) == {"z"}
    torch.testing.assert_close(trace.nodes["twice"]["value"], 2 * trace.nodes["z"]["value"])


def test_observations_by_condition_are_lifted() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))

    lifted = lift_observations(pyro.condition(model, {"x": torch.tensor(1.0)}))
    trace = poutine.trace(lifted).get_trace()
    assert set(trace.stochastic_nodes) == {"z", "x_noise"}
    assert float(trace.nodes["x"]["value"]) == 1.0


def test_a_lifted_model_can_be_run_again() -> None:
    lifted = lift_observations(two_sites, sites=("a",))
    for _ in range(2):
        assert "a_noise" in poutine.trace(lifted).get_trace().nodes


def test_a_site_that_cannot_be_lifted_is_named() -> None:
    with pytest.raises(ValueError, match=r"'b' has distribution Poisson.*lift_observations\("):
        lift_observations(two_sites)()


def test_a_positive_family_is_not_a_location_scale_one() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.LogNormal(z, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match=r"'x' has distribution LogNormal"):
        lift_observations(model)()


@pytest.mark.parametrize("kind", ["mask", "scale", "masked distribution"])
def test_weighted_sites_are_refused(kind: str) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        fn = dist.Normal(z, torch.ones(3))
        if kind == "mask":
            with poutine.mask(mask=torch.tensor([True, False, True])):
                pyro.sample("x", fn.to_event(1), obs=torch.zeros(3))
        elif kind == "scale":
            with poutine.scale(scale=0.5):
                pyro.sample("x", fn.to_event(1), obs=torch.zeros(3))
        else:
            with pyro.plate("p", 3):
                masked = fn.mask(torch.tensor([True, False, True]))
                pyro.sample("x", masked, obs=torch.zeros(3))

    with pytest.raises(ValueError, match=r"'x' is masked or scaled.*Leave the site out"):
        lift_observations(model)()


def test_missing_sites_are_named() -> None:
    with pytest.raises(ValueError, match=r"lift \['zz'\].*Check the spelling"):
        lift_observations(two_sites, sites=["a", "zz"])()


def test_an_error_of_the_model_is_not_covered_up() -> None:
    def model() -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        lift_observations(model, sites=["x"])()


def test_a_single_name_must_be_in_a_collection() -> None:
    with pytest.raises(TypeError, match=r"collection of names, got the string 'x'"):
        lift_observations(two_sites, sites="x")
