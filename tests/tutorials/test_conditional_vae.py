"""The tutorial on questions to an autoencoder: models, other ways to answer, figures."""

import io
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_ext import ConditionalPriorGuide, condition_on, frozen

MODELS = ["bernoulli_2", "bernoulli_16", "gaussian_2", "gaussian_16"]
DRAWS = 2000


class Linear(NamedTuple):
    """An autoencoder with a linear decoder, and the normal distribution of its elements."""

    vae: Any
    weight: Tensor
    marginal: tuple[Tensor, Tensor]

    def log_prob(self, x: Tensor, mask: Tensor) -> Tensor:
        mean, covariance = self.marginal
        parts = [
            dist.MultivariateNormal(mean[m], covariance[m][:, m]).log_prob(row[m])
            if m.any()
            else torch.zeros(())
            for row, m in zip(x, mask, strict=True)
        ]
        return torch.stack(parts)

    def posterior(self, x: Tensor, mask: Tensor) -> dist.MultivariateNormal:
        noise = self.vae.log_scale.exp()
        weight = self.weight * mask[..., None] / noise
        covariance = torch.linalg.inv(torch.eye(2) + weight.mT @ weight)
        residual = (x - self.marginal[0]) * mask / noise
        mean = (covariance @ weight.mT @ residual[..., None]).squeeze(-1)
        return dist.MultivariateNormal(mean, covariance)


def linear_vae(digit_autoencoder: ModuleType, num_elements: int = 9) -> Linear:
    vae = digit_autoencoder.VAE("gaussian", 2, num_elements=num_elements)
    vae.decoder = nn.Linear(2, num_elements)
    vae.requires_grad_(False)
    weight, bias = vae.decoder.weight, vae.decoder.bias
    noise = vae.log_scale.exp().square() * torch.eye(num_elements)
    return Linear(vae, weight, (bias, weight @ weight.T + noise))


def some_questions(references: ModuleType, problem: Linear, rows: int = 4) -> Any:
    mean, covariance = problem.marginal
    x = dist.MultivariateNormal(mean, covariance).sample((rows,))
    mask = torch.rand(x.shape) < 0.5
    mask[0], mask[1] = False, True
    return references.Questions(x, mask)


# --------------------------------------------------------------------------------------- models


def test_weights_are_small_and_there_for_every_model(digit_autoencoder: ModuleType) -> None:
    assert sorted(digit_autoencoder.MODELS) == sorted(MODELS)
    folder = digit_autoencoder.weights_path(MODELS[0]).parent
    assert sorted(path.stem for path in folder.iterdir()) == sorted(MODELS)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000


@pytest.mark.parametrize("name", MODELS)
def test_trained_models_know_their_digits(digit_autoencoder: ModuleType, name: str) -> None:
    """Better than independent pixels, and than the untrained model by far."""
    likelihood, latent_size = digit_autoencoder.MODELS[name]
    images = digit_autoencoder.images_for(likelihood)
    vae = digit_autoencoder.load(name)
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float64}
    value = digit_autoencoder.elbo(vae, images.test, 20).mean()
    mean = images.train.mean(0).clamp(0.01, 0.99)
    independent = (
        dist.Bernoulli(mean)
        if likelihood == "bernoulli"
        else dist.Normal(mean, images.train.std(0).clamp(min=float(vae.log_scale.exp())))
    )
    assert value > independent.log_prob(images.test).sum(-1).mean() + (
        4 if latent_size == 2 else 6
    )


def test_unknown_names_are_refused(digit_autoencoder: ModuleType) -> None:
    with pytest.raises(ValueError, match="no model 'poisson_2': give one of bernoulli_2"):
        digit_autoencoder.load("poisson_2")
    with pytest.raises(ValueError, match="give 'bernoulli' or 'gaussian'"):
        digit_autoencoder.VAE("poisson", 2)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_training_raises_the_bound_and_keeps_the_best_weights(
    digit_autoencoder: ModuleType, likelihood: str
) -> None:
    images = digit_autoencoder.images_for(likelihood)
    vae = digit_autoencoder.VAE(likelihood, 2)
    validation = images.validation[:60]
    before = float(digit_autoencoder.elbo(vae, validation, 20).mean())
    training = digit_autoencoder.Training(num_steps=30, batch_size=64, evaluate_every=10)
    best = digit_autoencoder.train(vae, images.train, validation, training)
    assert best > before + 3
    after = float(digit_autoencoder.elbo(vae, validation, 200).mean())
    assert after == pytest.approx(best, abs=1.0)


