"""Everything that cannot be sampled is refused by a message that names the site and the cure."""

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_ext.infer.mcmc
from pyro_ext import MCMC, ConstrainedHMC
from pyro_ext.errors import (
    InitializationError,
    ModelStructureError,
    PrecisionWarning,
    SamplingWarning,
    VectorizationWarning,
)
from pyro_ext.infer.constrained_hmc.assembly import build_system
from pyro_ext.infer.constrained_hmc.model.constrained_model import ConstrainedModel


def run(
    model: Callable[..., Any], data: dict[str, Any] | None = None, **settings: Any
) -> tuple[MCMC, dict[str, Tensor]]:
    conditioned = pyro.condition(model, data) if data else model
    settings = {"num_samples": 3, "warmup_steps": 3, "num_chains": 2, **settings}
    mcmc = MCMC(ConstrainedHMC(conditioned), disable_progbar=True, **settings)
    mcmc.run()
    return mcmc, mcmc.get_samples(group_by_chain=True)


def good() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.deterministic("trajectory", z[:2] * z[2])


def noise_free(outputs: int) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.deterministic("y", z.repeat(2)[:outputs].cumsum(0))


def independent() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.deterministic("y", torch.stack([z.sum(), torch.tensor(1.0)]))


def detached() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.deterministic("y", z.sum().detach() ** 2)


def hidden_noise() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.deterministic("y", z[:2] + torch.nn.functional.dropout(z, training=True).sum())


def hidden_noise_of_numpy() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.deterministic("y", torch.stack([z.sum(), z.prod() + float(np.random.randn())]))


def mixed() -> None:
    components = dist.Normal(torch.tensor([-2.0, 2.0]), 1.0)
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    x = pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components))
    pyro.deterministic("y", x + z)


def discrete_output_summed() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("coins", 3):
        coin = pyro.sample("coin", dist.Bernoulli(0.5))
    pyro.deterministic("y", z.sum() + coin.sum())


def stepped() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.deterministic("y", torch.where(z.sum() > 0, 1.0, 2.0) + (3 * z[0]).round())


def twice() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    pyro.deterministic("total", z.sum())
    pyro.deterministic("product", z[0] * z[1])
    pyro.deterministic("average", z.mean())


def unreachable() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.deterministic("positive", torch.stack([z[0], 1 + z[1:].square().sum()]))


def discrete_output() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.deterministic("y", z.sum() + k)


def discrete_output_elementwise() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    with pyro.plate("items", 3):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        pyro.deterministic("y", z[:3] + z[3] * k, event_dim=0)


def countable() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    k = pyro.sample("number", dist.Poisson(2.0))
    pyro.sample("x", dist.Normal(k, 1.0), obs=torch.tensor(1.0))
    pyro.deterministic("y", z.sum())


def only_discrete() -> None:
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.deterministic("y", k * 1.0)
    pyro.sample("x", dist.Normal(k, 1.0), obs=torch.tensor(1.0))


def no_latent() -> None:
    pyro.deterministic("y", torch.tensor([1.0, 2.0]).sum())


def subsampled() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("minibatch", 10, subsample_size=4):
        pyro.sample("x", dist.Normal(z[0], 1.0), obs=torch.zeros(4))
    pyro.deterministic("y", z.sum())


def observed_only() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


def integer_output() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.deterministic("count", (z > 0).sum())


class Case(NamedTuple):
    model: Callable[..., Any]
    data: dict[str, Any]
    error: type[Exception]
    names: str  # site, and what is wrong with it
    cure: str


