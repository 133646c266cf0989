import io
import itertools
import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import NUTS, Predictive
from torch import nn

from pyro_ext import MCMC, NeuralPosteriorEstimator, NeuralRatioEstimator, NeuralSplineFlow
from pyro_ext.diagnostics import classifier_two_sample_test, simulation_based_calibration
from pyro_ext.infer.contrastive import Simulations
from pyro_ext.infer.contrastive import estimator as estimator_module
from tests.infer.contrastive.problems import (
    ESTIMATORS,
    SMALL_FLOW,
    Counting,
    linear_gaussian,
    make,
    sites_of_all_kinds,
    two_moons,
    two_moons_log_posterior,
)

NOISE_SITES = ["angle", "radius"]


def _exact_two_moons(num: int) -> torch.Tensor:
    """Exact draws given x = 0: the crescent, on one side or the other."""
    angle = (torch.rand(2 * num) - 0.5) * math.pi
    radius = 0.1 + 0.01 * torch.randn(2 * num)
    u = (radius * angle.cos() + 0.25) * (2 * torch.randint(2, (2 * num,)) - 1)
    v = -radius * angle.sin()
    return torch.stack([u - v, u + v], 1)[radius * angle.cos() + 0.25 > 0][:num] / math.sqrt(2)


@pytest.mark.slow
def test_two_moons() -> None:
    estimator = NeuralPosteriorEstimator(two_moons, observed=["x"], nuisance=NOISE_SITES)
    estimator.simulate(2000)
    estimator.fit()
    posterior = estimator.posterior(torch.zeros(2))
    draws = posterior.sample(1000)["theta"]
    exact = _exact_two_moons(1000)
    # both crescents, evenly
    right = float((draws.sum(1) > 0).double().mean())
    assert abs(right - 0.5) < 0.15
    accuracy = classifier_two_sample_test(exact, draws).accuracy
    assert accuracy < 0.65
    # the divergence from the exact density in nats, beside that of the prior
    log_prob = posterior.log_prob({"theta": exact}).detach()
    divergence = two_moons_log_posterior(exact) - log_prob
    assert float(divergence.mean()) < 1.0
    prior = two_moons_log_posterior(exact) - math.log(0.25)
    assert float(prior.mean()) > 3.0


def _one_latent() -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(theta, 1.0))


@pytest.mark.filterwarnings("ignore:The observation is far outside")
@pytest.mark.parametrize("kind", ["ratio", "posterior"])
def test_calibration_on_linear_gaussian(kind: str) -> None:
    estimator = make(kind, _one_latent)
    estimator.simulate(2000)
    estimator.fit(num_epochs=15)
    options: dict[str, Any] = (
        {"method": "importance", "num_draws": 2000} if kind == "ratio" else {}
    )
    result = simulation_based_calibration(
        _one_latent,
        lambda observation: estimator.posterior(observation).sample(49, **options),
        observed="x",
        num_simulations=150,
        disable_progbar=True,
    )
    assert result.p_value > 0.01, result.summary()
    # ranks alone do not see a posterior that ignores the data
    means = [
        float(estimator.posterior(torch.tensor(x)).sample(500, **options)["theta"].mean())
        for x in (-1.0, 1.0)
    ]
    assert means == pytest.approx([-0.5, 0.5], abs=0.2)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_weights_and_simulations_are_saved_loaded_and_added_to(kind: str) -> None:
    estimator = make(kind, linear_gaussian)
    estimator.simulate(300)
    estimator.fit(num_epochs=1)
    file = io.BytesIO()
    assert estimator.simulations is not None
    torch.save((estimator.state_dict(), estimator.simulations._asdict()), file)
    file.seek(0)
    weights, simulations = torch.load(file, weights_only=True)
    other = make(kind, linear_gaussian)
    other.load_state_dict(weights)
    x = torch.tensor([0.3, 0.2])
    latents = estimator.posterior(x).sample(3)
    expected = estimator.posterior(x).log_prob(latents)
    torch.testing.assert_close(other.posterior(x).log_prob(latents), expected)
    loaded = Simulations(**simulations)
    other.add_simulations(loaded.latents, loaded.observations)
    other.simulate(100)
    assert other.simulations is not None
    assert other.simulations.is_valid.shape == (400,)
    other.add_simulations(loaded.latents, loaded.observations, from_prior=False)
    assert other.simulations.round.unique(return_counts=True)[1].tolist() == [400, 300]
    loc = other.loc.clone()
    other.fit(num_epochs=1)
    # what the networks were trained with stays
    assert torch.equal(other.loc, loc)


