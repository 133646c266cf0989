"""The runner against stock Pyro's: arguments, results, hooks, and kernels that are not ours."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_ext import MCMC, ConstrainedHMC


class Counter(MCMCKernel):
    """Draws ``b, b + 1, ...`` at site ``b``, and twice that at site ``a``."""

    def __init__(self) -> None:
        self.transforms: dict[str, Any] = {}
        self.model = None
        self.cleanups = 0
        self.setups: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []
        self._params = {"b": torch.tensor(0.0), "a": torch.tensor(0.0)}

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        self.setups.append((warmup_steps, args, kwargs))

    @property
    def initial_params(self) -> dict[str, Tensor]:
        return self._params

    @initial_params.setter
    def initial_params(self, params: Mapping[str, Tensor]) -> None:
        self._params = dict(params)

    def sample(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        b = params["b"] + 1
        return {"b": b, "a": 2 * b}

    def logging(self) -> OrderedDict[str, str]:
        return OrderedDict()

    def diagnostics(self) -> dict[str, Any]:
        return {"divergences": [1], "chain number": len(self.setups)}

    def cleanup(self) -> None:
        self.cleanups += 1


def count(**settings: Any) -> tuple[Counter, MCMC]:
    kernel = Counter()
    settings = {"num_samples": 5, "warmup_steps": 2, "chain_method": "sequential", **settings}
    mcmc = MCMC(kernel, disable_progbar=True, **settings)
    mcmc.run("argument", key="word")
    return kernel, mcmc


def test_draws_after_warm_up_are_kept_in_order() -> None:
    kernel, mcmc = count()
    samples = mcmc.get_samples()
    assert samples["b"].tolist() == [3.0, 4.0, 5.0, 6.0, 7.0]
    assert samples["a"].tolist() == [6.0, 8.0, 10.0, 12.0, 14.0]
    assert kernel.setups == [(2, ("argument",), {"key": "word"})]
    assert kernel.cleanups == 1


@pytest.mark.parametrize("names", [["b", "a"], ["a", "b"], ["b"], "b"], ids=str)
def test_saved_sites_keep_their_values_in_any_order(names: str | list[str]) -> None:
    _, mcmc = count(save_params=names)
    samples = mcmc.get_samples()
    assert set(samples) == set(names)
    assert samples["b"].tolist() == [3.0, 4.0, 5.0, 6.0, 7.0]
    if "a" in names:
        torch.testing.assert_close(samples["a"], 2 * samples["b"])


def test_chains_in_turn_start_from_their_own_values() -> None:
    start = {"b": torch.tensor([0.0, 100.0, 200.0]), "a": torch.zeros(3)}
    kernel, mcmc = count(num_chains=3, initial_params=start)
    b = mcmc.get_samples(group_by_chain=True)["b"]
    assert b[:, 0].tolist() == [3.0, 103.0, 203.0]
    assert mcmc.get_samples()["b"].shape == (15,)
    assert mcmc.diagnostics()["chain number"] == {"chain 0": 1, "chain 1": 2, "chain 2": 3}
    assert kernel.cleanups == 3


def test_resampled_draws_come_from_the_run() -> None:
    _, mcmc = count()
    drawn = mcmc.get_samples(num_samples=40)
    assert drawn["b"].shape == (40,)
    assert set(drawn["b"].tolist()) <= {3.0, 4.0, 5.0, 6.0, 7.0}
    torch.testing.assert_close(drawn["a"], 2 * drawn["b"])


def test_warm_up_defaults_to_the_number_of_draws() -> None:
    kernel, _ = count(warmup_steps=None)
    assert kernel.setups[0][0] == 5


@pytest.mark.parametrize("num_chains", [1, 2])
def test_hooks_see_every_draw(num_chains: int) -> None:
    seen: list[tuple[str, int, float]] = []

    def hook(kernel: Any, params: Mapping[str, Tensor], stage: str, i: int) -> None:
        seen.append((stage, i, float(params["b"])))

    count(num_samples=2, hook_fn=hook, num_chains=num_chains)
    labels = [""] if num_chains == 1 else [" [1]", " [2]"]
    expected = [
        (stage + label, i, value)
        for label in labels
        for stage, i, value in [
            ("Warmup", 0, 1.0), ("Warmup", 1, 2.0), ("Sample", 0, 3.0), ("Sample", 1, 4.0)
        ]
    ]  # fmt: skip
    assert seen == expected


def test_transforms_are_undone() -> None:
    transform = torch.distributions.transforms.AffineTransform(1.0, 2.0)
    _, mcmc = count(transforms={"b": transform})
    assert mcmc.get_samples()["b"].tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert mcmc.get_samples()["a"].tolist() == [6.0, 8.0, 10.0, 12.0, 14.0]


@pytest.mark.parametrize("disable", [True, False, None])
def test_validation_during_a_run(disable: bool | None) -> None:
    seen = []

    def hook(*args: Any) -> None:
        seen.append(torch.distributions.Distribution._validate_args)

    with pyro.validation_enabled(True):
        count(disable_validation=disable, hook_fn=hook)
        assert torch.distributions.Distribution._validate_args
    assert set(seen) == {not disable}


def test_diagnostics_of_the_draws_are_those_of_pyro() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.deterministic("y", z.sum())

    kernel = ConstrainedHMC(pyro.condition(model, {"y": torch.tensor(1.0)}), num_steps=2)
    mcmc = MCMC(kernel, 20, 5, num_chains=4, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)["z"]
    from pyro.infer.mcmc.util import diagnostics as reference

    ours, theirs = mcmc.diagnostics()["z"], reference({"z": draws})["z"]
    torch.testing.assert_close(dict(ours), dict(theirs))
    assert {f"chain {i}" for i in range(4)} == mcmc.diagnostics()["status"].keys()


def test_two_draws_are_too_few_for_an_effective_sample_size() -> None:
    _, mcmc = count(num_samples=2)
    assert mcmc.diagnostics() == {
        "divergences": {"chain 0": [1]},
        "chain number": {"chain 0": 1},
    }


def test_the_printed_summary(capsys: pytest.CaptureFixture[str]) -> None:
    _, mcmc = count()
    mcmc.summary(prob=0.5)
    printed = capsys.readouterr().out
    assert "25.0%" in printed
    assert "Number of divergences: 1" in printed


def test_the_printed_summary_of_some_sites(capsys: pytest.CaptureFixture[str]) -> None:
    _, mcmc = count()
    mcmc.summary(sites=["b"])
    names = {
        line.split("[")[0].split()[0] for line in capsys.readouterr().out.splitlines() if line
    }
    assert "b" in names
    assert "a" not in names
    with pytest.raises(ValueError, match=r"no draws of \['c'\], only of \['a', 'b'\]"):
        mcmc.summary(sites=["b", "c"])
    with pytest.raises(ValueError, match=r"no draws of \['ab'\]"):
        mcmc.summary(sites="ab")
    with pytest.raises(ValueError, match=r"prob must lie in \(0, 1\), got 90"):
        mcmc.summary(prob=90)


@pytest.mark.parametrize("method", ["get_samples", "diagnostics", "summary"])
def test_results_before_a_run_are_an_error(method: str) -> None:
    mcmc = MCMC(Counter(), 5)
    with pytest.raises(RuntimeError, match=r"no samples yet: call MCMC\.run"):
        getattr(mcmc, method)()


def test_a_summary_line_is_written_where_there_is_a_progress_bar(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.deterministic("y", z.sum())

    conditioned = pyro.condition(model, {"y": torch.tensor(1.0)})
    for disable in (False, True):
        kernel = ConstrainedHMC(conditioned, num_steps=2, adapt_step_size=False)
        MCMC(kernel, 3, 0, disable_progbar=disable).run()
        out, err = capsys.readouterr()
        assert ("1 chain x 3 draws" in out + err) == (not disable)


def test_nuts_in_turn_gives_the_draws_of_stock_pyro() -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        pyro.sample("x", dist.Normal(0.0, scale), obs=torch.tensor(1.0))

    def draws(runner: Any, **settings: Any) -> Tensor:
        pyro.set_rng_seed(3)
        mcmc = runner(
            pyro.infer.NUTS(model),
            num_samples=10,
            warmup_steps=5,
            disable_progbar=True,
            **settings,
        )
        mcmc.run()
        assert 0 < mcmc.diagnostics()["acceptance rate"]["chain 0"] <= 1
        return mcmc.get_samples()["scale"]

    ours = draws(MCMC, chain_method="sequential")
    assert torch.equal(ours, draws(pyro.infer.MCMC))
    assert torch.equal(ours, draws(MCMC))  # "parallel", with one chain
    assert (ours > 0).all()
    assert math.isfinite(float(ours.mean()))
