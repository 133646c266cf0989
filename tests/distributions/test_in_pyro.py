"""Spline flows at their places in Pyro: likelihood, prior, guide, plates, handlers, engines."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import HMC, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.discrete import infer_discrete
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from pyro.params.param_store import ParamStoreDict
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_ext.distributions import FlowDistribution, NeuralSplineFlow
from tests.sampling import sample
from tests.statistics import assert_same_mean

# Registering a flow fills Pyro's store.
pytestmark = pytest.mark.usefixtures("param_store", "one_thread")

SMALL: dict[str, Any] = {"transforms": 2, "hidden_features": 8, "residual_blocks": 1}
KINDS: dict[str, dict[str, Any]] = {
    "coupling": {},
    "autoregressive": {"coupling": False},
    "inverse autoregressive": {"coupling": False, "inverse": True},
    "quadratic": {"spline": "quadratic"},
    "box": {"box": (-2.0, 3.0)},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture
def one_thread(unchanged_global_state: None) -> Iterator[None]:
    """Run on one thread: the tensors are small."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def _flow(
    features: int = 2, context_features: int = 0, amount: float = 0.3, **settings: Any
) -> NeuralSplineFlow:
    """A small flow whose parameters are not those it starts with."""
    flow = NeuralSplineFlow(features, context_features, **{**SMALL, **settings})
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return flow


# --- likelihood ---------------------------------------------------------------------------------


def _crescent(count: int) -> Tensor:
    x = torch.randn(count)
    return torch.stack([x, x**2 + 0.3 * torch.randn(count)], -1)


def _nothing(*args: Any) -> None:
    pass


@kinds
def test_svi_learns_a_likelihood(kind: dict[str, Any], param_store: ParamStoreDict) -> None:
    flow = NeuralSplineFlow(2, **{**SMALL, **kind})
    data = _crescent(200).clamp(-1.9, 2.9)

    def model(data: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(data)):
            pyro.sample("x", flow(), obs=data)

    svi = SVI(model, _nothing, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    assert svi.evaluate_loss(data) == pytest.approx(-float(flow().log_prob(data).sum().detach()))
    losses = [svi.step(data) for _ in range(30)]
    assert losses[-1] < losses[0] - 20
    registered = {f"flow$$${name}" for name, _ in flow.named_parameters()}
    assert registered == set(param_store.keys())


def test_elbo_module_holds_the_parameters_of_a_conditional_likelihood() -> None:
    class Model(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.flow = NeuralSplineFlow(2, 1, **SMALL)

        def forward(self, context: Tensor, data: Tensor) -> None:
            with pyro.plate("data", len(data)):
                pyro.sample("x", self.flow(context), obs=data)

    model = Model()
    context = torch.randn(100, 1)
    data = context * torch.tensor([1.0, -2.0]) + 0.1 * torch.randn(100, 2)
    loss_fn = Trace_ELBO()(model, _nothing)
    before = float(loss_fn(context, data).detach())
    parameters = set(loss_fn.parameters())
    assert set(model.flow.parameters()) <= parameters
    optimizer = torch.optim.Adam(parameters, 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_fn(context, data)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < before - 50
    shuffled = model.flow(context.roll(1, 0)).log_prob(data).sum().detach()
    assert float(shuffled) < -float(loss.detach()) - 50


# --- prior --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [{}, {"coupling": False}, {"box": (-2.0, 3.0)}],
    ids=["coupling", "autoregressive", "box"],
)
def test_hmc_draws_from_a_prior_that_is_a_flow(kind: dict[str, Any]) -> None:
    flow = _flow(**{"amount": 0.1, **kind, "transforms": 1}).requires_grad_(False)

    def model() -> None:
        pyro.sample("z", flow())

    kernel = HMC(model, step_size=0.3, trajectory_length=1.5)
    mcmc = pyro.infer.MCMC(kernel, 400, 80, disable_progbar=True)
    mcmc.run()
    found = mcmc.get_samples()["z"][None].detach()
    exact = flow().sample((1, 5000))
    for i in range(2):
        for power in (1, 2):
            first, second = found[..., i] ** power, exact[..., i] ** power
            assert_same_mean(first, second, min_ess=40, name=f"moment {power} of z[{i}]")


# --- guides -------------------------------------------------------------------------------------

NUM_DATA = 40


def _linear_model(data: Tensor) -> None:
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=data)


def _evidence(data: Tensor) -> float:
    return float(dist.Normal(0.0, math.sqrt(1.25)).log_prob(data).sum())


@pytest.mark.parametrize("as_delta", [False, True], ids=["distribution", "scored Delta"])
@pytest.mark.parametrize(
    "kind",
    [{}, {"coupling": False, "inverse": True}],
    ids=["coupling", "inverse autoregressive"],
)
@pytest.mark.parametrize("num_particles", [1, 3], ids=["one particle", "vectorised particles"])
def test_amortised_guide_reaches_the_evidence(
    kind: dict[str, Any], as_delta: bool, num_particles: int
) -> None:
    flow = NeuralSplineFlow(2, 2, **{**SMALL, **kind})
    data = math.sqrt(1.25) * torch.randn(NUM_DATA, 2)

    def guide(data: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(data)):
            posterior = flow(data)
            if as_delta:
                shape = (num_particles,) if num_particles > 1 else ()
                z, log_density = posterior.rsample_and_log_prob(shape)
                pyro.sample("z", dist.Delta(z, log_density=log_density, event_dim=1))
            else:
                pyro.sample("z", posterior)

    elbo = Trace_ELBO(num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1)
    svi = SVI(_linear_model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    for _ in range(150):
        svi.step(data)
    losses = torch.tensor([svi.evaluate_loss(data) for _ in range(20)])
    gap = (float(losses.mean()) + _evidence(data)) / NUM_DATA
    # A guide that ignores its context could do no better than a gap of log(5) = 1.6.
    assert -0.15 < gap < 0.4


# --- plates and shapes --------------------------------------------------------------------------


@kinds
def test_plates_expand(kind: dict[str, Any]) -> None:
    flow = _flow(**kind)

    def model() -> Tensor:
        with pyro.plate("columns", 3, dim=-1), pyro.plate("rows", 4, dim=-2):
            return pyro.sample("x", flow())

    trace = poutine.trace(model).get_trace()
    value = trace.nodes["x"]["value"]
    assert value.shape == (4, 3, 2)
    assert len(value.reshape(-1, 2).unique(dim=0)) == 12
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], flow().log_prob(value))


