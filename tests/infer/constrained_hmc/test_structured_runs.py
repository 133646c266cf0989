"""Structure found, reported, checked and given up in runs of whole models."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext import MCMC, ConstrainedHMC, ConstrainedNUTS
from pyro_ext.errors import SamplingWarning, VectorizationWarning
from pyro_ext.infer.constrained_hmc import assembly as assembly_module
from pyro_ext.infer.constrained_hmc.assembly import Preferences, assemble, settle
from pyro_ext.infer.constrained_hmc.jacobian.block_structure import BlockStructure
from pyro_ext.infer.constrained_hmc.jacobian.structure import DenseStructure
from pyro_ext.infer.constrained_hmc.model.constrained_model import ConstrainedModel
from tests.statistics import assert_moments

Model = Callable[..., Any]
STEPS = 30
CHAINS = 16
SWITCH = 2.6  # hardly ever passed where chains start


def series(noise_scale: float = 0.5) -> Model:
    """An autoregression with a site per step, which starts from the observed step before."""

    def model() -> None:
        rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        y = torch.zeros(2)
        for t in range(STEPS):
            noise = pyro.sample(f"n_{t}", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            mixed = torch.stack([noise[0], 0.6 * noise[0] + noise[1]])
            y = pyro.deterministic(f"y_{t}", rate * y + level + noise_scale * mixed)

    return model


class Conditioned(NamedTuple):
    """A model conditioned on a draw of its own, and the draw."""

    model: Model
    data: dict[str, Tensor]


def observe(model: Model, seed: int = 3) -> Conditioned:
    pyro.set_rng_seed(seed)
    trace = pyro.poutine.trace(model).get_trace()
    data = {n: v["value"] for n, v in trace.nodes.items() if n.startswith("y")}
    return Conditioned(pyro.condition(model, data), data)


def run(kernel: Any, draws: int, warmup: int, chains: int = CHAINS) -> MCMC:
    mcmc = MCMC(kernel, draws, warmup, num_chains=chains, disable_progbar=True)
    mcmc.run()
    return mcmc


def exact_posterior(conditioned: Conditioned, noise_scale: float = 0.5) -> tuple[Tensor, Tensor]:
    """Mean and covariance of rate and level: a linear regression with correlated noise."""
    data = torch.stack([conditioned.data[f"y_{t}"] for t in range(STEPS)])
    before = torch.cat([torch.zeros(1, 2), data[:-1]])
    root = noise_scale * torch.tensor([[1.0, 0.0], [0.6, 1.0]])
    weight = torch.linalg.inv(root @ root.T)
    design = torch.stack([before, torch.ones_like(before)], -1)  # (steps, 2 outputs, 2 inputs)
    precision = torch.eye(2) + torch.einsum("tia,ij,tjb->ab", design, weight, design)
    moment = torch.einsum("tia,ij,tj->a", design, weight, data)
    covariance = torch.linalg.inv(precision)
    return covariance @ moment, covariance


def check_posterior(mcmc: MCMC, conditioned: Conditioned, min_ess: float = 300) -> None:
    mean, covariance = exact_posterior(conditioned)
    draws = mcmc.get_samples(group_by_chain=True)
    values = torch.stack([draws["rate"], draws["level"]], -1)
    assert_moments(values, mean, covariance.diagonal().sqrt(), min_ess=min_ess, name="rate, level")


def test_a_series_is_found_to_be_made_of_blocks_and_sampled_exactly() -> None:
    conditioned = observe(series())
    kernel = ConstrainedHMC(conditioned.model)
    mcmc = run(kernel, 20, 40, chains=64)
    report = mcmc.diagnostics()["structure"]["chain 0"]
    assert report.startswith("30 local blocks of up to 2 x 2, 2 global inputs"), report
    assert report in kernel.summary()
    check_posterior(mcmc, conditioned)


@pytest.mark.parametrize(
    "settings",
    [
        {"projection": "newton"},
        {"jacobian_mode": "reverse"},
        {"num_inner_steps": 2},
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any]) -> None:
    conditioned = observe(series())
    kernel = ConstrainedHMC(conditioned.model, structure="elementwise", **settings)
    mcmc = run(kernel, 40, 40)
    check_posterior(mcmc, conditioned)


def test_scales_do_not_spoil_what_the_constraint_has_scaled() -> None:
    """The noise of sixty outputs moves with two inputs; each of its inputs varies little."""
    conditioned = observe(series())
    kernel = ConstrainedHMC(
        conditioned.model, adapt_mass_matrix=True, trajectory_length=1.5, structure="elementwise"
    )
    check_posterior(run(kernel, 60, 40), conditioned, min_ess=400)
    assert (kernel._chains.scale - 1).abs().max() < 0.3


def test_no_u_turn_trajectories() -> None:
    conditioned = observe(series())
    kernel = ConstrainedNUTS(conditioned.model, max_tree_depth=5, structure="elementwise")
    mcmc = run(kernel, 50, 40)
    assert "local blocks" in mcmc.diagnostics()["structure"]["chain 0"]
    check_posterior(mcmc, conditioned)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
def test_a_compiled_run() -> None:
    conditioned = observe(series())
    kernel = ConstrainedHMC(conditioned.model, structure="elementwise", compile=True)
    mcmc = run(kernel, 60, 40)
    assert "local blocks" in mcmc.diagnostics()["structure"]["chain 0"]
    check_posterior(mcmc, conditioned)
    torch.compiler.reset()


def test_a_series_that_runs_on_its_own_states() -> None:
    """One site for the whole series: noise acts on all that follows it."""

    def model() -> None:
        rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand([STEPS, 2]).to_event(2))
        y, outputs = torch.zeros(2), []
        for n in noise:
            mixed = torch.stack([n[0], 0.6 * n[0] + n[1]])
            y = rate * y + level + 0.5 * mixed
            outputs.append(y)
        pyro.deterministic("y", torch.stack(outputs))

    steps = observe(series())
    data = torch.stack([steps.data[f"y_{t}"] for t in range(STEPS)])
    conditioned = pyro.condition(model, {"y": data})
    mcmc = run(ConstrainedHMC(conditioned, structure="autoregressive"), 40, 40)
    report = mcmc.diagnostics()["structure"]["chain 0"]
    assert report.startswith("lower triangular in 60 blocks of up to 1 x 1, 2 other inputs")
    check_posterior(mcmc, steps)


def regression(num_data: int) -> Model:
    """Outputs with noise of their own; beyond ``SWITCH`` the noises of neighbours are mixed."""
    x = torch.linspace(-1.0, 1.0, num_data)

    def model() -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        switch = pyro.sample("switch", dist.Normal(0.0, 1.0))
        with pyro.plate("data", num_data):
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        pyro.deterministic("y", _outputs(slope, switch, noise, x))

    return model


def _outputs(slope: Tensor, switch: Tensor, noise: Tensor, x: Tensor) -> Tensor:
    """The mixing is a rotation, so that the posterior of the switch is its prior."""
    angle = (switch - SWITCH).clamp(min=0.0).square()[..., None]
    even, odd = noise[..., ::2], noise[..., 1::2]
    rotated = [angle.cos() * even - angle.sin() * odd, angle.sin() * even + angle.cos() * odd]
    return (slope[..., None] * x).sinh() + 0.3 * torch.stack(rotated, -1).flatten(-2)


def test_dense_is_kept_where_structure_does_not_pay() -> None:
    few = run(ConstrainedHMC(observe(regression(4)).model), 5, 5)
    assert few.diagnostics()["structure"]["chain 0"].startswith("dense")
    many = run(ConstrainedHMC(observe(regression(200)).model), 5, 5)
    assert many.diagnostics()["structure"]["chain 0"].startswith("200 local blocks of up to 1 x 1")
    asked = run(ConstrainedHMC(observe(regression(200)).model, structure="dense"), 5, 5)
    assert asked.diagnostics()["structure"]["chain 0"].startswith("dense")


@pytest.mark.parametrize("interval", [1, 5])
def test_a_structure_that_breaks_is_given_up_with_one_warning(interval: int) -> None:
    conditioned = observe(regression(30))
    kernel = ConstrainedHMC(
        conditioned.model, structure="elementwise", structure_check_interval=interval
    )
    mcmc = MCMC(kernel, 40, 0, num_chains=64, disable_progbar=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run()
    messages = [str(w.message) for w in caught if issubclass(w.category, SamplingWarning)]
    assert len(messages) == 1, messages
    assert "depend on inputs that they did not depend on at the start" in messages[0]
    assert "'y[0]' on 'switch', 'noise'" in messages[0]
    report = mcmc.diagnostics()["structure"]["chain 0"]
    assert report.startswith("dense")
    assert "since 30 local blocks" in report
    draws = mcmc.get_samples()
    assert (draws["switch"] > SWITCH).any()
    inputs = [draws[name] for name in ("slope", "switch", "noise")]
    values = _outputs(*inputs, torch.linspace(-1.0, 1.0, 30))
    assert (values - conditioned.data["y"]).abs().max() < 1e-8


def test_of_large_jacobians_the_structure_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense one might not fit into memory."""
    conditioned = observe(regression(30))
    monkeypatch.setattr(assembly_module, "is_small", lambda shape: False)
    kernel = ConstrainedHMC(conditioned.model, structure="elementwise", structure_check_interval=1)
    mcmc = MCMC(kernel, 30, 0, num_chains=64, disable_progbar=True)
    with pytest.warns(SamplingWarning, match="with the structure that holds there too"):
        mcmc.run()
    report = mcmc.diagnostics()["structure"]["chain 0"]
    assert report.startswith("15 local blocks of up to 2 x 2, 2 global inputs")
    assert "since 30 local blocks" in report
    draws = mcmc.get_samples()
    assert (draws["switch"] > SWITCH).any()
    inputs = [draws[name] for name in ("slope", "switch", "noise")]
    values = _outputs(*inputs, torch.linspace(-1.0, 1.0, 30))
    assert (values - conditioned.data["y"]).abs().max() < 1e-8


