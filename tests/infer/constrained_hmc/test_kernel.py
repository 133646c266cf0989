"""The kernel under stock Pyro's runner: protocol, reuse, pickling, interruption, adaptation."""

import json
import pickle
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from torch import Tensor

from pyro_ext import MCMC, ConstrainedHMC
from pyro_ext.errors import SamplingWarning
from pyro_ext.infer.constrained_hmc import Status

# runs this short are not good ones
pytestmark = pytest.mark.filterwarnings("ignore::pyro_ext.errors.SamplingWarning")

_Y = torch.tensor([0.5, 1.0], dtype=torch.float64)


def model(shift: float = 0.0) -> None:
    """At module level, so that it can be pickled."""
    a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.deterministic("y", z[:2] * a + z[2] + shift)


CONDITIONED = pyro.condition(model, {"y": _Y})


def circle() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.deterministic("r", z.norm())


def residual(samples: dict[str, Tensor], shift: float = 0.0) -> float:
    a, z = samples["a"].unsqueeze(-1), samples["z"]
    return float((z[..., :2] * a + z[..., 2:] + shift - _Y).abs().max())


def stock(kernel: ConstrainedHMC, **settings: Any) -> pyro.infer.MCMC:
    settings = {"num_samples": 8, "warmup_steps": 5, "disable_progbar": True, **settings}
    return pyro.infer.MCMC(kernel, **settings)


def test_protocol_of_stock_pyro() -> None:
    kernel = ConstrainedHMC(CONDITIONED)
    mcmc = stock(kernel)
    mcmc.run(0.25)
    samples = mcmc.get_samples()
    assert {name: tuple(value.shape) for name, value in samples.items()} == {
        "a": (8,),
        "z": (8, 3),
    }
    assert residual(samples, 0.25) <= 1e-8
    diagnostics = mcmc.diagnostics()
    assert {"divergences", "acceptance rate", "status", "energy"} <= diagnostics.keys()
    assert diagnostics["num_steps"]["chain 0"].shape == (8,)
    mcmc.summary()


def test_keyword_arguments_reach_the_model() -> None:
    mcmc = stock(ConstrainedHMC(CONDITIONED), num_samples=2, warmup_steps=0)
    mcmc.run(shift=-1.0)
    assert residual(mcmc.get_samples(), -1.0) <= 1e-8


def test_a_kernel_can_be_used_again() -> None:
    """With another number of draws and other data, and with nothing left of the first run."""
    kernel = ConstrainedHMC(CONDITIONED)
    first = stock(kernel, num_samples=12)
    first.run()
    second = stock(kernel, num_samples=4)
    second.run(2.0)
    assert residual(second.get_samples(), 2.0) <= 1e-8
    assert second.diagnostics()["status"]["chain 0"].shape == (4,)
    assert kernel.step_size == 0.5, "the argument is where adaptation starts, not where it ends"
    ours = MCMC(kernel, 3, 2, num_chains=4, disable_progbar=True)
    ours.run()
    assert ours.get_samples(group_by_chain=True)["z"].shape == (4, 3, 3)
    third = stock(kernel, num_samples=4)
    kernel.num_chains = None
    third.run()
    assert third.get_samples()["z"].shape == (4, 3)


def test_the_same_seed_gives_the_same_draws() -> None:
    def draws(seed: int) -> Tensor:
        pyro.set_rng_seed(seed)
        mcmc = MCMC(ConstrainedHMC(CONDITIONED), 5, 5, num_chains=3, disable_progbar=True)
        mcmc.run()
        return mcmc.get_samples()["z"]

    first = draws(1)
    assert torch.equal(first, draws(1))
    assert not torch.equal(first, draws(2))


def test_pickling_before_and_after_a_run() -> None:
    kernel = ConstrainedHMC(CONDITIONED, jitter=0.2, num_steps=3, target_accept_prob=0.7)
    for _ in range(2):
        copy = pickle.loads(pickle.dumps(kernel))
        assert (copy.jitter, copy.num_steps, copy.target_accept_prob) == (0.2, 3, 0.7)
        assert copy.diagnostics()["divergences"] == []
        mcmc = stock(copy, num_samples=3, warmup_steps=2)
        mcmc.run()
        assert residual(mcmc.get_samples()) <= 1e-8
        stock(kernel, num_samples=3, warmup_steps=2).run()
    # pickling took nothing away from the original
    assert kernel.chain_diagnostics()[0]["status"].shape == (3,)