def test_subsampled_plate_scales_the_density() -> None:
    flow = _flow(2, 1)
    data, context = torch.randn(10, 2), torch.randn(10, 1)

    def model() -> None:
        with pyro.plate("data", 10, subsample_size=4) as index:
            pyro.sample("x", flow(context[index]), obs=data[index])

    trace = poutine.trace(model).get_trace()
    index = trace.nodes["data"]["value"]
    expected = 2.5 * flow(context[index]).log_prob(data[index]).sum()
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["x"]["log_prob_sum"], expected)


@kinds
@pytest.mark.parametrize("conditional", [False, True], ids=["marginal", "conditional"])
def test_expand_and_expand_by(kind: dict[str, Any], conditional: bool) -> None:
    flow = _flow(2, 3 if conditional else 0, **kind)
    batch_shape = (5,) if conditional else ()
    one = flow(torch.randn(5, 3)) if conditional else flow()
    for many in (one.expand((4, 5)), one.expand([4, 5])):
        assert many.batch_shape == (4, 5)
        assert many.event_shape == (2,)
        assert many.has_rsample
        x = many.sample((6,))
        assert x.shape == (6, 4, 5, 2)
        assert len(x.reshape(-1, 2).unique(dim=0)) == 120
        assert many.log_prob(x).shape == (6, 4, 5)
        torch.testing.assert_close(many.log_prob(x), one.log_prob(x))
    by_four = one.expand_by((4,))
    assert by_four.batch_shape == (4, *batch_shape)
    assert by_four.sample().shape == (4, *batch_shape, 2)


def test_mask_leaves_out_and_to_event_adds_up() -> None:
    flow = _flow(2, 1)
    context, x = torch.randn(3, 1), torch.randn(3, 2)
    log_prob = flow(context).log_prob(x)
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(flow(context).mask(mask).log_prob(x), log_prob * mask)
    joint = flow(context).to_event(1)
    assert (joint.batch_shape, joint.event_shape) == ((), (3, 2))
    torch.testing.assert_close(joint.log_prob(x), log_prob.sum())
    assert joint.sample((4,)).shape == (4, 3, 2)
    assert joint.support.check(joint.sample((4,))).shape == (4,)


def test_mask_stops_the_gradient_of_a_missing_value() -> None:
    flow = _flow()
    mask = torch.tensor([True, False])
    flow().expand((2,)).mask(mask).log_prob(torch.zeros(2, 2)).sum().backward()
    expected = [p.grad for p in flow.parameters()]
    flow.zero_grad()
    flow().log_prob(torch.zeros(2)).backward()
    for found, parameter in zip(expected, flow.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad)