def test_structure_that_the_prior_hides_is_found_at_the_starting_points() -> None:
    """At prior draws of the rate the series overflows, so that most rows cannot be read."""

    def model() -> None:
        rate = pyro.sample("rate", dist.Normal(0.0, 30.0))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand([40]).to_event(1))
        y = (rate * torch.linspace(0.0, 40.0, 40)).square().exp() * 1e-3
        pyro.deterministic("y", torch.where(rate.abs() > 3.0, y * rate, 0.1 * rate) + noise)

    data = torch.randn(40)
    inspected = ConstrainedModel(pyro.condition(model, {"y": data}), (), {})
    preferences = Preferences(64, structure="elementwise")
    with torch.no_grad():
        assembly = assemble(inspected, preferences)
        assert isinstance(assembly.system.structure, DenseStructure)
        assert assembly.pattern is not None
        assert not assembly.pattern.is_complete
        start = torch.randn(64, 41)
        start[:, 0] *= 0.01
        start[:, 1:] = data - 3.0 * start[:, :1]
        settled = settle(assembly, start, preferences)
    assert isinstance(settled.system.structure, BlockStructure)
    assert settled.report.startswith("40 local blocks of up to 1 x 1, 1 global inputs")


def test_a_structure_that_is_not_there_cannot_be_asked_for() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        mix = torch.arange(15.0).square().reshape(3, 5).sin()
        pyro.deterministic("y", mix @ x)

    kernel = ConstrainedHMC(pyro.condition(model, {"y": torch.ones(3)}), structure="elementwise")
    with pytest.raises(ValueError, match=r"structure='elementwise' .* does not have it.*%"):
        run(kernel, 5, 5)