def test_steps_that_are_too_long_do_not_spoil_the_weights(digit_autoencoder: ModuleType) -> None:
    images = digit_autoencoder.images_for("bernoulli")
    vae = digit_autoencoder.VAE("bernoulli", 2)
    validation = images.validation[:60]
    training = digit_autoencoder.Training(num_steps=6, evaluate_every=1, learning_rate=10.0)
    best = digit_autoencoder.train(vae, images.train, validation, training)
    after = float(digit_autoencoder.elbo(vae, validation, 200).mean())
    assert after == pytest.approx(best, rel=0.2)


def test_the_bound_is_the_evidence_where_the_encoder_is_the_posterior(
    digit_autoencoder: ModuleType, references: ModuleType
) -> None:
    """Of a decoder with orthogonal columns, whose posterior is independent as the encoder's."""
    vae = linear_vae(digit_autoencoder).vae
    orthogonal = torch.linalg.qr(torch.randn(9, 2)).Q * torch.tensor([0.5, 1.0])
    vae.decoder.weight.copy_(orthogonal)
    noise = vae.log_scale.exp().square() * torch.eye(9)
    problem = Linear(vae, orthogonal, (vae.decoder.bias, orthogonal @ orthogonal.T + noise))
    x = some_questions(references, problem).x
    everything = torch.ones_like(x, dtype=torch.bool)
    posterior = problem.posterior(x, everything)
    scale = posterior.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt() - 1e-3
    vae.encoder = _Constant(torch.cat([posterior.mean, scale.expm1().log()], -1))
    bound = digit_autoencoder.elbo(vae, x, 3)
    torch.testing.assert_close(bound, problem.log_prob(x, everything), rtol=0, atol=1e-8)