def test_interrupted_fit_goes_on_where_it_was(tmp_path: Path) -> None:
    def fit(checkpoint: Path | None, *, interrupt: bool) -> torch.Tensor:
        torch.manual_seed(2)
        estimator = NeuralRatioEstimator(linear_gaussian, observed=["x"], hidden_features=16)
        estimator.simulate(300)
        if interrupt:
            calls = iter(range(1000))
            loss = estimator.loss

            def interrupted(*args: Any) -> torch.Tensor:
                if next(calls) == 13:
                    raise KeyboardInterrupt
                return loss(*args)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(estimator, "loss", interrupted)
                with pytest.warns(UserWarning, match="Interrupted"):
                    estimator.fit(num_epochs=8, batch_size=50, checkpoint=checkpoint)
        estimator.fit(num_epochs=8, batch_size=50, checkpoint=checkpoint)
        return torch.cat([p.detach().reshape(-1) for p in estimator.parameters()])

    uninterrupted = fit(None, interrupt=False)
    resumed = fit(tmp_path / "fit.pt", interrupt=True)
    torch.testing.assert_close(resumed, uninterrupted)


@pytest.mark.parametrize("num_atoms", [2, 30])
def test_embedding_runs_once_per_observation(num_atoms: int) -> None:
    network = Counting(2, 5)
    estimator = NeuralRatioEstimator(
        linear_gaussian, observed=["x"], embedding=network, num_atoms=num_atoms
    )
    before = [p.clone() for p in network.parameters()]
    estimator.simulate(200)
    network.rows = 0
    result = estimator.fit(num_epochs=1, batch_size=30, validation_fraction=0.1)
    assert network.rows == len(result.losses) * 30 + 20
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    network.rows = 0
    estimator.posterior(torch.zeros(2)).sample(50)
    assert network.rows == 1


def test_several_sites_of_all_kinds(recwarn: pytest.WarningsRecorder) -> None:
    estimator = NeuralPosteriorEstimator(
        sites_of_all_kinds,
        observed=["x", "count"],
        nuisance=["noi*"],
        embedding={"count": nn.Linear(2, 4)},
        flow=SMALL_FLOW,
        vectorize="plate",
        num_atoms=4,
    )
    assert estimator.encoder.out_features == 3 + 4
    estimator.simulate(300)
    estimator.fit(num_epochs=1, batch_size=100)
    x = {"x": torch.tensor([0.3, 0.3, 0.4]), "count": torch.tensor([1, 0])}
    posterior = estimator.posterior(x)
    estimator.simulate(300, posterior)
    estimator.fit(num_epochs=1, batch_size=100)
    draws = estimator.posterior(x).sample(20)
    assert {name: value.shape for name, value in draws.items()} == {
        "rate": (20,),
        "weights": (20, 3),
        "level": (20, 2),
    }
    assert posterior.log_prob(draws).isfinite().all()
    for parallel in (True, False):
        predictive = Predictive(
            sites_of_all_kinds, guide=posterior, num_samples=6, parallel=parallel
        )
        predicted = predictive()
        assert predicted["count"].reshape(6, -1).shape == (6, 2)
        assert (predicted["weights"].sum(-1) - 1).abs().max() < 1e-6
    trace = pyro.poutine.trace(posterior).get_trace()
    trace.compute_log_prob()
    values = {name: trace.nodes[name]["value"][None] for name in draws}
    torch.testing.assert_close(trace.log_prob_sum(), posterior.log_prob(values).squeeze())


def test_starting_points_of_a_sampler() -> None:
    x = torch.tensor([0.3, 0.2])
    estimator = NeuralPosteriorEstimator(linear_gaussian, observed=["x"], flow=SMALL_FLOW)
    estimator.simulate(300)
    estimator.fit(num_epochs=2)
    posterior = estimator.posterior(x)
    assert set(posterior.initial_params()) == {"first", "second"}
    starts = posterior.initial_params(2)
    mcmc = MCMC(
        NUTS(pyro.condition(linear_gaussian, {"x": x})),
        3,
        3,
        initial_params=starts,
        num_chains=2,
        chain_method="sequential",
        disable_progbar=True,
    )
    mcmc.run()
    assert mcmc.get_samples(group_by_chain=True)["first"].shape == (2, 3)
    nuisance = NeuralPosteriorEstimator(
        two_moons, observed=["x"], nuisance=NOISE_SITES, flow=SMALL_FLOW
    )
    nuisance.simulate(300)
    nuisance.fit(num_epochs=1)
    starts = nuisance.posterior(torch.zeros(2)).initial_params(3)
    assert {name: value.shape for name, value in starts.items()} == {
        "theta": (3, 2),
        "angle": (3,),
        "radius": (3,),
    }


def _box() -> None:
    theta = pyro.sample("theta", dist.Uniform(0.0, 1.0))
    pyro.sample("x", dist.Normal(theta, 1.0))