# --- effect handlers ----------------------------------------------------------------------------


def _pair(flow: NeuralSplineFlow) -> Callable[[], Tensor]:
    def model() -> Tensor:
        context = pyro.sample("context", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        return pyro.sample("x", flow(context))

    return model


def test_scale_multiplies_the_density() -> None:
    flow = _flow()
    scaled = poutine.scale(lambda: pyro.sample("x", flow()), scale=0.25)
    trace = poutine.trace(scaled).get_trace()
    expected = 0.25 * flow().log_prob(trace.nodes["x"]["value"])
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_condition_scores_the_given_value() -> None:
    flow = _flow(2, 1)
    given = {"context": torch.tensor([0.3]), "x": torch.tensor([0.5, -0.2])}
    trace = poutine.trace(poutine.condition(_pair(flow), given)).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["is_observed"]
    expected = flow(given["context"]).log_prob(given["x"])
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected)


@kinds
@pytest.mark.parametrize("parallel", [False, True], ids=["one by one", "parallel"])
def test_predictive(kind: dict[str, Any], parallel: bool) -> None:
    flow = _flow(2, 1, **kind)
    draws = Predictive(_pair(flow), num_samples=6, parallel=parallel)()
    assert draws["x"].shape[0] == 6
    assert draws["x"].reshape(6, -1).shape == (6, 2)
    assert len(draws["x"].reshape(6, 2).unique(dim=0)) == 6


@kinds
def test_same_seed_same_draws(kind: dict[str, Any]) -> None:
    flow = _flow(2, 1, **kind)
    draws = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        draws.append(_pair(flow)())
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)
    assert not torch.equal(draws[0], _pair(flow)())


# --- mixtures -----------------------------------------------------------------------------------


def _mixture(flow: NeuralSplineFlow, logits: Tensor, data: Tensor) -> Callable[[], None]:
    @config_enumerate
    def model() -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(data)):
            component = pyro.sample("component", dist.Categorical(logits=logits))
            context = one_hot(component, len(logits)).to(data.dtype)
            pyro.sample("x", flow(context), obs=data)

    return model


def _joint(flow: NeuralSplineFlow, logits: Tensor, data: Tensor) -> Tensor:
    """Log joint density of components, the last axis, and data."""
    of_components = flow(torch.eye(len(logits))).log_prob(data[:, None])
    return of_components + logits.log_softmax(-1)


@kinds
def test_enumerated_components_choose_the_context(kind: dict[str, Any]) -> None:
    flow, logits = _flow(2, 3, **kind), torch.randn(3)
    data = torch.rand(7, 2)
    model = _mixture(flow, logits, data)
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, _nothing)
    expected = _joint(flow, logits, data).logsumexp(-1).sum()
    torch.testing.assert_close(-torch.as_tensor(loss), expected)
    found = torch.autograd.grad(loss, list(flow.parameters()), materialize_grads=True)
    by_hand = torch.autograd.grad(-expected, list(flow.parameters()), materialize_grads=True)
    for one, other in zip(found, by_hand, strict=True):
        torch.testing.assert_close(one, other)


def test_infer_discrete_finds_the_component() -> None:
    flow, logits = _flow(2, 3), torch.randn(3)
    data = torch.randn(7, 2)
    model = _mixture(flow, logits, data)
    decoded = infer_discrete(model, first_available_dim=-2, temperature=0)
    found = poutine.trace(decoded).get_trace().nodes["component"]["value"]
    assert found.tolist() == _joint(flow, logits, data).argmax(-1).tolist()


def test_mixture_same_family() -> None:
    flow, logits = _flow(2, 3), torch.randn(3)
    data = torch.randn(7, 2)
    mixture = dist.MixtureSameFamily(dist.Categorical(logits=logits), flow(torch.eye(3)))
    expected = _joint(flow, logits, data).logsumexp(-1)
    torch.testing.assert_close(mixture.log_prob(data), expected)
    assert mixture.sample((4,)).shape == (4, 2)
    trace = poutine.trace(lambda: pyro.sample("x", mixture, obs=data[0])).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), expected[0])


# --- other engines ------------------------------------------------------------------------------