class _Constant(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand(*x.shape[:-1], -1)


def test_pixels_are_black_and_white_or_grey(digit_autoencoder: ModuleType) -> None:
    binary, grey = (digit_autoencoder.images_for(each) for each in ("bernoulli", "gaussian"))
    assert binary.train.shape == grey.train.shape == (1257, 64)
    assert set(binary.test.unique().tolist()) == {0.0, 1.0}
    assert (grey.train.min(), grey.train.max()) == (0, 1)
    torch.testing.assert_close(binary.test, (grey.test >= 0.5).double())


# ---------------------------------------------------------------------------------------- MNIST


def test_mnist_comes_from_the_file_that_is_named(
    digit_autoencoder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    x, x_test = (random.integers(0, 256, (n, 28, 28), dtype=np.uint8) for n in (30, 10))
    y, y_test = (random.integers(0, 10, n, dtype=np.uint8) for n in (30, 10))
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    for place in (tmp_path, tmp_path / "mnist.npz"):
        monkeypatch.setenv("PYRO_EXT_DATA", str(place))
        images = digit_autoencoder.mnist(digit_autoencoder.mnist_path(), "gaussian", 5)
        assert images.train.shape == (25, 784)
        assert images.validation.shape == (5, 784)
        torch.testing.assert_close(images.test, torch.from_numpy(x_test / 255).flatten(1))
        assert images.labels.validation.tolist() == y[25:].tolist()
    binary = digit_autoencoder.mnist(tmp_path / "mnist.npz", "bernoulli", 5)
    assert set(binary.train.unique().tolist()) == {0.0, 1.0}


def test_mnist_that_is_not_there(
    digit_autoencoder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYRO_EXT_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="Set PYRO_EXT_DATA"):
        digit_autoencoder.mnist_path()
    monkeypatch.setenv("PYRO_EXT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"There is no .*mnist\.npz"):
        digit_autoencoder.mnist_path()
    np.savez(tmp_path / "mnist.npz", x_train=np.zeros(3))
    with pytest.raises(ValueError, match=r"has no arrays \['y_train', 'x_test', 'y_test'\]"):
        digit_autoencoder.mnist(digit_autoencoder.mnist_path(), "bernoulli")


# ------------------------------------------------------------------------------------ questions


def test_questions_show_as_many_pixels_as_asked(references: ModuleType) -> None:
    images = torch.rand(40, 64)
    questions = references.random_questions(images, 30, (0.25, 0.25))
    assert (questions.mask.sum(-1) == 16).all()
    assert questions.x.unique(dim=0).shape == (30, 64)
    spread = references.random_questions(images, 40, (0.0, 1.0)).mask.sum(-1)
    assert spread.min() >= 1
    assert spread.max() <= 63
    assert spread.max() - spread.min() > 40
    single = references.random_questions(images.float(), 30, (0.25, 0.25))
    assert (single.mask == questions.mask).all()
    torch.testing.assert_close(single.x, questions.x.float())
    other = references.random_questions(images, 30, (0.25, 0.25), seed=1)
    assert (other.mask != questions.mask).any()
    assert len(questions.first(3).x) == len(questions.first(3).mask) == 3


def test_grid_finds_closed_forms(digit_autoencoder: ModuleType, references: ModuleType) -> None:
    problem = linear_vae(digit_autoencoder)
    questions = some_questions(references, problem)
    grid = references.grid_posterior(problem.vae, questions, half=6.0, num=201)
    x, mask = questions
    torch.testing.assert_close(grid.log_evidence, problem.log_prob(x, mask), rtol=0, atol=1e-6)
    everything = problem.log_prob(x, torch.ones_like(mask))
    query = everything - problem.log_prob(x, mask)
    torch.testing.assert_close(grid.query_log_prob, query, rtol=0, atol=1e-6)
    torch.testing.assert_close(grid.log_posterior.exp().sum(0), torch.ones(4))
    _check_moments(grid.sample(DRAWS), problem.posterior(x, mask))


def test_grid_integrates_the_query_under_a_guide(
    digit_autoencoder: ModuleType, references: ModuleType
) -> None:
    """Under the posterior it is log p(y | x), under the prior log p(y)."""
    problem = linear_vae(digit_autoencoder)
    questions = some_questions(references, problem)
    x, mask = questions
    grid = references.grid_posterior(problem.vae, questions, half=6.0, num=201)
    posterior, prior = problem.posterior(x, mask), dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    by_posterior = grid.integrate_query(posterior.log_prob)
    torch.testing.assert_close(by_posterior, grid.query_log_prob, rtol=0, atol=1e-6)
    by_prior = grid.integrate_query(prior.log_prob)
    torch.testing.assert_close(by_prior, problem.log_prob(x, ~mask), rtol=0, atol=1e-6)
    one = grid.row(2).integrate_query(prior.log_prob)
    torch.testing.assert_close(one, by_prior[2:3])


def _check_moments(draws: Tensor, posterior: dist.MultivariateNormal) -> None:
    """Means and variances of independent draws, by their standard errors."""
    variance = posterior.covariance_matrix.diagonal(dim1=-2, dim2=-1)
    num = len(draws)
    assert draws.shape == (num, *posterior.mean.shape)
    error = (draws.mean(0) - posterior.mean).abs() / (variance / num).sqrt()
    assert error.max() < 5, f"means are off by {error.max():.1f} standard errors"
    error = (draws.var(0) - variance).abs() / (variance * (2 / num) ** 0.5)
    assert error.max() < 5, f"variances are off by {error.max():.1f} standard errors"


def test_a_grid_is_for_two_latents(digit_autoencoder: ModuleType, references: ModuleType) -> None:
    vae = digit_autoencoder.VAE("bernoulli", 3)
    questions = references.Questions(torch.zeros(1, 64), torch.ones(1, 64) > 0)
    with pytest.raises(ValueError, match="two latents, but the model has 3"):
        references.grid_posterior(vae, questions)


def test_rejection_draws_from_the_posterior(
    digit_autoencoder: ModuleType, references: ModuleType
) -> None:
    problem = linear_vae(digit_autoencoder)
    questions = some_questions(references, problem)
    at_best = problem.vae.log_scale.exp().log() * -questions.mask.sum(-1) - 0.5 * np.log(
        2 * np.pi
    ) * questions.mask.sum(-1)  # of elements without any error
    drawn = references.rejection(problem.vae, questions, DRAWS, at_best)
    assert (drawn.num_accepted == DRAWS).all(), "the test is of rows that have enough draws"
    _check_moments(drawn.z, problem.posterior(*questions))


def test_rejection_says_where_draws_are_missing(
    digit_autoencoder: ModuleType, references: ModuleType
) -> None:
    vae = linear_vae(digit_autoencoder).vae
    questions = references.Questions(torch.zeros(2, 9), torch.zeros(2, 9) > 0)
    drawn = references.rejection(vae, questions, 50, torch.tensor([0.0, 1000.0]), max_proposals=30)
    assert drawn.num_accepted.tolist() == [30, 0]
    assert drawn.num_proposals == 30
    assert drawn.z[:, 1].isnan().all()
    torch.testing.assert_close(drawn.z[30:, 0], drawn.z[:20, 0])


def test_alternation_ends_at_the_encoder_when_all_is_seen(
    digit_autoencoder: ModuleType, references: ModuleType
) -> None:
    vae = digit_autoencoder.VAE("bernoulli", 2).requires_grad_(False)
    x = torch.bernoulli(torch.full((3, 64), 0.4))
    seen = references.Questions(x, torch.ones_like(x) > 0)
    encoded = vae.encode(x)
    exact = dist.MultivariateNormal(encoded.loc, torch.diag_embed(encoded.scale.square()))
    _check_moments(references.alternation(vae, seen, DRAWS, num_rounds=2), exact)


def test_alternation_stays_within_limits(
    digit_autoencoder: ModuleType, references: ModuleType
) -> None:
    """An autoencoder that doubles what it gets: chains run away where nothing holds them."""
    vae = digit_autoencoder.VAE("gaussian", 2, num_elements=2).requires_grad_(False)
    vae.encoder, vae.decoder = nn.Linear(2, 4), nn.Linear(2, 2)
    for layer in (vae.encoder, vae.decoder):
        layer.requires_grad_(False)
        layer.bias.zero_()
        layer.weight.zero_()
        layer.weight[:2, :2] = 2**0.5 * torch.eye(2)
    question = references.Questions(torch.ones(1, 2), torch.tensor([[True, False]]))
    free = references.alternation(vae, question, 10, num_rounds=20)
    assert (free[..., 1].abs() > 100).any()
    kept = references.alternation(vae, question, 10, num_rounds=20, limits=(0.0, 1.0))
    assert (kept.abs() < 2**0.5 + 5).all()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_scores_are_of_what_was_not_seen(
    digit_autoencoder: ModuleType, references: ModuleType, likelihood: str
) -> None:
    vae = digit_autoencoder.VAE(likelihood, 2).requires_grad_(False)
    images = digit_autoencoder.images_for(likelihood).test
    questions = references.random_questions(images, 5, (0.2, 0.8))
    x, mask = questions
    z = torch.randn(300, 5, 2)
    completed = references.complete(vae, z, questions)
    assert (completed == x)[:, mask].all()
    assert (completed != x)[:, ~mask].any()
    scores = references.score(vae, z, questions)
    elements = vae.elements(z).log_prob(x)
    by_hand = torch.stack([elements[:, i, ~m].sum(-1) for i, m in enumerate(mask)], -1)
    expected = by_hand.logsumexp(0) - np.log(300)
    torch.testing.assert_close(scores.query_log_prob, expected)
    perfect = references.score_completed(x.expand(3, -1, -1), expected, questions)
    torch.testing.assert_close(perfect.ssim, torch.ones(5))
    assert (perfect.squared_error == 0).all()
    assert (perfect.standard_deviation == 0).all()
    flipped = torch.where(mask, x, 1 - x).expand(3, -1, -1)
    if likelihood == "bernoulli":
        wrong = references.score_completed(flipped, expected, questions)
        torch.testing.assert_close(wrong.squared_error, torch.ones(5))
        assert (wrong.ssim < 0.9).all()


@pytest.mark.slow
def test_the_guide_agrees_with_the_grid(
    digit_autoencoder: ModuleType, references: ModuleType
) -> None:
    """The claim of the tutorial, on four of its questions."""
    vae = digit_autoencoder.load("bernoulli_2")
    images = digit_autoencoder.images_for("bernoulli").test
    questions = references.random_questions(images, 4, (0.1, 0.3))
    grid = references.grid_posterior(vae, questions, num=301)
    asked = frozen(condition_on(vae.model, {"x": questions.x}, {"x": questions.mask}))
    guide = ConditionalPriorGuide(asked, "spline")
    result = guide.fit(4, progress=False, num_particles=300, max_iter=100)
    gap = grid.log_evidence - result.held_out_c_elbo
    assert (gap > -5 * result.held_out_error).all(), "the C-ELBO is a bound"
    assert (gap < 0.15 + 5 * result.held_out_error).all(), "and a close one"
    pyro.set_rng_seed(0)
    query = guide.query_log_prob(questions.x, 4000)
    torch.testing.assert_close(query, grid.query_log_prob, rtol=0.02, atol=0)


# --------------------------------------------------------------------------------------- figures


def rendered(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    return file.getvalue()


def test_figures_are_drawn_and_leave_the_style_alone(question_figures: ModuleType) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}
    images = torch.rand(4, 64)
    mask = torch.rand(4, 64) < 0.3
    axis = torch.linspace(-4, 4, 41)
    bell = -(axis.square() + axis.square().unsqueeze(-1)).flatten()
    names = ["a", "b", "c"]
    drawn = [
        question_figures.questions_figure(images, mask),
        question_figures.questions_figure(images, mask, torch.rand(2, 4, 64)),
        question_figures.completions_figure(images[0], mask[0], {"x": torch.rand(9, 64)}),
        question_figures.posteriors_figure({"x": torch.randn(50, 2)}, bell, axis),
        question_figures.scores_figure({n: torch.randn(5) for n in names}, "b", "log p"),
        question_figures.intervals_figure(
            torch.randn(50, 3), torch.randn(3), torch.tensor([True, False, True]), names
        ),
    ]
    assert all(rendered(figure).startswith(b"\x89PNG") for figure in drawn)
    assert {k: matplotlib.rcParams[k] for k in before} == before


def test_contours_hold_what_they_say(question_figures: ModuleType) -> None:
    """Of a normal distribution, 90 % lie within a circle of this radius."""
    axis = torch.linspace(-5, 5, 401)
    squares = (axis.square() + axis.square().unsqueeze(-1)).flatten()
    levels = question_figures._levels((-0.5 * squares).softmax(0), (0.99, 0.9, 0.5))
    assert levels == sorted(levels)
    height = (-0.5 * squares).softmax(0)
    for level, content in zip(levels, (0.99, 0.9, 0.5), strict=True):
        radius = squares[height >= level].max().sqrt()
        exact = (-2 * np.log(1 - content)) ** 0.5
        assert float(radius) == pytest.approx(exact, abs=0.03)


def test_figures_say_what_does_not_fit(question_figures: ModuleType) -> None:
    with pytest.raises(ValueError, match="63 pixels are no square image"):
        question_figures.questions_figure(torch.rand(1, 63), torch.rand(1, 63) < 0.5)
    with pytest.raises(ValueError, match=r"must have shape \(9,\), got \(8,\)"):
        question_figures.posteriors_figure({}, torch.zeros(8), torch.zeros(3))
    many = {str(i): torch.zeros(2) for i in range(8)}
    with pytest.raises(ValueError, match="at most 6 methods"):
        question_figures.scores_figure(many, "0", "log p")