def test_nothing_leaks_unless_asked_for() -> None:
    rates = {}
    for support in ("transform", "reject"):
        estimator = NeuralPosteriorEstimator(
            _box, observed=["x"], support=support, flow=SMALL_FLOW
        )
        estimator.simulate(1000)
        estimator.fit(num_epochs=5, batch_size=100)
        posterior = estimator.posterior(torch.tensor(1.5))
        theta = posterior.sample(2000)["theta"]
        assert bool(((theta >= 0) & (theta <= 1)).all())
        rates[support] = posterior.acceptance_rate()
        grid = torch.linspace(0.0005, 0.9995, 1000)
        mass = posterior.log_prob({"theta": grid}).detach().exp().mean()
        assert float(mass) == pytest.approx(1.0, abs=0.05)
        # p(theta | x) on the box has mean 0.582
        assert abs(float(theta.mean()) - 0.582) < 0.07
        if support == "reject":
            outside = posterior.log_prob({"theta": torch.tensor([-0.1, 1.1])})
            assert (outside == -math.inf).all()
    assert rates["transform"] == 1.0
    assert 0.5 < rates["reject"] < 0.99


def test_validation_holds_out_its_share_of_every_round() -> None:
    estimator = NeuralRatioEstimator(linear_gaussian, observed=["x"], hidden_features=16)
    estimator.simulate(300)
    result = estimator.fit(num_epochs=2, batch_size=90)
    assert len(result.losses) == 2 * 3
    assert result.validation_steps.tolist() == [3, 6]


def test_what_was_held_out_once_is_not_trained_on_in_further_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(flow: nn.Module, train: torch.Tensor, **settings: Any) -> None:
        parts.append((train, settings["validation"][0]))

    monkeypatch.setattr(estimator_module, "fit_density", record)
    estimator = NeuralRatioEstimator(linear_gaussian, observed=["x"], hidden_features=16)
    for num in (300, 107, 1):
        estimator.simulate(num)
        estimator.fit(batch_size=90, validation_fraction=0.15)
    assert [len(held_out) for _, held_out in parts] == [45, 62, 62]
    for (train, held_out), (later, later_held_out) in itertools.pairwise(parts):
        assert torch.isin(held_out[:, 0], later_held_out[:, 0]).all()
        assert torch.isin(train[:, 0], later[:, 0]).all()
        assert not torch.isin(held_out[:, 0], later[:, 0]).any()


def test_steps_of_a_fit_by_default() -> None:
    estimator = make("posterior", linear_gaussian)
    estimator.num_steps, estimator.num_further_steps = 24, 12
    estimator.simulate(2000)
    first = estimator.fit()
    # ten minibatches of 180
    assert len(first.losses) == 30
    estimator.simulate(2000)
    assert len(estimator.fit().losses) == 30
    estimator.simulate(300, estimator.posterior(torch.zeros(2)))
    assert len(estimator.fit().losses) == 20
    few = make("ratio", linear_gaussian, num_atoms=120)
    few.num_steps = 5
    few.simulate(150)
    assert len(few.fit().losses) == 5
    hardly_any = make("posterior", linear_gaussian)
    hardly_any.num_steps = 5
    hardly_any.simulate(60)
    assert len(hardly_any.fit().losses) == 5


def test_few_simulations_are_learned_in_smaller_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[float] = []
    monkeypatch.setattr(
        "pyro_ext.infer.contrastive.estimator.fit_density",
        lambda *args, learning_rate, **settings: sizes.append(learning_rate),
    )
    estimator = make("ratio", linear_gaussian)
    for num in (200, 800, 1000):
        estimator.simulate(num)
        estimator.fit()
    own = make("ratio", linear_gaussian)
    own.learning_rate = 2e-3  # as with an embedding
    own.simulate(200)
    own.fit()
    assert sizes == [0.2 * 2e-2, 2e-2, 2e-2, 2e-3]


def test_single_precision(float32: None) -> None:
    for kind in ESTIMATORS:
        estimator = make(kind, two_moons, nuisance=NOISE_SITES)
        estimator.simulate(300)
        estimator.fit(num_epochs=1)
        draws = estimator.posterior(torch.zeros(2)).sample(5)
        assert draws["theta"].dtype == torch.float32


def test_own_networks() -> None:
    estimator = NeuralPosteriorEstimator(
        linear_gaussian,
        observed=["x"],
        flow=lambda d, e: NeuralSplineFlow(d, e, transforms=1, coupling=False, spline="affine"),
    )
    assert "affine" in repr(estimator.flow).lower()

    class Bilinear(nn.Module):
        def __init__(self, features: int, context: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(features, context))

        def forward(self, u: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
            return ((u @ self.weight) * e).sum(-1, keepdim=True)

    ratio = NeuralRatioEstimator(linear_gaussian, observed=["x"], network=Bilinear)
    ratio.simulate(300)
    ratio.fit(num_epochs=1)
    assert bool(next(ratio.parameters()).any())
    # smaller steps for what nothing is known of
    embedded = make("posterior", linear_gaussian, embedding=nn.Linear(2, 3))
    rates = [e.learning_rate for e in (make("ratio", linear_gaussian), ratio, embedded)]
    assert rates[0] > rates[1] == rates[2]