@pytest.mark.slow
# Under vmap the knots of a search may not be contiguous, whatever the code inside does.
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"coupling": False, "inverse": True},
        {"spline": "quadratic"},
    ],
    ids=["coupling", "inverse autoregressive", "quadratic"],
)
def test_constrained_hmc_through_the_generator_of_a_flow(kind: dict[str, Any]) -> None:
    flow = _flow(2, **{**kind, "transforms": 1})
    observed = flow().sample()[:1]

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        x = flow.bijection.to_data(z)[0]
        pyro.deterministic("x", x[:1])

    draws = sample(model, {"x": observed}, num_chains=3, num_samples=3, warmup_steps=3)
    z = draws["z"]
    assert z.shape == (3, 3, 2)
    x = flow.bijection.to_data(z)[0][..., :1]
    torch.testing.assert_close(x.detach(), observed.expand(3, 3, 1), rtol=0, atol=1e-7)
    assert len(z.reshape(-1, 2).unique(dim=0)) > 3


@kinds
def test_transforms_inside_a_transformed_distribution(kind: dict[str, Any]) -> None:
    flow = _flow(2, 3, **kind)
    ours = flow(torch.randn(5, 3))
    theirs = dist.TransformedDistribution(ours.base, ours.transforms)
    x = ours.sample((4,))
    torch.testing.assert_close(theirs.log_prob(x), ours.log_prob(x))
    pyro.set_rng_seed(0)
    expected = ours.rsample((4,))
    pyro.set_rng_seed(0)
    torch.testing.assert_close(theirs.rsample((4,)), expected)
    for transform in ours.transforms:
        z = torch.rand(4, 5, 2)
        torch.testing.assert_close(transform.inv(transform(z)), z)


def test_transforms_in_an_autoguide_of_pyro() -> None:
    def model() -> None:
        pyro.sample("x", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))

    def transform(features: int) -> dist.transforms.ComposeTransform:
        return dist.transforms.ComposeTransform(_flow(features)().transforms)

    guide = pyro.infer.autoguide.AutoNormalizingFlow(model, transform)
    loss = Trace_ELBO(num_particles=5, vectorize_particles=True).loss(model, guide)
    assert math.isfinite(loss)


# --- messages -----------------------------------------------------------------------------------


@kinds
def test_missing_observation_is_refused(kind: dict[str, Any]) -> None:
    flow = _flow(**kind)
    data = torch.tensor([[0.0, 1.0], [math.nan, 0.0]])

    def model() -> None:
        with pyro.plate("data", 2):
            pyro.sample("sizes of leaves", flow(), obs=data)

    with pytest.raises(ValueError, match="sizes of leaves"):
        poutine.trace(model).get_trace().compute_log_prob()


def test_observation_outside_the_box_is_refused() -> None:
    flow = _flow(box=(0.0, 1.0))

    def model() -> None:
        pyro.sample("share", flow(), obs=torch.tensor([0.5, 1.5]))

    with pytest.raises(ValueError, match="share"):
        poutine.trace(model).get_trace().compute_log_prob()


def test_wrong_batch_in_a_plate_is_named() -> None:
    flow = _flow(2, 1)

    def model() -> None:
        with pyro.plate("data", 3):
            pyro.sample("x", flow(torch.randn(4, 1)))

    with pytest.raises(ValueError, match="at site x"):
        poutine.trace(model).get_trace()


def test_call_returns_a_distribution_of_pyro() -> None:
    posterior = _flow()()
    assert isinstance(posterior, FlowDistribution)
    assert isinstance(posterior, dist.TorchDistribution)


# --- Bayesian networks ---------------------------------------------------------------------------


def _lift(flow: nn.Module, scale: float) -> None:
    """Give every parameter of a flow a prior around its value."""
    to_pyro_module_(flow)
    for module in list(flow.modules()):
        for name, value in list(module.named_parameters(recurse=False)):
            prior = dist.Normal(value.detach().clone(), scale).to_event(value.dim())
            setattr(module, name, PyroSample(prior))


@pytest.mark.parametrize("kind", [KINDS["coupling"], KINDS["autoregressive"]], ids=str)
def test_a_flow_whose_parameters_have_priors(kind: dict[str, Any]) -> None:
    flow, x = _flow(**kind), _crescent(10)
    expected = flow().log_prob(x).sum()
    _lift(flow, 1e-9)

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, x: Tensor) -> None:
            # weights are read where the density is evaluated, which has to be inside of the model
            pyro.factor("x", self.flow().log_prob(x).sum())

    trace = poutine.trace(Model()).get_trace(x)
    trace.compute_log_prob()
    sites = [name for name in trace.nodes if name.startswith("flow.bijection.bijections.")]
    assert len(sites) == len(list(_flow(**kind).parameters()))
    torch.testing.assert_close(trace.nodes["x"]["log_prob_sum"], expected, rtol=0, atol=1e-5)