def test_initial_params_survive_pickling() -> None:
    kernel = ConstrainedHMC(CONDITIONED)
    start = {"a": torch.tensor(2.0), "z": torch.tensor([0.25, 0.5, 0.0])}
    kernel.initial_params = start
    copy = pickle.loads(pickle.dumps(kernel))
    copy.setup(0)
    torch.testing.assert_close(copy.initial_params, start, rtol=0, atol=1e-7)


def test_a_run_leaves_nothing_in_a_pickled_runner() -> None:
    mcmc = stock(ConstrainedHMC(CONDITIONED), num_samples=3, warmup_steps=2)
    mcmc.run()
    copy = pickle.loads(pickle.dumps(mcmc))
    torch.testing.assert_close(copy.get_samples(), mcmc.get_samples())


def test_logging_can_be_written_as_json() -> None:
    """Processes send it to the progress bar that way."""
    kernel = ConstrainedHMC(CONDITIONED)
    kernel.setup(3)
    kernel.sample({})
    assert set(json.loads(json.dumps(kernel.logging()))) == {"step size", "acc. prob", "failed"}


def test_initial_params_round_trip() -> None:
    """Values on the manifold are kept."""
    kernel = ConstrainedHMC(CONDITIONED)
    kernel.setup(0)
    start = kernel.initial_params
    assert residual(start) <= 1e-8
    again = ConstrainedHMC(CONDITIONED)
    again.initial_params = start
    again.setup(0)
    torch.testing.assert_close(again.initial_params, start, rtol=0, atol=1e-7)


def test_initial_params_of_every_chain() -> None:
    kernel = ConstrainedHMC(CONDITIONED)
    kernel.num_chains = 4
    kernel.setup(0)
    start = kernel.initial_params
    seen: list[dict[str, Tensor]] = []
    mcmc = MCMC(
        ConstrainedHMC(CONDITIONED, step_size=1e-6, num_steps=1, adapt_step_size=False),
        num_samples=1,
        warmup_steps=0,
        num_chains=4,
        initial_params=start,
        hook_fn=lambda kernel, params, stage, i: seen.append(params),
        disable_progbar=True,
    )
    mcmc.run()
    torch.testing.assert_close(seen[0], start, rtol=0, atol=1e-4)


@pytest.mark.parametrize("a", [torch.tensor(3), 3, 3.0], ids=["whole tensor", "int", "float"])
def test_initial_params_as_plain_numbers(a: Any) -> None:
    starts = []
    for value in (a, torch.tensor(3.0)):
        kernel = ConstrainedHMC(CONDITIONED)
        initial = {"a": value, "z": torch.tensor([0.01, 0.02, 0.0])}
        pyro.set_rng_seed(0)
        mcmc = MCMC(kernel, 1, 0, initial_params=initial, disable_progbar=True)
        mcmc.run()
        starts.append(mcmc.get_samples())
    torch.testing.assert_close(starts[0], starts[1])


def test_initial_params_are_of_one_run_only() -> None:
    kernel = ConstrainedHMC(CONDITIONED)
    far = {"a": torch.tensor(50.0), "z": torch.tensor([0.01, 0.02, 0.0])}
    stock(kernel, num_samples=1, warmup_steps=0, initial_params=far).run()
    kernel.setup(0)
    assert float(kernel.initial_params["a"]) < 40.0


def test_setup_and_sample_by_hand() -> None:
    kernel = ConstrainedHMC(CONDITIONED)
    kernel.setup(2)
    params = kernel.initial_params
    for _ in range(5):
        params = kernel.sample(params)
        assert params.keys() == {"a", "z"}
        assert not params["z"].requires_grad
    assert len(kernel.chain_diagnostics()[0]["status"]) == 3
    assert "1 chain x 3 draws" in kernel.summary()


def test_what_a_draw_returns_is_not_changed_later() -> None:
    kernel = ConstrainedHMC(CONDITIONED)
    kernel.setup(0)
    first = kernel.sample({})
    copy = {name: value.clone() for name, value in first.items()}
    first["extra"] = torch.zeros(())
    kernel.sample({})
    assert "extra" not in kernel.initial_params
    for name, value in copy.items():
        assert torch.equal(first[name], value)


