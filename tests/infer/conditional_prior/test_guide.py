"""The guide among Pyro's objectives, its sites, and its life from file to file."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from torch import nn

from pyro_ext import ConditionalPriorGuide, NeuralSplineFlow
from pyro_ext.poutine import condition_on, frozen
from tests.infer.conditional_prior.problems import linear_gaussian, small_decoder

# Calling a guide registers its parameters in Pyro's store.
pytestmark = pytest.mark.usefixtures("param_store")

ROWS = 4


def _rows_model(decoder: nn.Module) -> Callable[[], None]:
    def model() -> None:
        with pyro.plate("rows", ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1))

    return model


def _conditioned(size: int = 6) -> Callable[..., Any]:
    data = (torch.rand(ROWS, size) < 0.5).to(torch.get_default_dtype())
    mask = torch.rand(ROWS, size) < 0.5
    return frozen(condition_on(_rows_model(small_decoder(2, size)), {"x": data}, {"x": mask}))


def _several_sites() -> Callable[..., Any]:
    """Sites of every kind in the plate of the rows, one of them in a further plate."""

    def model() -> None:
        with pyro.plate("rows", ROWS, dim=-1):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
            with pyro.plate("steps", 2, dim=-2):
                level = pyro.sample("level", dist.Normal(rate, 1.0))
            total = (share * torch.arange(3.0)).sum(-1) + level.sum(-2, keepdim=True) + rate
            pyro.sample("x", dist.Normal(total, 1.0), obs=torch.arange(float(ROWS)))

    return model


def _local_and_global() -> Callable[..., Any]:
    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", ROWS):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.arange(float(ROWS)))

    return model


def _rows_on_the_left() -> Callable[..., Any]:
    def model() -> None:
        with pyro.plate("rows", ROWS, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, 2), 1.0).to_event(1))
            with pyro.plate("elements", 3, dim=-1):
                w = pyro.sample("w", dist.Normal(z[..., 0], 1.0))
                pyro.sample("x", dist.Normal(w, 1.0), obs=torch.zeros(ROWS, 3))

    return model


def _two_row_plates() -> Callable[..., Any]:
    def model() -> None:
        with pyro.plate("a", 2, dim=-2), pyro.plate("b", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(2, 3, 2))

    return model


def _without_plates() -> Callable[..., Any]:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    return model


MODELS: dict[str, tuple[Callable[[], Callable[..., Any]], tuple[int, ...], int]] = {
    "rows": (_conditioned, (ROWS,), 2),
    "several sites": (_several_sites, (ROWS,), 5),
    "local and global": (_local_and_global, (), 5),
    "rows on the left": (_rows_on_the_left, (ROWS,), 5),
    "two plates of rows": (_two_row_plates, (2, 3), 2),
    "without plates": (_without_plates, (), 3),
}


def _disturb(guide: ConditionalPriorGuide) -> None:
    with torch.no_grad():
        guide.psi.add_(0.3 * torch.randn_like(guide.psi))


@pytest.mark.parametrize("case", MODELS)
def test_rows_and_latents_are_found(case: str) -> None:
    maker, row_shape, features = MODELS[case]
    guide = ConditionalPriorGuide(maker()).setup()
    rows = torch.Size(row_shape).numel()
    assert guide.loc.shape == (rows, features)
    assert guide.psi.shape == (rows, features * (features + 3) // 2)
    assert guide.c_elbo(50).shape == row_shape


@pytest.mark.parametrize("case", MODELS)
def test_draws_have_the_sites_shapes_and_the_density_they_say(case: str) -> None:
    """One draw scored by the trace, by the inverse, and by the importance weights."""
    model = MODELS[case][0]()
    guide = ConditionalPriorGuide(model).setup()
    _disturb(guide)
    prior = poutine.trace(model).get_trace()
    with poutine.trace() as tracer:
        values = guide()
    tracer.trace.compute_log_prob()
    for name, value in values.items():
        assert value.shape == prior.nodes[name]["value"].shape
        assert prior.nodes[name]["fn"].support.check(value).all()
        assert tracer.trace.nodes[name]["cond_indep_stack"] is not None
    total = guide.log_prob(values)
    assert total.shape == MODELS[case][1]
    torch.testing.assert_close(total.sum(), tracer.trace.log_prob_sum())
    draws = guide.sample_latents(7)
    assert all(v.shape == (7, *values[name].shape) for name, v in draws.items())
    assert guide.log_prob(draws).shape == (7, *MODELS[case][1])
    torch.testing.assert_close(
        guide.log_prob({name: v[3] for name, v in draws.items()}), guide.log_prob(draws)[3]
    )


@pytest.mark.parametrize("case", MODELS)
def test_the_elbo_is_pyros(case: str) -> None:
    """Mean of many draws of the two, and the fit improves both."""
    model = MODELS[case][0]()
    guide = ConditionalPriorGuide(model).setup()
    nesting = max(len(s.batch_shape) for s in guide._inspected().structure.sites)
    elbo = Trace_ELBO(4000, vectorize_particles=True, max_plate_nesting=max(1, nesting))
    start = guide.c_elbo(4000).sum()
    guide.fit(progress=False, num_particles=100)
    fitted = guide.c_elbo(4000).sum()
    assert fitted > start + 0.1
    assert float(fitted) == pytest.approx(-elbo.loss(model, guide), abs=0.2)
    one = Trace_ELBO(200).loss(model, guide)
    assert float(fitted) == pytest.approx(-one, abs=2.0)


OBJECTIVES = {
    "Trace_ELBO": Trace_ELBO(),
    "particles": Trace_ELBO(4, vectorize_particles=True),
    "particles in a loop": Trace_ELBO(3),
    "TraceGraph_ELBO": TraceGraph_ELBO(),
    "TraceMeanField_ELBO": TraceMeanField_ELBO(),
    "TraceEnum_ELBO": TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    "RenyiELBO": RenyiELBO(0.5, num_particles=3, vectorize_particles=True),
    "ReweightedWakeSleep": ReweightedWakeSleep(
        num_particles=3, vectorize_particles=True, max_plate_nesting=1
    ),
}


@pytest.mark.parametrize("flow", ["gvi", "planar", "spline"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.filterwarnings("ignore:TraceMeanField_ELBO:UserWarning")
def test_every_objective_trains_it(objective: str, flow: str) -> None:
    model = _conditioned()
    guide = ConditionalPriorGuide(model, flow)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), OBJECTIVES[objective])
    svi.step()
    before = guide.psi.detach().clone()
    for _ in range(2):
        assert torch.as_tensor(svi.step()).isfinite().all()
    assert (guide.psi != before).any(-1).all()


def test_svi_reaches_the_posterior() -> None:
    problem = linear_gaussian(3, 2, 4)
    guide = ConditionalPriorGuide(problem.model)
    elbo = Trace_ELBO(50, vectorize_particles=True)
    svi = SVI(problem.model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.993}), elbo)
    for _ in range(500):
        svi.step()
    gap = problem.log_evidence() - guide.c_elbo(2000)
    assert (gap < 0.02).all()


def test_torch_optimizers_train_only_the_guide() -> None:
    decoder = small_decoder(2, 6)
    data = torch.ones(ROWS, 6)
    model = frozen(condition_on(_rows_model(decoder), {"x": data}, {"x": data > 0}))
    guide = ConditionalPriorGuide(model).setup()
    loss = Trace_ELBO(10, vectorize_particles=True)(model, guide)
    assert {name for name, _ in loss.named_parameters()} == {"guide.psi"}
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert sum(values[-10:]) < sum(values[:10])
    assert all(p.grad is None for p in decoder.parameters())


def test_predictive_completes_the_evidence() -> None:
    problem = linear_gaussian(3, 2, 4)
    guide = ConditionalPriorGuide(problem.model)
    guide.fit(progress=False, num_particles=50)
    for parallel in (False, True):
        draws = Predictive(problem.model, guide=guide, num_samples=400, parallel=parallel)()
        assert draws["x"].shape == (400, 3, 4)
        observed = draws["x"][:, problem.mask]
        assert (observed == problem.data[problem.mask]).all()
        mean = problem.posterior().mean @ problem.weight.T + problem.bias
        error = draws["x"].std(0) / 20
        free = ~problem.mask
        assert ((draws["x"].mean(0) - mean)[free].abs() < 5 * error[free]).all()


@pytest.mark.parametrize("flow", ["gvi", "planar", "spline", "fcn", "template"])
def test_state_is_loaded_by_a_new_guide_before_any_call(flow: str) -> None:
    def template(features: int) -> nn.Module:
        return NeuralSplineFlow(features, transforms=1, hidden_features=8).bijection

    torch.manual_seed(1)
    model = _conditioned()
    kind = template if flow == "template" else flow
    guide = ConditionalPriorGuide(model, kind).setup()
    _disturb(guide)
    state = guide.state_dict()
    assert state["psi"].shape[0] == ROWS
    other = ConditionalPriorGuide(model, kind)
    other.load_state_dict(state)
    torch.testing.assert_close(other.psi, guide.psi, rtol=0, atol=0)
    other.setup()
    torch.testing.assert_close(other.psi, guide.psi, rtol=0, atol=0)
    for one in (guide, other):
        torch.manual_seed(2)
        one.drawn = one.sample_latents(3)["z"]
    torch.testing.assert_close(other.drawn, guide.drawn, rtol=0, atol=0)


def test_state_goes_to_a_new_process(tmp_path: Path) -> None:
    script = """
        import sys, torch, pyro, pyro.distributions as dist
        from pyro_ext import ConditionalPriorGuide, condition_on

        torch.set_default_dtype(torch.float64)

        def model():
            with pyro.plate("rows", 3):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=torch.ones(3, 2))

        torch.manual_seed(0)
        guide = ConditionalPriorGuide(model, "spline", hidden_features=4)
        if sys.argv[1] == "save":
            guide.fit(num_particles=30, max_iter=3, progress=False)
            torch.save(guide.state_dict(), sys.argv[2])
        else:
            guide.load_state_dict(torch.load(sys.argv[2], weights_only=True))
            guide.setup()
        torch.manual_seed(1)
        print(guide.sample_latents(2)["z"].flatten().tolist())
    """
    outputs = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), what, str(tmp_path / "guide.pt")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for what in ("save", "load")
    ]
    assert outputs[0] == outputs[1] != ""


def test_single_precision(float32: None) -> None:
    guide = ConditionalPriorGuide(_conditioned(), "spline")
    result = guide.fit(progress=False, num_particles=100, max_iter=30)
    assert guide.psi.dtype == result.c_elbo.dtype == torch.float32
    assert guide.sample_query(3)["x"].dtype == torch.float32


def test_evidence_of_double_precision_for_a_model_of_single(float32: None) -> None:
    """As NumPy makes it, with a decoder as torch makes it."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1))

    data = torch.tensor([1.0, 2.0], dtype=torch.float64)
    guide = ConditionalPriorGuide(condition_on(model, {"x": data}, {"x": data < 1.5}))
    result = guide.fit(progress=False, num_particles=50)
    exact = dist.Normal(0.0, 1.25**0.5).log_prob(torch.tensor(1.0))
    torch.testing.assert_close(result.c_elbo, exact, rtol=0, atol=1e-3)
    assert guide.query_log_prob(data).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:In .* the network folds")
