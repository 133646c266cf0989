"""The guide against exact posteriors, within Pyro's engines, and given what it cannot take."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceGraph_ELBO,
)
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.reparam import NeuTraReparam
from pyro.params.param_store import ParamStoreDict
from torch import Tensor

from pyro_ext.distributions import FlowDistribution
from pyro_ext.infer import AutoSplineFlow
from tests.statistics import Quadrature

# Calling a guide registers its parameters in Pyro's store.
pytestmark = pytest.mark.usefixtures("param_store")

SMALL: dict[str, Any] = {"transforms": 2, "hidden_features": 16, "residual_blocks": 1}


def _banana() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.7 * x * x, 0.5))


def _gaussian(data: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Normal(loc.cumsum(-1), 1.0).to_event(1), obs=data)


def _constrained() -> None:
    with pyro.plate("rows", 3):
        pyro.sample("rate", dist.Gamma(2.0, 1.0))
    pyro.sample("weights", dist.Dirichlet(torch.ones(4)))
    pyro.sample("share", dist.Beta(2.0, 2.0))
    pyro.sample("matrix", dist.LKJCholesky(3, 1.0))


def _train(
    guide: AutoContinuous,
    model: Callable[..., Any],
    *args: Any,
    steps: int,
    num_particles: int = 32,
    lr: float = 0.01,
) -> None:
    elbo = Trace_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=1)
    loss_fn = elbo(model, guide)
    loss_fn(*args)
    optimizer = torch.optim.Adam(guide.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(*args).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _log_weights(
    guide: AutoContinuous, model: Callable[..., Any], *args: Any, num_draws: int = 20_000
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log importance weights of draws of the guide, and the draws."""
    nested = pyro.plate("draws", num_draws, dim=-2)
    guide_trace = poutine.trace(nested(guide)).get_trace(*args)
    replayed = poutine.replay(nested(model), trace=guide_trace)
    model_trace = poutine.trace(replayed).get_trace(*args)
    totals = []
    for trace in (model_trace, guide_trace):
        trace.compute_log_prob()
        sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
        sites = [s for s in sites if not poutine.util.site_is_subsample(s)]
        totals.append(sum(site["log_prob"].reshape(num_draws, -1).sum(-1) for site in sites))
    values = {
        name: site["value"]
        for name, site in model_trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"]
    }
    return totals[0] - totals[1], values


def _posterior_parameters(guide: AutoSplineFlow, scale: float = 0.3) -> None:
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


@pytest.mark.slow
def test_banana_is_learned_where_a_normal_fails() -> None:
    guide = AutoSplineFlow(
        _banana, transforms=3, hidden_features=16, residual_blocks=1, init_scale=1.0
    )
    normal = AutoMultivariateNormal(_banana)
    _train(guide, _banana, steps=1000)
    _train(normal, _banana, steps=300, lr=0.03)
    log_weights, draws = _log_weights(guide, _banana)
    # The model has no data: its log evidence is 0, and an ELBO is minus a divergence.
    elbo, elbo_of_normal = log_weights.mean(), _log_weights(normal, _banana)[0].mean()
    assert elbo > -0.05
    assert elbo_of_normal < elbo - 0.3
    weights = log_weights.softmax(0)
    assert float(1 / weights.square().sum()) > 0.5 * len(weights)
    exact = Quadrature(
        lambda x, y: -0.5 * x**2 - 2.0 * (y - 0.7 * x**2) ** 2,
        (-6.0, 6.0, 600),
        (-3.0, 36.0, 1500),
    )
    for axis, name in enumerate(["x", "y"]):
        value = draws[name].reshape(-1)
        mean, sd = exact.mean(lambda *z, a=axis: z[a]), exact.sd(lambda *z, a=axis: z[a])
        # the divergence that is minimised forgives what is missing of the long tail of y
        assert abs(float(value.mean()) - mean) < 0.1 * sd
        assert float(value.std()) == pytest.approx(sd, rel=0.2)
        # ... and without the error of the approximation, by its weights
        assert abs(float((weights * value).sum()) - mean) < 0.05 * sd


def test_log_evidence_of_a_gaussian_is_reached() -> None:
    data = torch.tensor([[0.5, 1.0, -1.0], [1.5, 0.0, -2.0]])
    guide = AutoSplineFlow(_gaussian, **SMALL, init_scale=1.0)
    _train(guide, _gaussian, data, steps=300)
    sums = torch.ones(3, 3).tril()
    covariance = 4.0 * (sums @ sums.T).kron(torch.ones(1, 1))
    covariance = torch.ones(2, 2).kron(covariance) + torch.eye(6)
    evidence = dist.MultivariateNormal(torch.zeros(6), covariance).log_prob(data.reshape(-1))
    log_weights, _ = _log_weights(guide, _gaussian, data)
    gap = float(evidence - log_weights.mean())
    assert -0.01 < gap < 0.1
    assert float(log_weights.exp().mean().log()) == pytest.approx(float(evidence), abs=0.03)


