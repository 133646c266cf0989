"""The tutorial on spline flows: its autoencoder and its figures."""

import io
import math
from types import ModuleType
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_ext.distributions import NeuralSplineFlow
from pyro_ext.training import FitResult

MODELS = [
    "normal prior and posterior",
    "Glow (C), affine",
    "RQ-NSF (C)",
    "MAF prior, IAF posterior",
    "RQ-NSF (AR)",
]


def small(autoencoder: ModuleType, name: str, latent_size: int = 3) -> Any:
    """An autoencoder whose layers are away from the identity."""
    vae = autoencoder.build(
        autoencoder.MODELS[name], latent_size=latent_size, transforms=2, hidden_features=8
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return vae


def some_images(n: int) -> Tensor:
    return torch.bernoulli(torch.full((n, 64), 0.4))


def draws_of_guide(vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latent vectors and their log-densities, as the guide's site has them."""
    site = pyro.poutine.trace(vae.guide).get_trace(x)
    site.compute_log_prob()
    return site.nodes["z"]["value"], site.nodes["z"]["unscaled_log_prob"]


# ----------------------------------------------------------------------------------- autoencoder


def test_all_models_of_the_paper_are_there(autoencoder: ModuleType) -> None:
    assert list(autoencoder.MODELS) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_guide_scores_its_draws_by_the_density_of_the_posterior(
    autoencoder: ModuleType, name: str
) -> None:
    vae, x = small(autoencoder, name), some_images(6)
    with torch.no_grad():
        z, log_density = draws_of_guide(vae, x)
        posterior = vae.posterior(vae.encoder(x))
        assert z.shape == (6, 3)
        torch.testing.assert_close(log_density, posterior.log_prob(z), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kl_weight", [1.0, 0.5])
def test_loss_of_pyro_is_the_weighted_bound(
    autoencoder: ModuleType, name: str, kl_weight: float
) -> None:
    vae, x = small(autoencoder, name), some_images(6)
    pyro.set_rng_seed(1)
    with torch.no_grad():
        loss = Trace_ELBO().loss(vae.model, vae.guide, x, kl_weight)
        pyro.set_rng_seed(1)
        z, log_q = draws_of_guide(vae, x)
        logits = vae.decoder(z)
        log_likelihood = (x * logits - torch.nn.functional.softplus(logits)).sum()
        divergence = (log_q - vae.prior().log_prob(z)).sum()
    assert loss == pytest.approx(float(kl_weight * divergence - log_likelihood), rel=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(autoencoder: ModuleType, name: str) -> None:
    vae, x = small(autoencoder, name), some_images(20)
    Trace_ELBO().differentiable_loss(vae.model, vae.guide, x).backward()
    without = [
        key
        for key, parameter in vae.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all()
    ]
    assert not without


@pytest.mark.parametrize("name", ["normal prior and posterior", "RQ-NSF (C)"])
def test_importance_weighting_finds_the_evidence(autoencoder: ModuleType, name: str) -> None:
    vae, x = small(autoencoder, name, latent_size=1), some_images(2)
    axis = torch.linspace(-9, 9, 2001)
    with torch.no_grad():
        logits = vae.decoder(axis.unsqueeze(-1)).unsqueeze(1)
        log_likelihood = (x * logits - torch.nn.functional.softplus(logits)).sum(-1)
        log_joint = log_likelihood + vae.prior().log_prob(axis.unsqueeze(-1)).unsqueeze(-1)
        log_evidence = log_joint.logsumexp(0) + math.log(18 / 2000)
    log_weights = torch.cat([vae.log_weights(x, 500).detach() for _ in range(4)])
    error = (log_weights - log_evidence).exp().std(0) / len(log_weights) ** 0.5
    assert (error < 0.1).all()
    estimate = autoencoder.importance_weighted(vae, x, 1000)
    assert ((estimate - log_evidence).abs() < 5 * 2**0.5 * error + 1e-2).all()
    bound = autoencoder.elbo(vae, x, 1000)
    assert (bound < log_evidence + 5 * log_weights.std(0) / 1000**0.5).all()


def test_number_of_samples_need_not_divide_into_parts(autoencoder: ModuleType) -> None:
    vae, x = small(autoencoder, "RQ-NSF (C)"), some_images(2)
    pyro.set_rng_seed(0)
    values = autoencoder.elbo(vae, x, 23)
    pyro.set_rng_seed(0)
    with torch.no_grad():
        parts = torch.cat([vae.log_weights(x, 20), vae.log_weights(x, 3)])
    torch.testing.assert_close(values, parts.mean(0))


def test_training_raises_the_bound_and_keeps_the_best_weights(autoencoder: ModuleType) -> None:
    pixels = autoencoder.pixel_probabilities()
    validation = autoencoder.binarize(pixels.validation[:50])
    training = autoencoder.Training(
        num_steps=30, batch_size=32, evaluate_every=10, learning_rate=3e-3
    )
    vae = small(autoencoder, "normal prior and posterior")
    before = float(autoencoder.elbo(vae, validation, 20).mean())
    history = autoencoder.train(vae, pixels.train, validation, training)
    assert history.validation_steps == [10, 20, 30]
    best = max(history.validation_elbos)
    assert best > before + 3
    assert history.best_step == 10 * (1 + history.validation_elbos.index(best))
    after = float(autoencoder.elbo(vae, validation, 20).mean())
    assert after == pytest.approx(best, abs=0.5)


def test_training_does_not_end_with_worse_weights(autoencoder: ModuleType) -> None:
    pixels = autoencoder.pixel_probabilities()
    validation = autoencoder.binarize(pixels.validation[:50])
    training = autoencoder.Training(num_steps=6, batch_size=8, evaluate_every=1, learning_rate=1e3)
    vae = small(autoencoder, "normal prior and posterior")
    history = autoencoder.train(vae, pixels.train, validation, training)
    best = max(history.validation_elbos)
    assert history.validation_elbos[history.best_step - 1] == best
    assert min(history.validation_elbos) < 100 * best, "such steps make the bound much worse"
    after = float(autoencoder.elbo(vae, validation, 200).mean())
    assert after == pytest.approx(best, rel=0.2)


def test_pixels_are_drawn_from_their_grey_levels(autoencoder: ModuleType) -> None:
    pixels = autoencoder.pixel_probabilities()
    assert pixels.train.shape == (1257, 64)
    assert pixels.train.min() == 0
    assert pixels.train.max() == 1
    assert pixels.train.dtype == torch.float64
    generator = torch.Generator().manual_seed(0)
    grey = pixels.train[0]
    drawn = autoencoder.binarize(grey.expand(20_000, 64), generator)
    assert ((drawn == 0) | (drawn == 1)).all()
    error = (grey * (1 - grey) / 20_000).sqrt()
    assert ((drawn.mean(0) - grey).abs() <= 5 * error).all()


# --------------------------------------------------------------------------------------- figures


def rendered(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    return file.getvalue()


def style_settings() -> dict[str, Any]:
    settings = pytest.importorskip("matplotlib").rcParams
    return {key: settings[key] for key in settings if key != "backend"}  # reading that sets it


def test_plane_figure_shows_points_and_densities_at_the_same_scale(
    spline_figures: ModuleType,
) -> None:
    settings = style_settings()
    normal = pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1)
    panels = {
        "points": normal.sample((200_000,)),
        "density": normal,
        "flow": NeuralSplineFlow(2, transforms=1)(),
    }
    figure = spline_figures.plane_figure(panels, 3.0, cells=30)
    assert rendered(figure).startswith(b"\x89PNG")
    points, density, _ = (ax.images[0].get_array() for ax in figure.axes)
    assert float(abs(points - density).max()) < 0.02
    assert style_settings() == settings


def test_panels_of_the_plane_have_the_first_feature_to_the_right(
    spline_figures: ModuleType,
) -> None:
    right = torch.tensor([[2.0, 0.1]]).expand(10, 2)
    (ax,) = spline_figures.plane_figure({"right": right}, 3.0, cells=6).axes
    row, column = divmod(int(ax.images[0].get_array().argmax()), 6)
    assert (row, column) == (3, 5)


def test_figures_say_what_does_not_fit(spline_figures: ModuleType) -> None:
    with pytest.raises(ValueError, match="at least one density"):
        spline_figures.plane_figure({}, 3.0)
    with pytest.raises(ValueError, match=r"points must have shape \(n, 2\)"):
        spline_figures.plane_figure({"a": torch.ones(5, 3)}, 3.0)
    with pytest.raises(ValueError, match="no square image"):
        spline_figures.images_figure({"a": torch.ones(5, 63)})
    ones, lines = torch.ones(10), {"a": torch.ones(2, 10)}
    with pytest.raises(ValueError, match=r"quantiles of 'a' must have shape \(3, 10\)"):
        spline_figures.conditional_figure(ones, ones, ones, lines, [0.1, 0.5, 0.9])


def test_other_figures_are_drawn(spline_figures: ModuleType) -> None:
    grid = torch.linspace(-2, 2, 10)
    lines = torch.stack([grid - 1, grid, grid + 1])
    levels = [0.1, 0.5, 0.9]
    result = FitResult(
        torch.arange(60.0),
        torch.tensor([20, 40, 60]),
        torch.tensor([-3.0, -1, -2]),
        40,
        False,
        0,
        0,
    )
    drawn = [
        spline_figures.conditional_figure(grid, grid, grid, {"a": lines, "b": lines}, levels),
        spline_figures.uniformity_figure({"a": torch.rand(100)}),
        spline_figures.images_figure({"a": torch.rand(20, 64), "b": torch.rand(3, 64)}),
        spline_figures.draws_figure(
            {"a": torch.randn(20, 2)},
            -grid.square() - grid.unsqueeze(-1).square(),
            (grid, grid),
            ("x", "y"),
        ),
        spline_figures.history_figure(result),
    ]
    assert all(rendered(figure).startswith(b"\x89PNG") for figure in drawn)