@pytest.mark.parametrize("cores", [2, 4], ids=["in turn", "at once"])
def test_two_processes(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock Pyro wants a core more than chains, and otherwise runs them in turn."""
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: cores)
    kernel = ConstrainedHMC(CONDITIONED, num_steps=2)
    settings = {"num_chains": 2, "mp_context": "fork", "disable_progbar": True}
    mcmc = MCMC(kernel, 4, 2, chain_method="parallel", **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run()
    in_turn = any("more than available_cpu" in str(w.message) for w in caught)
    assert in_turn == (cores == 2)
    samples = mcmc.get_samples(group_by_chain=True)
    assert samples["z"].shape == (2, 4, 3)
    assert not torch.equal(samples["z"][0], samples["z"][1])
    assert residual(samples) <= 1e-8
    assert mcmc.diagnostics()["status"]["chain 1"].shape == (4,)


# -- interruption --------------------------------------------------------------------------------


@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
def test_an_interrupted_run_keeps_its_draws(chain_method: str) -> None:
    def interrupt(kernel: Any, params: Any, stage: str, i: int) -> None:
        if stage.startswith("Sample") and i == 4:
            raise KeyboardInterrupt

    mcmc = MCMC(
        ConstrainedHMC(CONDITIONED),
        20,
        2,
        num_chains=2,
        chain_method=chain_method,
        hook_fn=interrupt,
        disable_progbar=True,
    )
    with pytest.warns(SamplingWarning, match=r"Interrupted after 5 of 20 draws"):
        mcmc.run()
    samples = mcmc.get_samples(group_by_chain=True)
    assert samples["z"].shape == (2 if chain_method == "vectorized" else 1, 5, 3)
    assert residual(samples) <= 1e-8
    diagnostics = mcmc.diagnostics()
    assert {len(v) for v in diagnostics["status"].values()} == {5}
    assert len(diagnostics["status"]) == len(samples["z"])
    mcmc.summary()


def test_an_interrupt_in_the_middle_of_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of a draw that was not stored are dropped."""
    kernel = ConstrainedHMC(CONDITIONED)
    original, calls = kernel.sample, []

    def sample(params: Any) -> Any:
        result = original(params)
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(kernel, "sample", sample)
    mcmc = MCMC(kernel, 20, 2, num_chains=3, disable_progbar=True)
    with pytest.warns(SamplingWarning, match=r"after 3 of 20"):
        mcmc.run()
    assert mcmc.get_samples(group_by_chain=True)["a"].shape == (3, 3)
    assert mcmc.diagnostics()["energy"]["chain 2"].shape == (3,)


def test_an_interrupt_before_the_first_draw_is_an_interrupt() -> None:
    def interrupt(kernel: Any, params: Any, stage: str, i: int) -> None:
        raise KeyboardInterrupt

    mcmc = MCMC(ConstrainedHMC(CONDITIONED), 5, 2, hook_fn=interrupt, disable_progbar=True)
    with pytest.raises(KeyboardInterrupt):
        mcmc.run()
    with pytest.raises(RuntimeError, match=r"no samples yet"):
        mcmc.get_samples()


# -- adaptation and settings --------------------------------------------------------------------


def curved(radius: float) -> Any:
    return pyro.condition(circle, {"r": torch.tensor(radius)})


@pytest.mark.parametrize("start", [1e-3, 0.1, 3.0])
def test_the_step_size_adapts_to_the_curvature(start: float) -> None:
    """On a small circle steps must be short, from wherever adaptation starts."""
    found = []
    for radius in (0.1, 1.0):
        kernel = ConstrainedHMC(curved(radius), step_size=start, num_steps=1)
        kernel.num_chains = 8
        kernel.setup(30)
        for _ in range(30):
            kernel.sample({})
        found.append(float(kernel._chains.step_size))
    assert 0.01 < found[0] < 0.3
    assert 0.1 < found[1] < 3.0
    assert found[0] < 0.4 * found[1]


def test_without_adaptation_the_step_size_stays() -> None:
    kernel = ConstrainedHMC(CONDITIONED, step_size=0.123, adapt_step_size=False)
    kernel.setup(5)
    for _ in range(6):
        kernel.sample({})
    assert kernel._chains.step_size == 0.123


def test_the_step_size_is_frozen_after_warm_up() -> None:
    kernel = ConstrainedHMC(CONDITIONED)
    kernel.setup(6)
    sizes = []
    for _ in range(12):
        kernel.sample({})
        sizes.append(kernel._chains.step_size)
    assert len(set(sizes[:6])) > 3
    assert len(set(sizes[5:])) == 1


def test_draws_hardly_run_the_model() -> None:
    """Only now and then, to see whether it still has the same sites."""
    runs = 0

    def model() -> None:
        nonlocal runs
        runs += 1
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        x = pyro.sample("x", dist.Normal(0.0, scale).expand([3]).to_event(1))
        pyro.deterministic("y", x.sum())

    kernel = ConstrainedHMC(pyro.condition(model, {"y": torch.tensor(1.0)}))
    kernel.num_chains = 4
    kernel.setup(3)
    before = runs
    draws = [kernel.sample({}) for _ in range(20)]
    assert runs == before + 5  # after draws 1, 2, 4, 8 and 16
    assert not torch.equal(draws[0]["x"], draws[-1]["x"])
    inputs = kernel._chains.point.position * kernel._chains.scale
    for chain, u in enumerate(inputs):
        for name, value in kernel._model.values(u).items():
            torch.testing.assert_close(draws[-1][name][chain], value)


def anisotropic() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    # the data pin the second input down
    pyro.sample("x", dist.Normal(z[1], 0.01), obs=torch.tensor(0.3))
    pyro.deterministic("y", z[0] + z[1] + z[2])


def test_the_mass_matrix_adapts_to_the_posterior() -> None:
    conditioned = pyro.condition(anisotropic, {"y": torch.tensor(1.0)})
    kernel = ConstrainedHMC(conditioned, adapt_mass_matrix=True, max_num_steps=8)
    mcmc = MCMC(kernel, 5, 40, num_chains=16, disable_progbar=True)
    mcmc.run()
    scale = kernel._chains.scale
    assert scale[1] < 0.4
    assert scale[0] > 0.4
    assert scale[2] > 0.4
    # positions are scaled with it
    total = mcmc.get_samples()["z"].sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-8)
    fixed = ConstrainedHMC(conditioned, max_num_steps=8)
    MCMC(fixed, 1, 40, num_chains=16, disable_progbar=True).run()
    assert torch.equal(fixed._chains.scale, torch.ones(3))
    assert kernel._chains.step_size > 1.5 * fixed._chains.step_size