@pytest.mark.parametrize("coupling", [True, False], ids=["coupling", "autoregressive"])
def test_start_is_near_init_loc_with_init_scale(coupling: bool) -> None:
    def model() -> None:
        pyro.sample("a", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        pyro.sample("b", dist.LogNormal(0.0, 10.0))

    values = {"a": torch.tensor([3.0, -5.0]), "b": torch.tensor(7.0)}
    guide = AutoSplineFlow(
        model, **SMALL, init_loc_fn=init_to_value(values=values), init_scale=0.2, coupling=coupling
    )
    guide()
    z = guide.get_posterior().sample((20_000,))
    loc = torch.tensor([3.0, -5.0, math.log(7.0)])
    assert ((z.mean(0) - loc).abs() < 0.1).all()
    assert ((z.std(0) / 0.2).log().abs() < 0.3).all()


@pytest.mark.parametrize("coupling", [True, False], ids=["coupling", "autoregressive"])
@pytest.mark.parametrize("batch_shape", [(), (4,), (4, 1)], ids=str)
def test_draws_are_scored_in_the_pass_that_makes_them(
    coupling: bool, batch_shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = AutoSplineFlow(_constrained, **SMALL, coupling=coupling)
    guide()
    _posterior_parameters(guide, 0.1)
    posterior = guide.get_posterior().expand(batch_shape)
    x = posterior.rsample()
    again = posterior.log_prob(x.clone())
    parameters = [p for p in guide.parameters() if p.requires_grad]
    expected = torch.autograd.grad(
        again.sum(), parameters, retain_graph=True, materialize_grads=True
    )

    def fail(self: FlowDistribution, value: Tensor) -> Tensor:
        raise RuntimeError("scored in a pass of its own")

    monkeypatch.setattr(FlowDistribution, "log_prob", fail)
    log_prob = posterior.log_prob(x)
    torch.testing.assert_close(log_prob, again)
    found = torch.autograd.grad(log_prob.sum(), parameters, materialize_grads=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_detached_draws_are_scored_anew() -> None:
    guide = AutoSplineFlow(_banana, **SMALL)
    guide()
    posterior = guide.get_posterior()
    x = posterior.rsample()
    parameters = [p for p in guide.parameters() if p.requires_grad]
    fixed = posterior.log_prob(x.detach())
    reference = guide.flow().log_prob(x.detach())
    found, expected = (
        torch.autograd.grad(total, parameters, materialize_grads=True)
        for total in (fixed, reference)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert any(bool(one.any()) for one in found)


def test_draw_made_without_gradients_is_scored_with_them() -> None:
    guide = AutoSplineFlow(_banana, **SMALL)
    guide()
    posterior = guide.get_posterior()
    with torch.no_grad():
        x = posterior.rsample()
    assert posterior.log_prob(x).requires_grad


ELBOS: dict[str, Callable[[], Any]] = {
    "Trace_ELBO": Trace_ELBO,
    "particles": lambda: Trace_ELBO(num_particles=3),
    "vectorised particles": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "RenyiELBO": lambda: RenyiELBO(num_particles=3, vectorize_particles=True),
    "ReweightedWakeSleep": lambda: ReweightedWakeSleep(
        num_particles=3, vectorize_particles=True, max_plate_nesting=1
    ),
}


@pytest.mark.parametrize("elbo", ELBOS.values(), ids=ELBOS)
@pytest.mark.parametrize("coupling", [True, False], ids=["coupling", "autoregressive"])
def test_objectives_of_pyro_train_all_parameters(
    elbo: Callable[[], Any], coupling: bool, param_store: ParamStoreDict
) -> None:
    data = torch.randn(5, 3)
    guide = AutoSplineFlow(_gaussian, **SMALL, coupling=coupling)
    svi = SVI(_gaussian, guide, pyro.optim.Adam({"lr": 0.01}), elbo())
    losses = [svi.step(data)]
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    losses += [svi.step(data) for _ in range(2)]
    assert torch.tensor(losses).isfinite().all()
    names = {f"AutoSplineFlow.flow$$${name}" for name, _ in guide.flow.named_parameters()}
    assert names <= set(param_store.keys())
    moved = [not torch.equal(p, before[name]) for name, p in guide.named_parameters()]
    # Entries of an L U factor or of a mask that no number depends on stay where they are, but
    # no whole tensor does, except what only the first feature's missing inputs would use.
    assert sum(moved) >= 0.9 * len(moved)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_objective_has_the_same_value() -> None:
    data = torch.randn(5, 3)
    guide = AutoSplineFlow(_gaussian, **SMALL)
    guide(data)
    losses = []
    for elbo in (Trace_ELBO(), JitTrace_ELBO(ignore_jit_warnings=True)):
        elbo.loss_and_grads(_gaussian, guide, data)  # compiles
        pyro.set_rng_seed(1)
        losses.append(elbo.loss_and_grads(_gaussian, guide, data))
    assert losses[0] == pytest.approx(losses[1])


def test_objective_is_unbiased_with_and_without_vectorised_particles() -> None:
    guide = AutoSplineFlow(_constrained, **SMALL)
    guide()
    _posterior_parameters(guide, 0.1)
    losses = []
    for vectorised in (True, False):
        elbo = Trace_ELBO(500, vectorize_particles=vectorised, max_plate_nesting=1)
        with torch.no_grad():
            losses.append(elbo.loss(_constrained, guide))
    log_weights, _ = _log_weights(guide, _constrained, num_draws=500)
    error = 5 * float(log_weights.std()) * math.sqrt(2 / 500)
    assert abs(losses[0] - losses[1]) < error
    assert abs(losses[0] + float(log_weights.mean())) < error


def test_constrained_sites_and_plates() -> None:
    guide = AutoSplineFlow(_constrained, **SMALL)
    draws = Predictive(_constrained, guide=guide, num_samples=7, parallel=True)()
    assert draws["rate"].shape == (7, 3)
    assert draws["matrix"].shape[-2:] == (3, 3)
    assert guide.latent_dim == 3 + 3 + 1 + 3
    trace = poutine.trace(_constrained).get_trace()
    for name, value in draws.items():
        assert trace.nodes[name]["fn"].support.check(value).all()


def test_single_latent() -> None:
    def model() -> None:
        pyro.sample("x", dist.Gamma(3.0, 2.0))

    guide = AutoSplineFlow(model, **SMALL, init_scale=0.7)
    _train(guide, model, steps=200)
    log_weights, draws = _log_weights(guide, model)
    assert -0.03 < float(log_weights.mean()) < 0.01
    assert float(draws["x"].mean()) == pytest.approx(1.5, rel=0.05)


def test_state_dict_is_loaded_after_one_call() -> None:
    guide = AutoSplineFlow(_constrained, **SMALL)
    guide()
    _posterior_parameters(guide)
    pyro.set_rng_seed(7)
    other = AutoSplineFlow(_constrained, **SMALL)
    other()
    other.load_state_dict(guide.state_dict())
    pyro.set_rng_seed(1)
    expected = guide()
    pyro.set_rng_seed(1)
    found = other()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_subsampled_likelihood() -> None:
    data = torch.randn(20) + 2.0

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", 20, subsample_size=5) as index:
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=data[index])

    guide = AutoSplineFlow(model, **SMALL)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(3))


def test_single_precision(float32: None) -> None:
    guide = AutoSplineFlow(_constrained, **SMALL)
    assert all(value.dtype == torch.float32 for value in guide().values())


def test_dtype_is_that_of_the_latents(float32: None) -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    guide = AutoSplineFlow(model, **SMALL)
    assert guide()["x"].dtype == torch.float64


def test_neutra_reparametrisation_keeps_the_joint_density() -> None:
    guide = AutoSplineFlow(_banana, **SMALL, init_scale=1.0)
    guide()
    _posterior_parameters(guide)
    neutra = NeuTraReparam(guide)
    noise = torch.randn(2)
    given = {"x_shared_latent": noise}
    found = poutine.trace(poutine.condition(neutra.reparam(_banana), given)).get_trace()
    to_latents = guide.get_transform()
    x, y = to_latents(noise)
    expected = dist.Normal(0.0, 1.0).log_prob(x) + dist.Normal(0.7 * x * x, 0.5).log_prob(y)
    jacobian = torch.func.jacrev(to_latents)(noise)
    expected = expected + torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(found.log_prob_sum(), expected)
    torch.testing.assert_close(neutra.transform_sample(noise)["y"], y)
    kernel = NUTS(neutra.reparam(_banana), max_tree_depth=2)
    mcmc = pyro.infer.MCMC(kernel, num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["x_shared_latent"].isfinite().all()


@pytest.mark.parametrize("method", ["median", "quantiles"])
def test_medians_and_quantiles_are_refused(method: str) -> None:
    guide = AutoSplineFlow(_banana, **SMALL)
    guide()
    arguments = [[0.5]] if method == "quantiles" else []
    with pytest.raises(NotImplementedError, match="Predictive"):
        getattr(guide, method)(*arguments)


def test_discrete_latents_are_refused() -> None:
    def model() -> None:
        pyro.sample("k", dist.Poisson(3.0))

    with pytest.raises(ValueError, match="discrete sample site 'k'"):
        AutoSplineFlow(model)()


def test_models_without_latents_are_refused() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(RuntimeError, match="no latent variables"):
        AutoSplineFlow(model)()


@pytest.mark.parametrize("init_scale", [0.0, -1.0, math.inf, math.nan])
def test_bad_init_scale(init_scale: float) -> None:
    with pytest.raises(ValueError, match="init_scale"):
        AutoSplineFlow(_banana, init_scale=init_scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 3}, "features=3"),
        ({"context_features": 3}, "context_features=3"),
        ({"box": (0.0, 1.0)}, "leave it out"),
        ({"hiden_features": 3}, "hiden_features"),
    ],
    ids=["features", "context", "box", "misspelt"],
)
def test_options_that_do_not_fit_are_refused_at_once(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        AutoSplineFlow(_banana, **options)