def test_cuda() -> None:
    decoder = small_decoder(2, 6).cuda()
    data = torch.ones(ROWS, 6, device="cuda")

    def model() -> None:
        with pyro.plate("rows", ROWS):
            prior = dist.Normal(torch.zeros(2, device="cuda"), 1.0).to_event(1)
            pyro.sample("x", dist.Bernoulli(logits=decoder(pyro.sample("z", prior))).to_event(1))

    mask = torch.tensor([True, False] * 3, device="cuda")
    for flow in ("gvi", "planar", "spline", "fcn"):
        guide = ConditionalPriorGuide(condition_on(model, {"x": data}, {"x": mask}), flow)
        result = guide.fit(progress=False, num_particles=100, max_iter=20)
        assert result.c_elbo.device.type == "cuda"
        assert guide.sample_query(3)["x"].device.type == "cuda"
        assert guide.query_log_prob(data).isfinite().all()


def test_moving_a_guide_moves_all_of_it() -> None:
    guide = ConditionalPriorGuide(_conditioned(), lambda d: T.affine_autoregressive(d)).setup()
    guide.to("meta")
    tensors = [*guide.parameters(), *guide.buffers()]
    assert len(tensors) > 3
    assert all(t.device.type == "meta" for t in tensors)


def test_named_sites_only() -> None:
    """The other latents have a guide of their own, also where they are discrete."""

    def model() -> None:
        with pyro.plate("rows", ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            k = pyro.sample("k", dist.Bernoulli(0.5))
            x = z + k[..., None]
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=torch.ones(ROWS, 2))

    guide = ConditionalPriorGuide(model, sites=["z"])
    enumerated = pyro.infer.config_enumerate(model)
    svi = SVI(
        enumerated, guide, pyro.optim.Adam({"lr": 0.05}), TraceEnum_ELBO(max_plate_nesting=1)
    )
    losses = [svi.step() for _ in range(100)]
    assert sum(losses[-20:]) < sum(losses[:20])
    with pytest.raises(ValueError, match=r"\['k'\] are not guided"):
        guide.fit(progress=False)