_TWO = torch.tensor([0.5, 1.0], dtype=torch.float64)
_ONE = torch.tensor(1.0, dtype=torch.float64)
CASES = {
    "nothing conditioned": Case(
        good, {}, ValueError, r"No output.*\['trajectory'\]", r"pyro\.condition\(model"
    ),
    "only a likelihood": Case(
        observed_only, {}, ValueError, r"\['x'\] have a density", r"NUTS.*lift_observations"
    ),
    "misspelt": Case(
        good, {"trajektory": _TWO}, ValueError, r"'trajektory'", r"Did you mean 'trajectory'\?"
    ),
    "misspelt beside a good one": Case(
        good, {"trajectory": _TWO, "zz": _TWO}, ValueError, r"'zz'", r"sites are \['trajectory'"
    ),
    "wrong shape": Case(
        good,
        {"trajectory": torch.zeros(3, dtype=torch.float64)},
        ValueError,
        r"'trajectory' computes a value of shape \(2,\).*shape \(3,\)",
        r"Reshape",
    ),
    "one dimension too many": Case(
        good,
        {"trajectory": _TWO[None]},
        ValueError,
        r"'trajectory'.*\(2,\).*\(1, 2\)",
        r"Reshape",
    ),
    "integers": Case(
        good,
        {"trajectory": torch.tensor([1, 2])},
        ValueError,
        r"'trajectory' computes torch\.float64 .*torch\.int64",
        r"\.to\(torch\.float64\)",
    ),
    "float32 in a float64 model": Case(
        good,
        {"trajectory": _TWO.float()},
        ValueError,
        r"'trajectory' computes torch\.float64 .*torch\.float32",
        r"\.to\(torch\.float64\)",
    ),
    "integer output": Case(
        integer_output,
        {"count": torch.tensor(1)},
        ValueError,
        r"'count'.*torch\.int64",
        r"floating-point output",
    ),
    "NaN": Case(
        good,
        {"trajectory": torch.tensor([0.5, torch.nan], dtype=torch.float64)},
        ValueError,
        r"'trajectory'.*1 NaN or infinite elements of 2",
        r"Remove them",
    ),
    "infinite": Case(
        good,
        {"trajectory": torch.tensor([torch.inf, -torch.inf], dtype=torch.float64)},
        ValueError,
        r"'trajectory'.*2 NaN or infinite elements of 2",
        r"Remove them",
    ),
    "more outputs than inputs": Case(
        lambda: noise_free(3),
        {"y": torch.zeros(3, dtype=torch.float64)},
        ValueError,
        r"3 output values.*\(y: 3\).*only 2 inputs \(z: 2\)",
        r"summary statistics.*lift_observations",
    ),
    "as many outputs as inputs": Case(
        lambda: noise_free(2), {"y": _TWO}, ValueError, r"2 output values.*only 2 inputs", r"fewer"
    ),
    "constant output": Case(
        independent,
        {"y": _TWO},
        ValueError,
        r"'y\[1\]' is conditioned on.*same at every draw",
        r"Remove it from the conditioned values",
    ),
    "detached output": Case(
        detached, {"y": _ONE}, ValueError, r"'y'.*changes from draw to draw", r"\.detach\(\)"
    ),
    "dropout": Case(
        hidden_noise, {"y": _TWO}, ValueError, r"'y\[0\]'.*different values", r"network\.eval\(\)"
    ),
    "random numbers of NumPy": Case(
        hidden_noise_of_numpy,
        {"y": _TWO},
        ValueError,
        r"'y\[1\]'.*different values",
        r"Draw them by pyro\.sample",
    ),
    "support without a transform": Case(
        mixed, {"y": _ONE}, ValueError, r"'x'.*MixtureSameFamily.*support", r"discrete site"
    ),
    "step function": Case(
        stepped, {"y": _ONE}, ValueError, r"'y'.*changes from draw to draw", r"differentiable"
    ),
    "the same twice": Case(
        twice,
        {"total": _ONE, "product": _ONE / 2, "average": _ONE / 4},
        ValueError,
        r"rank 2: outputs \['(total', 'average|average', 'total)'\] are functions of each other",
        r"Condition on each independent quantity once",
    ),
    "unreachable value": Case(
        unreachable,
        {"positive": torch.tensor([0.0, -3.0], dtype=torch.float64)},
        InitializationError,
        r"'positive\[1\]' is off by 4",
        r"can be produced.*initial_params or init_strategy",
    ),
    "discrete output": Case(
        discrete_output, {"y": _ONE}, ValueError, r"'y'.*discrete latent", r"continuous sites only"
    ),
    "discrete output in a plate": Case(
        discrete_output_elementwise,
        {"y": torch.ones(3, dtype=torch.float64)},
        ValueError,
        r"'y'.*discrete latent",
        r"continuous sites only",
    ),
    "discrete output of one number": Case(
        discrete_output_summed, {"y": _ONE}, ValueError, r"'y'.*discrete latent", r"continuous"
    ),
    "discrete site without finite support": Case(
        countable, {"y": _ONE}, ValueError, r"'number'.*Poisson.*enumerated", r"finite support"
    ),
    "nothing continuous": Case(
        only_discrete, {"y": _ONE}, ValueError, r"'y'.*discrete latent", r"continuous sites only"
    ),
    "nothing random": Case(
        no_latent, {"y": _ONE}, ValueError, r"no continuous latent", r"pyro\.sample site"
    ),
    "subsampled plate": Case(
        subsampled,
        {"y": _ONE},
        ValueError,
        r"'minibatch' subsamples 4 of 10",
        r"remove subsample_size",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_with_the_site_and_the_cure(name: str) -> None:
    case = CASES[name]
    with pytest.raises(case.error) as caught:
        run(case.model, case.data)
    message = str(caught.value)
    assert re.search(case.names, message), message
    assert re.search(case.cure, message), message


@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
def test_sites_that_change_during_sampling(chain_method: str) -> None:
    """A branch that neither run of the inspection took."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.deterministic("y", z.sum())
        if len(draws) > 3:
            pyro.sample("extra", dist.Normal(0.0, 1.0))

    draws: list[int] = []
    kernel = ConstrainedHMC(pyro.condition(model, {"y": _ONE}))
    mcmc = MCMC(
        kernel,
        num_samples=10,
        warmup_steps=0,
        hook_fn=lambda *args: draws.append(1),
        disable_progbar=True,
        chain_method=chain_method,
    )
    with pytest.raises(ModelStructureError, match=r"'extra'.*torch\.where"):
        mcmc.run()


# -- models that vmap cannot run -----------------------------------------------------------------


def vectorised() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    state, states = torch.zeros(()), []
    for t in range(3):
        state = torch.tanh(state + z[t]) * z[3]
        states.append(state)
    pyro.deterministic("y", torch.stack(states))


def in_place() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    states = torch.zeros(4)
    for t in range(3):
        states[t + 1] = torch.tanh(states[t].clone() + z[t]) * z[3]
    pyro.deterministic("y", states[1:])


def branching() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    state, states = torch.zeros(()), []
    for t in range(3):
        inner = state + z[t]
        # the same function, written with a branch on a value
        state = (torch.tanh(inner) if inner > 0 else -torch.tanh(-inner)) * z[3]
        states.append(state)
    pyro.deterministic("y", torch.stack(states))


@pytest.mark.parametrize("model", [in_place, branching], ids=["in place", "branch"])
@pytest.mark.parametrize("mode", ["forward", "reverse", "auto"])
def test_loops_where_vmap_cannot_run(model: Callable[..., Any], mode: str) -> None:
    """With a warning, and with the same numbers as the model written for vectorisation."""
    y = torch.tensor([0.1, 0.2, 0.1])
    fast = ConstrainedModel(pyro.condition(vectorised, {"y": y}), (), {})
    slow = ConstrainedModel(pyro.condition(model, {"y": y}), (), {})
    with pytest.warns(VectorizationWarning, match=r"once per chain.*torch\.stack"):
        looped = build_system(slow, num_chains=5, jacobian_mode=mode)
    batched = build_system(fast, num_chains=5, jacobian_mode=mode)
    assert batched.is_vectorized
    assert not looped.is_vectorized
    u, one = torch.randn(5, 4), torch.ones(4)
    torch.testing.assert_close(looped.constraint(u, one), batched.constraint(u, one))
    torch.testing.assert_close(looped.jacobian_matrix(u, one), batched.jacobian_matrix(u, one))
    a, b = looped.point(u, one), batched.point(u, one)
    torch.testing.assert_close(a.energy, b.energy)
    torch.testing.assert_close(a.gradient, b.gradient)


@pytest.mark.parametrize("model", [in_place, branching], ids=["in place", "branch"])
def test_runs_where_vmap_cannot_run(model: Callable[..., Any]) -> None:
    y = torch.tensor([0.1, 0.2, 0.1])
    with pytest.warns(VectorizationWarning):
        _, samples = run(model, {"y": y})
    for row in samples["z"].flatten(0, 1):
        trace = pyro.poutine.trace(pyro.condition(model, {"z": row})).get_trace()
        torch.testing.assert_close(trace.nodes["y"]["value"], y, rtol=0, atol=1e-8)


def test_mistakes_of_the_model_are_not_taken_for_failures_of_vmap() -> None:
    runs: list[int] = []

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        runs.append(1)
        y = z[:2] @ torch.ones(2 if len(runs) <= 2 else 5)
        pyro.deterministic("y", y)

    with pytest.raises(RuntimeError, match=r"size|inconsistent"):
        run(model, {"y": _ONE})
    assert len(runs) == 4  # two at inspection, one under vmap, one without


# -- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("step_size", 0.0, r"step_size must be positive and finite, got 0\.0"),
        ("step_size", float("nan"), r"step_size must be positive and finite, got nan"),
        ("num_steps", 0, r"num_steps must be a positive whole number, got 0"),
        ("trajectory_length", -1.0, r"trajectory_length must be positive and finite, got -1\.0"),
        ("max_num_steps", 0, r"max_num_steps must be a positive whole number"),
        ("num_inner_steps", 0, r"num_inner_steps must be a positive whole number"),
        ("constraint_tol", 0.0, r"constraint_tol must be positive"),
        (
            "max_projection_iters",
            -3,
            r"max_projection_iters must be .* whole number, got -3",
        ),
        ("step_size", "small", r"step_size must be positive and finite, got 'small'"),
        (
            "trajectory_length",
            torch.inf,
            r"trajectory_length must be .* finite, got inf",
        ),
        ("num_steps", 2.5, r"num_steps must be a positive whole number, got 2\.5"),
        ("max_projection_iters", 9.0, r"max_projection_iters must be a positive whole number"),
        ("jitter", 1.0, r"jitter must lie in \[0, 1\), got 1\.0"),
        ("jitter", -0.1, r"jitter must lie in \[0, 1\)"),
        ("target_accept_prob", 1.0, r"target_accept_prob must lie in \(0, 1\), got 1\.0"),
        ("target_accept_prob", 0.0, r"target_accept_prob must lie in \(0, 1\)"),
        ("projection", "secant", r"projection must be one of \('quasi-newton', 'newton'\)"),
        ("jacobian_mode", "sparse", r"jacobian_mode must be one of .*'sparse'"),
    ],
)
def test_arguments_of_the_kernel(argument: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConstrainedHMC(good, **{argument: value})


def test_the_model_must_be_a_function() -> None:
    with pytest.raises(TypeError, match=r"model must be a function .* got Tensor"):
        ConstrainedHMC(torch.zeros(3))  # type: ignore[arg-type]


def test_the_init_strategy_must_be_a_function() -> None:
    with pytest.raises(TypeError, match=r"init_strategy must be a function .* got dict"):
        ConstrainedHMC(good, init_strategy={"z": torch.zeros(3)})  # type: ignore[arg-type]


def _kernel() -> ConstrainedHMC:
    return ConstrainedHMC(pyro.condition(good, {"trajectory": _TWO}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, r"at least 1, got 0 and 1"),
        ({"num_samples": 5, "num_chains": 0}, r"at least 1, got 5 and 0"),
        ({"num_samples": 5.0}, r"num_samples must be a whole number, got 5\.0"),
        ({"num_samples": 5, "num_chains": 2.0}, r"num_chains must be a whole number, got 2\.0"),
        ({"num_samples": 5, "warmup_steps": 2.5}, r"warmup_steps must be a whole number, got 2"),
        ({"num_samples": 5, "warmup_steps": -1}, r"warmup_steps must not be negative, got -1"),
        ({"num_samples": 5, "chain_method": "vectorised"}, r"chain_method must be one of"),
    ],
    ids=[
        "num_samples",
        "num_chains",
        "fraction of num_samples",
        "fraction of num_chains",
        "fraction of warmup_steps",
        "warmup_steps",
        "chain_method",
    ],
)
def test_arguments_of_the_runner(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MCMC(_kernel(), **settings)


def test_the_kernel_must_be_one() -> None:
    with pytest.raises(TypeError, match=r"MCMC kernel such as ConstrainedHMC.* got function"):
        MCMC(good, 5)  # type: ignore[arg-type]


def test_only_vectorised_kernels_are_vectorised() -> None:
    with pytest.raises(ValueError, match=r"NUTS cannot vectorise chains; use chain_method"):
        MCMC(pyro.infer.NUTS(good), 5, chain_method="vectorized")


@pytest.mark.parametrize(
    ("initial", "num_chains", "message"),
    [
        ({"z": torch.zeros(3, 3)}, 2, r"'z'.*\(3, 3\).*number of chains, 2"),
        ({"z": torch.zeros(2, 4)}, 2, r"'z' has shape \(4,\); the site has shape \(3,\)"),
        ({"z": torch.zeros(2)}, 1, r"'z' has shape \(2,\); the site has shape \(3,\)"),
        ({"x": torch.zeros(2, 3)}, 2, r"\['x'\], which are not latent sites.*\['z'\]"),
        ({"trajectory": torch.zeros(2, 2)}, 2, r"\['trajectory'\], which are not latent"),
    ],
    ids=["chains", "shape", "shape of one chain", "name", "output"],
)
def test_initial_params(initial: dict[str, Tensor], num_chains: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(good, {"trajectory": _TWO}, initial_params=initial, num_chains=num_chains)


def test_initial_params_set_on_the_kernel_by_hand() -> None:
    kernel = _kernel()
    kernel.num_chains = 2
    kernel.initial_params = {"z": torch.zeros(5, 3)}
    with pytest.raises(ValueError, match=r"initial_params\['z'\] has shape \(5, 3\); with 2"):
        kernel.setup(0)


def test_unknown_save_params() -> None:
    with pytest.raises(ValueError, match=r"save_params names \['zz'\].*\['z'\]"):
        run(good, {"trajectory": _TWO}, save_params=["zz", "z"])


def test_a_run_that_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyro_ext.infer.mcmc, "_available_bytes", lambda kernel: 10_000)
    with pytest.raises(MemoryError, match=r"needs at least .* GiB.*fewer chains or draws"):
        run(good, {"trajectory": _TWO}, num_chains=500)
    run(good, {"trajectory": _TWO}, num_chains=2)


def test_required_memory_grows_with_chains_and_draws() -> None:
    def needed(num_chains: int, num_samples: int) -> int:
        kernel = _kernel()
        kernel.num_chains = num_chains
        kernel.setup(0)
        return kernel.required_bytes(num_samples)

    assert needed(8, 10) == 2 * needed(4, 10)
    # 8 bytes for each of three inputs
    assert needed(4, 110) - needed(4, 10) == 4 * 100 * 3 * 8


# -- what is allowed, with a warning -------------------------------------------------------------


@pytest.mark.usefixtures("float32")
def test_single_precision_runs_within_its_tolerance() -> None:
    observed = _TWO.float()
    with pytest.warns(PrecisionWarning, match=r"torch\.float32.*Use float64") as caught:
        mcmc, samples = run(good, {"trajectory": observed}, num_samples=20, warmup_steps=20)
    assert len([w for w in caught if w.category is PrecisionWarning]) == 1
    z = samples["z"]
    assert z.dtype == torch.float32
    residual = (z[..., :2] * z[..., 2:] - observed).abs().max()
    assert residual <= 2 * torch.finfo(torch.float32).eps ** 0.575
    accepted = torch.stack(list(mcmc.diagnostics()["is_accepted"].values()))
    assert accepted.double().mean() > 0.5


@pytest.mark.usefixtures("float32")
def test_single_precision_runs_with_scalars_and_numbers() -> None:
    """Whose forward derivatives PyTorch returns in double precision."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.deterministic("y", 2.0 * z[0] + z[1] * z[2])

    with pytest.warns(PrecisionWarning):
        _, samples = run(model, {"y": torch.tensor(1.2)}, num_samples=5, warmup_steps=5)
    z = samples["z"]
    assert z.dtype == torch.float32
    torch.testing.assert_close(
        2 * z[..., 0] + z[..., 1] * z[..., 2], torch.full(z.shape[:-1], 1.2), rtol=0, atol=5e-4
    )


def test_a_step_size_that_collapses_is_warned_of() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.deterministic("y", z.sum())
        pyro.sample("precise", dist.Normal(z[0], 1e-7), obs=torch.tensor(0.5))

    start = {"z": torch.tensor([[0.5, 0.0, 0.5]]).repeat(2, 1)}
    with pytest.warns(SamplingWarning, match=r"step size was adapted to .*e-.*far better than"):
        run(model, {"y": _ONE}, initial_params=start, warmup_steps=20)


def test_outputs_of_two_precisions_run_in_the_higher_one() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(3, dtype=torch.float32), 1.0).to_event(1))
        pyro.deterministic("low", x.sum())
        pyro.deterministic("high", x[0].double() * x[1])

    _, samples = run(model, {"low": _ONE.float(), "high": _ONE})
    x = samples["x"]
    assert x.dtype == torch.float64
    torch.testing.assert_close(x.sum(-1), torch.ones(2, 3), rtol=0, atol=1e-8)
    torch.testing.assert_close(x[..., 0] * x[..., 1], torch.ones(2, 3), rtol=0, atol=1e-8)


def test_chains_without_a_start_of_their_own_borrow_one() -> None:
    """A chain that the given value leads astray and whose other draws fail is reported."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        # starts below zero slide to the wrong side and stay there
        pyro.deterministic("y", z[0].exp() * torch.where(z[1] > -0.5, 1.0, -1.0) + 0 * z[1])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, samples = run(model, {"y": _ONE}, num_chains=32, num_samples=1, warmup_steps=0)
    messages = [str(w.message) for w in caught if w.category is SamplingWarning]
    assert re.match(r"Chains \[.*\] found no inputs of their own", messages[0])
    assert (samples["z"][..., 1] > -0.5).all()