def test_a_structure_needs_a_model_that_can_be_vectorised() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        pyro.deterministic("y", x[:3] * (2.0 if x[4] > 0 else 1.0))

    kernel = ConstrainedHMC(pyro.condition(model, {"y": torch.ones(3)}), structure="elementwise")
    with (
        pytest.warns(VectorizationWarning),
        pytest.raises(ValueError, match="'elementwise' needs a model that can be vectorised"),
    ):
        run(kernel, 5, 5)


def test_what_only_one_starting_point_shows_is_taken_into_the_structure() -> None:
    inspected = ConstrainedModel(observe(regression(30)).model, (), {})
    preferences = Preferences(64, structure="elementwise")
    with torch.no_grad():
        assembly = assemble(inspected, preferences)
        assert assembly.report.startswith("30 local blocks of up to 1 x 1, 1 global inputs")
        start = 0.3 * torch.randn(64, 32)
        start[40, 1] = SWITCH + 1.0
        settled = settle(assembly, start, preferences)
    assert settled.report.startswith("15 local blocks of up to 2 x 2, 2 global inputs")


@pytest.mark.parametrize("value", ["diagonal", "Dense"])
def test_unknown_structures_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"structure must be one of .*{value!r}"):
        ConstrainedHMC(regression(4), structure=value)


@pytest.mark.parametrize("value", [0, -3])
def test_the_interval_of_checks_must_be_positive(value: int) -> None:
    with pytest.raises(ValueError, match=r"structure_check_interval must be .* whole number"):
        ConstrainedHMC(regression(4), structure_check_interval=value)


@pytest.mark.parametrize("jacobian_mode", ["auto", "forward"])
@pytest.mark.parametrize("operation", ["solve", "det"])
def test_operations_that_torch_differentiates_wrongly_in_batches(
    operation: str, jacobian_mode: str
) -> None:
    """Forward mode is wrong for these in PyTorch 2.13, without an error."""
    shift = torch.randn(3, 3) + 4 * torch.eye(3)

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        matrix = shift + a.tanh().diag()
        solution = torch.linalg.solve(matrix, b)
        pyro.deterministic("x", solution if operation == "solve" else matrix.det() * b[:1])

    size = 3 if operation == "solve" else 1
    model_ = ConstrainedModel(pyro.condition(model, {"x": torch.full((size,), 0.1)}), (), {})
    system = assemble(model_, Preferences(4, jacobian_mode)).system
    u = torch.randn(4, 6)
    found = system.jacobian_matrix(u, torch.ones(6))
    for row, matrix in zip(u, found, strict=True):
        expected = torch.autograd.functional.jacobian(model_.constraint, row)
        torch.testing.assert_close(matrix, expected)
