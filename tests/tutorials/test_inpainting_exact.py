"""The tutorial on exact in-painting: decoder, its weights, training and figures."""

import io
import math
from pathlib import Path
from types import ModuleType

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC

from pyro_ext import MCMC, ConstrainedHMC, lift_observations
from tests.statistics import assert_moments
from tests.tutorials.conftest import load_siblings


@pytest.fixture(scope="module")
def modules() -> list[ModuleType]:
    return load_siblings("inpainting_exact", "vae", "train")


@pytest.fixture(scope="module")
def vae(modules: list[ModuleType]) -> ModuleType:
    return modules[0]


@pytest.fixture(scope="module")
def train(modules: list[ModuleType]) -> ModuleType:
    return modules[1]


@pytest.fixture(scope="module")
def comparison() -> ModuleType:
    pytest.importorskip("arviz")
    return load_siblings("inpainting_exact", "comparison")[0]


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    pytest.importorskip("matplotlib")
    return load_siblings("inpainting_exact", "figures")[0]


def test_shipped_decoder_explains_images_it_has_not_seen(vae: ModuleType) -> None:
    """The latent vector that fits best leaves no more than the noise that was learned."""
    decoder, x = vae.load_decoder(), vae.images().test[:50]
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    noise = float(decoder.log_scale.exp())
    assert 0.03 < noise < 0.2
    z = torch.zeros(50, vae.LATENT_SIZE, requires_grad=True)
    optimizer = torch.optim.Adam([z], 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        energy = 0.5 * ((x - decoder(z)) / noise).square().sum() + 0.5 * z.square().sum()
        energy.backward()
        optimizer.step()
    with torch.no_grad():
        error = (x - decoder(z)).square().mean().sqrt()
    assert error < 1.3 * noise
    assert z.square().mean() < 3


def test_weights_survive_a_round_trip(vae: ModuleType, tmp_path: Path) -> None:
    decoder = vae.Decoder()
    vae.save_decoder(decoder, tmp_path / "weights.npz")
    again = vae.load_decoder(tmp_path / "weights.npz")
    z = torch.randn(3, vae.LATENT_SIZE)
    torch.testing.assert_close(again(z), decoder(z).detach(), rtol=1e-5, atol=1e-5)


def test_bound_is_below_the_evidence_and_reaches_it(train: ModuleType, vae: ModuleType) -> None:
    """For a linear decoder the posterior is normal, and the bound is tight where it is met."""
    torch.manual_seed(0)
    matrix, noise = 0.5 * torch.randn(64, vae.LATENT_SIZE), 0.3
    x = torch.randn(5, 64)
    precision = torch.eye(vae.LATENT_SIZE) + matrix.T @ matrix / noise**2
    covariance = torch.linalg.inv(precision)
    # a diagonal posterior: rotate the latents to the eigenvectors of the covariance
    variances, vectors = torch.linalg.eigh(covariance)
    matrix = matrix @ vectors
    mean = (x @ matrix / noise**2) * variances

    class Linear(torch.nn.Module):
        log_scale = torch.tensor(math.log(noise))

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return z @ matrix.T

    evidence = pyro.distributions.LowRankMultivariateNormal(
        torch.zeros(64), matrix, torch.full((64,), noise**2)
    ).log_prob(x)
    decoder = Linear()
    tight = torch.stack(
        [
            train.elbo(lambda _: (mean, variances.sqrt().expand(5, -1)), decoder, x)
            for _ in range(4000)
        ]
    )
    error = tight.std(0) / math.sqrt(len(tight))
    assert ((tight.mean(0) - evidence).abs() < 5 * error).all()
    loose = torch.stack(
        [
            train.elbo(lambda _: (mean + 0.1, variances.sqrt().expand(5, -1)), decoder, x)
            for _ in range(500)
        ]
    )
    assert (loose.mean(0) < evidence).all()


def test_training_raises_the_bound(train: ModuleType) -> None:
    state = torch.get_rng_state()
    *_, early = train.train(5)
    *_, late = train.train(150)
    torch.set_rng_state(state)
    assert late > early + 20


def test_model_observes_the_pixels_of_the_mask(vae: ModuleType) -> None:
    decoder, mask = vae.load_decoder(), torch.arange(64) % 3 == 0
    pixels = torch.rand(int(mask.sum()))
    trace = pyro.poutine.trace(vae.model).get_trace(decoder, mask, pixels)
    site = trace.nodes["pixels"]
    assert site["is_observed"]
    mean = decoder(trace.nodes["z"]["value"])
    torch.testing.assert_close(site["fn"].base_dist.loc, mean[mask])
    torch.testing.assert_close(site["fn"].base_dist.scale[0], decoder.log_scale.exp())
    other = pyro.poutine.trace(vae.model).get_trace(decoder, mask, pixels, 0.01)
    assert float(other.nodes["pixels"]["fn"].base_dist.scale[0]) == 0.01


def test_lifted_pixels_have_the_posterior_of_a_linear_decoder(vae: ModuleType) -> None:
    """With a linear decoder the answer is known."""
    matrix = 0.4 * torch.randn(64, vae.LATENT_SIZE)

    class Linear(torch.nn.Module):
        log_scale = torch.tensor(math.log(0.2))

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return z @ matrix.T

    mask = torch.arange(64) < 6
    x = matrix[:6] @ torch.randn(vae.LATENT_SIZE)

    def observed() -> None:
        vae.model(Linear(), mask, x)

    kernel = ConstrainedHMC(lift_observations(observed))
    mcmc = MCMC(kernel, 100, 60, num_chains=8, disable_progbar=True)
    mcmc.run()
    covariance = torch.linalg.inv(torch.eye(vae.LATENT_SIZE) + matrix[:6].T @ matrix[:6] / 0.2**2)
    draws = mcmc.get_samples(group_by_chain=True)["z"]
    mean = covariance @ matrix[:6].T @ x / 0.2**2
    assert_moments(draws, mean, covariance.diag().sqrt(), min_ess=200, name="z")


def test_figures_are_drawn(figures: ModuleType) -> None:
    mask, cost = torch.arange(64) < 32, 1 + torch.rand(3, 2)
    drawn = [
        figures.images_figure({"a": torch.rand(12, 64), "b": torch.rand(6, 64)}, mask, 6),
        figures.cost_figure({name: {0.1: cost, 0.01: 2 * cost} for name in "ab"}),
    ]
    for figure in drawn:
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=40)
        assert file.getvalue().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="images of 'a' must have shape"):
        figures.images_figure({"a": torch.rand(5, 64)}, mask, 6)


def _line() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(0.5))


def test_one_gradient_per_step_is_counted(comparison: ModuleType) -> None:
    """By what the kernel says, and where it says nothing by runs of the model."""
    fixed = {"step_size": 0.2, "adapt_step_size": False}
    run = comparison.counted_run(
        lambda model: HMC(model, num_steps=5, adapt_mass_matrix=False, **fixed), _line, 7, 3
    )
    assert run.gradients == 7 * 5
    run = comparison.counted_run(
        lambda model: ConstrainedHMC(lift_observations(model), num_steps=4, jitter=0.0, **fixed),
        _line, 7, 3, 2,
    )  # fmt: skip
    assert run.gradients == 2 * 7 * 4
    assert run.z.shape == (2, 7, 2)
    assert 0 < run.seconds < run.seconds_in_all


def test_the_worst_latent_counts(comparison: ModuleType) -> None:
    z = torch.randn(4, 200, 3)
    assert comparison.smallest_ess(z) > 300
    z[..., 1] = z[..., 1].cumsum(1)
    assert comparison.smallest_ess(z) < 50