@pytest.mark.parametrize(
    "settings",
    [
        {"projection": "newton"},
        {"num_inner_steps": 3},
        {"jacobian_mode": "forward"},
        {"jacobian_mode": "reverse"},
        {"use_fallback": False},
        {"constraint_tol": 1e-5},
        {"trajectory_length": 0.5},
    ],
    ids=str,
)
def test_every_setting_samples_the_manifold(settings: dict[str, Any]) -> None:
    kernel = ConstrainedHMC(CONDITIONED, **settings)
    mcmc = MCMC(kernel, 6, 6, num_chains=4, disable_progbar=True)
    mcmc.run()
    assert residual(mcmc.get_samples()) <= max(1e-8, settings.get("constraint_tol", 0.0))
    z = mcmc.get_samples(group_by_chain=True)["z"]
    has_moved = (z[:, 1:] - z[:, :-1]).abs().amax((-1, -2)) > 1e-3
    assert int(has_moved.sum()) >= 2


def test_a_discrete_site_is_sampled_out() -> None:
    """End to end, under vmap, without a warning."""

    def mixture() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z[0] + k, 1.0), obs=torch.tensor(0.7))
        pyro.deterministic("y", z.sum())

    kernel = ConstrainedHMC(pyro.condition(mixture, {"y": torch.tensor(1.0)}))
    mcmc = MCMC(kernel, 6, 6, num_chains=4, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples().keys() == {"z"}
    total = mcmc.get_samples()["z"].sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-8)


def test_many_failures_are_warned_of_once() -> None:
    kernel = ConstrainedHMC(
        curved(0.05), step_size=0.5, num_steps=2, adapt_step_size=False, use_fallback=False
    )
    mcmc = MCMC(kernel, 12, 0, num_chains=4, disable_progbar=True)
    with pytest.warns(SamplingWarning, match=r"of the trajectories failed") as caught:
        mcmc.run()
    assert sum("trajectories failed" in str(w.message) for w in caught) == 1
    status = torch.stack(list(mcmc.diagnostics()["status"].values()))
    failed = mcmc.diagnostics()["failed projections"]["chain 0"]
    assert failed == (status[0] == Status.NOT_CONVERGED).nonzero().squeeze(-1).tolist()