def test_other_noise() -> None:
    problem = linear_gaussian(2, 2, 4)
    guide = ConditionalPriorGuide(problem.model, "spline", base=dist.StudentT(8.0))
    result = guide.fit(progress=False, num_particles=300)
    assert (problem.log_evidence() - result.held_out_c_elbo < 0.1).all()


@pytest.mark.parametrize(
    "flow",
    [
        lambda d: (
            NeuralSplineFlow(d, transforms=1, hidden_features=8, residual_blocks=1).bijection
        ),
        lambda d: T.planar(d),
        lambda d: T.affine_autoregressive(d, hidden_dims=[8]),
    ],
    ids=["Bijection", "planar", "autoregressive"],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_any_module_is_a_flow(flow: Callable[[int], nn.Module], rows: int) -> None:
    problem = linear_gaussian(rows, 2, 4)
    guide = ConditionalPriorGuide(problem.model, flow)
    start = ConditionalPriorGuide(problem.model, flow).setup().c_elbo(500)
    result = guide.fit(progress=False, num_particles=200, max_iter=30)
    missing = problem.log_evidence() - result.held_out_c_elbo
    assert (missing > -5 * result.held_out_error - 1e-3).all()
    assert result.held_out_c_elbo.sum() > start.sum()


def test_fit_goes_on_from_where_it_is() -> None:
    guide = ConditionalPriorGuide(_conditioned(), "planar")
    options: dict[str, Any] = {"progress": False, "num_particles": 400, "num_starts": 1}
    first = guide.fit(**options, max_iter=1)
    psi = guide.psi.detach().clone()
    second = guide.fit(**options, max_iter=20)
    # what it starts from is what it had, on other noise
    error = first.held_out_error + second.held_out_error
    assert ((second.trace[0] - first.c_elbo).abs() < 5 * error).all()
    assert second.held_out_c_elbo.sum() > first.held_out_c_elbo.sum()
    assert not torch.equal(psi, guide.psi)


def test_draws_in_chunks_are_the_same_objective() -> None:
    model = _conditioned()
    results = []
    for chunk_size in (None, 37):
        torch.manual_seed(0)
        guide = ConditionalPriorGuide(model)
        guide.fit(progress=False, num_particles=100, chunk_size=chunk_size)
        results.append(guide.psi.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


def test_the_trace_of_a_fit() -> None:
    guide = ConditionalPriorGuide(_conditioned())
    result = guide.fit(progress=False, num_particles=100, num_starts=3)
    assert result.trace.shape == (result.num_evaluations, ROWS)
    assert (result.trace.diff(dim=0) >= 0).all()
    assert result.status.shape == result.num_iterations.shape == (ROWS,)
    assert result.seconds > 0


def test_several_sites_of_evidence_and_query() -> None:
    """Data of mixed kinds, as in a table with missing entries."""
    decoder = small_decoder(2, 5, gain=1.0)

    def model() -> None:
        with pyro.plate("rows", ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            h = decoder(z)
            pyro.sample("size", dist.Normal(h[..., :2], 0.5).to_event(1))
            pyro.sample("kind", dist.Categorical(logits=h[..., 2:]))

    truth = {"size": torch.randn(ROWS, 2), "kind": torch.tensor([0, 1, 2, 1])}
    mask = {"size": torch.rand(ROWS, 2) < 0.5, "kind": torch.tensor([True, False, True, False])}
    guide = ConditionalPriorGuide(condition_on(model, truth, mask))
    guide.fit(progress=False, num_particles=200)
    draws = guide.sample_query(50)
    assert draws["size"].shape == (50, ROWS, 2)
    assert draws["kind"].shape == (50, ROWS)
    for name, value in draws.items():
        assert (value[:, mask[name]] == truth[name][mask[name]]).all()
    everything = guide.query_log_prob(truth, 4000)
    # a row without anything free has nothing to be asked
    complete = condition_on(model, truth)
    nothing = ConditionalPriorGuide(complete).setup().query_log_prob(truth)
    torch.testing.assert_close(nothing, torch.zeros(ROWS))
    # the joint of all, against a grid of the latents
    axis = torch.linspace(-5, 5, 201)
    z = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
    with torch.no_grad():
        h = decoder(z)
        size = dist.Normal(h[..., :2], 0.5).log_prob(truth["size"])
        kind = dist.Categorical(logits=h[..., 2:]).log_prob(truth["kind"])
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    evidence = prior + (size * mask["size"]).sum(-1) + kind * mask["kind"]
    exact = (prior + size.sum(-1) + kind).logsumexp(0) - evidence.logsumexp(0)
    torch.testing.assert_close(everything, exact, rtol=0, atol=0.15)


def test_a_model_that_cannot_be_vectorised_is_run_in_a_loop() -> None:
    from pyro_ext.errors import VectorizationWarning

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = z if float(z.detach()[0]) > 0 else -z
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=torch.ones(2))

    guide = ConditionalPriorGuide(model)
    with pytest.warns(VectorizationWarning, match="run once for each"):
        result = guide.fit(progress=False, num_particles=20, max_iter=5)
    assert result.c_elbo.isfinite()


def test_convolutional_decoders_need_no_further_dimensions() -> None:
    """Layers that take one batch dimension and no more."""
    decoder = nn.Sequential(
        nn.Linear(2, 8), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 1, 2, 2), nn.Flatten()
    )
    data = torch.rand(ROWS, 16)

    def model() -> None:
        with pyro.plate("rows", ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1))

    guide = ConditionalPriorGuide(condition_on(model, {"x": data}, {"x": data[0] > 0.5}))
    result = guide.fit(progress=False, num_particles=30, max_iter=10)
    assert result.held_out_c_elbo.isfinite().all()
    assert guide.sample_query(2)["x"].shape == (2, ROWS, 16)


def test_trained_modules_and_random_state_are_left_alone() -> None:
    decoder = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6)).eval()
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    data = torch.ones(ROWS, 6)
    model = condition_on(_rows_model(decoder), {"x": data}, {"x": data[0] > 0})
    guide = ConditionalPriorGuide(model)
    guide.fit(progress=False, num_particles=30, max_iter=5)
    for name, value in decoder.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for p in decoder.parameters())
    assert not pyro.get_param_store().keys()
