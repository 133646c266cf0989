"""Questions to trained autoencoders: ConditionalPriorGuide beside stock Pyro and sampling.

Claim: fifty questions fitted as one batch take at most a tenth of the time of fifty fits by SVI
with a stock guide, at an equal or better C-ELBO.

    python benchmarks/conditional_vae.py table                      # all four models
    python benchmarks/conditional_vae.py table --models bernoulli_2
    python benchmarks/conditional_vae.py sweep
    PYRO_EXT_DATA=mnist.npz python benchmarks/conditional_vae.py table --models mnist_bernoulli_2

The experiment is that of Wu, Domke and Sanner (2022), section 4 and table 1, on scikit-learn's
digits and the autoencoders of the tutorial ``conditional_vae``: random images that take no part
in the training, and of each a random part of the pixels as evidence. ``sweep`` varies how many
pixels are seen (their figure 11). A model of MNIST is trained first, and kept in
``benchmarks/output``.

Times are of one thread. All methods answer the same questions; slow ones only the first few, and
the columns that compare with the reference are of the same questions in every row. The reference
is a sum over a grid for two latents, otherwise importance sampling from the spline guide.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pyro
import pyro.distributions.transforms as pyro_transforms
import pyro.optim
import torch
from pyro.distributions.transforms import iterated
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormalizingFlow
from torch import Tensor

from benchmarks._report import OUTPUT, progress, write_table
from pyro_ext import ConditionalPriorGuide, condition_on, frozen
from pyro_ext.infer.conditional_prior.metrics import log_mean_exp
from tutorials.conditional_vae import autoencoder, references
from tutorials.conditional_vae.references import Questions, Score

NAME = "conditional_vae"
PACKAGES = ["torch", "pyro-ppl", "scikit-learn"]
NUM_DRAWS = 500  # of every prediction, as in the paper
EVALUATION_DRAWS = 10_000  # of a C-ELBO, and of log p(y | x) where draws cost nothing
REFERENCE_DRAWS = 20_000  # importance samples
SEEN = (0.05, 0.5)  # part of the pixels that is evidence
SWEEP = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
SWEEP_FLOWS = ("gvi", "spline")
FLOWS = ("gvi", "planar", "spline", "fcn")
STOCK = "AutoMultivariateNormal, SVI"


class Answer(NamedTuple):
    """What a method says to the first ``num_questions`` questions."""

    score: Score
    fit_seconds: float  # of all of them together
    predict_seconds: float
    c_elbo: Tensor | None = None
    query_log_prob: Tensor | None = None  # by more draws than the score
    weighted: Tensor | None = None  # by as many, half of them wide, with importance weights
    integrated: Tensor | None = None  # log p(y | x) by the grid instead of by draws
    note: str = ""

    @property
    def num_questions(self) -> int:
        return len(self.score.ssim)


class Reference(NamedTuple):
    log_evidence: Tensor
    query_log_prob: Tensor
    grid: references.Grid | None  # with two latents
    note: str


# -- models and questions -----------------------------------------------------------------------


def model_and_images(name: str) -> tuple[Any, Any]:
    """A trained autoencoder without gradients, and its data."""
    if not name.startswith("mnist_"):
        likelihood = autoencoder.MODELS[name].likelihood
        return autoencoder.load(name), autoencoder.images_for(likelihood)
    setting = autoencoder.MODELS[name.removeprefix("mnist_")]
    images = autoencoder.mnist(autoencoder.mnist_path(), setting.likelihood)
    vae = autoencoder.VAE(*setting, num_elements=images.train.shape[-1])
    path = os.path.join(OUTPUT, NAME, f"{name}.pt")
    if not os.path.exists(path):
        progress(f"training {name}")
        pyro.set_rng_seed(0)
        autoencoder.train(vae, images.train, images.validation)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.save(vae.state_dict(), path)
    vae.load_state_dict(torch.load(path, weights_only=True))
    return vae.eval().requires_grad_(False), images


def asked(vae: Any, questions: Questions) -> Callable[..., Any]:
    return frozen(condition_on(vae.model, {"x": questions.x}, {"x": questions.mask}))


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    value = function()
    return value, time.process_time() - start


# -- our guides: all questions at once ------------------------------------------------------------


def fit_guide(
    vae: Any, questions: Questions, flow: str, seed: int
) -> tuple[ConditionalPriorGuide, float, str]:
    """A fitted guide, the time it took, and what the fit has warned of."""
    pyro.set_rng_seed(seed)
    guide = ConditionalPriorGuide(asked(vae, questions), flow)
    rows = len(questions.x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, seconds = timed(lambda: guide.fit(rows, progress=False))
    return guide, seconds, "; ".join(str(each.message).split(":")[0] for each in caught)


def answer_by_guide(
    vae: Any, questions: Questions, flow: str, seed: int, grid: references.Grid | None = None
) -> Answer:
    guide, fit_seconds, note = fit_guide(vae, questions, flow, seed)
    completed, predict_seconds = timed(lambda: guide.sample_query(NUM_DRAWS)["x"])
    query_log_prob = guide.query_log_prob(questions.x, NUM_DRAWS)
    return Answer(
        references.score_completed(completed, query_log_prob, questions),
        fit_seconds,
        predict_seconds,
        guide.c_elbo(EVALUATION_DRAWS),
        guide.query_log_prob(questions.x, EVALUATION_DRAWS),
        None if flow == "fcn" else weighted_by(guide, questions),
        None if grid is None or flow == "fcn" else integrated_by(guide, grid),
        note,
    )


def weighted_by(guide: ConditionalPriorGuide, questions: Questions) -> Tensor:
    return guide.query_log_prob(questions.x, EVALUATION_DRAWS, weighted=True)


@torch.no_grad()
def integrated_by(guide: ConditionalPriorGuide, grid: references.Grid) -> Tensor:
    """The query's log-probability under a guide that can tell its density everywhere."""
    return grid.integrate_query(lambda z: guide.log_prob({"z": z}))


# -- stock Pyro: one question after the other -----------------------------------------------------


def plain_model(vae: Any, question: Questions) -> Callable[[], None]:
    """One question in stock Pyro's own words, which cost the least time."""

    def model() -> None:
        with pyro.plate("rows", 1):
            zero = question.x.new_zeros(vae.latent_size)
            z = pyro.sample("z", pyro.distributions.Normal(zero, 1.0).to_event(1))
            elements = vae.elements(z).mask(question.mask).to_event(1)
            pyro.sample("x", elements, obs=question.x)

    return model


def singly(questions: Questions) -> list[Questions]:
    return [
        Questions(x, mask)
        for x, mask in zip(questions.x.split(1), questions.mask.split(1), strict=True)
    ]


class SviSettings(NamedTuple):
    """By default what was fastest for AutoMultivariateNormal without a loss of C-ELBO."""

    learning_rate: float = 0.03
    num_particles: int = 50
    block: int = 100  # steps whose losses are averaged
    patience: int = 2  # blocks without a gain
    max_steps: int = 5000


def run_svi(model: Callable[..., Any], guide: AutoGuide, settings: SviSettings) -> int:
    """
    Train until blocks of steps do not gain any more; returns the number of steps.

    A gain is one over the best block before, by more than the standard error of a block's mean.
    """
    pyro.clear_param_store()
    optimizer = pyro.optim.Adam({"lr": settings.learning_rate})
    elbo = Trace_ELBO(
        num_particles=settings.num_particles, vectorize_particles=True, max_plate_nesting=1
    )
    svi = SVI(model, guide, optimizer, elbo)
    best, without_gain, step = math.inf, 0, 0
    while step < settings.max_steps and without_gain < settings.patience:
        losses = [svi.step() for _ in range(settings.block)]
        step += settings.block
        error = statistics.stdev(losses) / settings.block**0.5
        mean = statistics.fmean(losses)
        without_gain = 0 if mean < best - error else without_gain + 1
        best = min(best, mean)
    return step


def answer_by_svi(
    vae: Any,
    questions: Questions,
    make_guide: Callable[[Callable[..., Any]], AutoGuide],
    seed: int,
    settings: SviSettings,
    grid: references.Grid | None = None,
) -> Answer:
    fit_seconds = predict_seconds = 0.0
    c_elbos, many, parts, steps = [], [], [], []
    integrated = []
    evaluate = Trace_ELBO(
        num_particles=EVALUATION_DRAWS, vectorize_particles=True, max_plate_nesting=1
    )
    for row, one in enumerate(singly(questions)):
        model = plain_model(vae, one)
        pyro.set_rng_seed(seed + row)
        guide = make_guide(model)
        num_steps, seconds = timed(partial(run_svi, model, guide, settings))
        fit_seconds += seconds
        steps.append(num_steps)
        with torch.no_grad():
            c_elbos.append(-evaluate.loss(model, guide))
        (z, completed), seconds = timed(partial(predict, vae, guide, one, NUM_DRAWS))
        predict_seconds += seconds
        query_log_prob = log_mean_exp(vae.log_likelihood(z, one.x, ~one.mask))
        parts.append(references.score_completed(completed, query_log_prob, one))
        if grid is not None and isinstance(guide, AutoMultivariateNormal):
            integrated.append(grid.row(row).integrate_query(stock_density(guide)))
        z, _ = predict(vae, guide, one, EVALUATION_DRAWS)
        many.append(log_mean_exp(vae.log_likelihood(z, one.x, ~one.mask)))
    return Answer(
        _joined(parts),
        fit_seconds,
        predict_seconds,
        questions.x.new_tensor(c_elbos),
        torch.cat(many),
        None,
        torch.cat(integrated) if integrated else None,
        f"{statistics.fmean(steps):.0f} steps",
    )


def stock_density(guide: AutoMultivariateNormal) -> Callable[[Tensor], Tensor]:
    posterior = guide.get_posterior()
    return lambda z: posterior.log_prob(z.squeeze(1)).detach().unsqueeze(-1)


@torch.no_grad()
def predict(vae: Any, guide: AutoGuide, question: Questions, num: int) -> tuple[Tensor, Tensor]:
    with pyro.plate("draws", num, dim=-2):
        z = guide()["z"].reshape(num, 1, -1)
    return z, references.complete(vae, z, question)


def answer_by_nuts(vae: Any, questions: Questions, warmup: int, seed: int) -> Answer:
    fit_seconds = predict_seconds = 0.0
    draws = []
    for row, one in enumerate(singly(questions)):
        pyro.set_rng_seed(seed + row)
        times = [time.process_time()]

        def note_time(
            kernel: Any, samples: Any, stage: str, i: int, times: list[float] = times
        ) -> None:
            if i == warmup - 1 and stage == "Warmup":
                times.append(time.process_time())

        mcmc = MCMC(
            NUTS(plain_model(vae, one)),
            num_samples=NUM_DRAWS,
            warmup_steps=warmup,
            hook_fn=note_time,
            disable_progbar=True,
        )
        mcmc.run()
        fit_seconds += times[1] - times[0]
        predict_seconds += time.process_time() - times[1]
        draws.append(mcmc.get_samples()["z"].reshape(NUM_DRAWS, 1, -1))
    score, seconds = timed(lambda: references.score(vae, torch.cat(draws, 1), questions))
    return Answer(score, fit_seconds, predict_seconds + seconds, note=f"{warmup} warm-up steps")


def _joined(scores: list[Score]) -> Score:
    return Score(*(torch.cat(values) for values in zip(*scores, strict=True)))


# -- references -----------------------------------------------------------------------------------


def reference_of(vae: Any, questions: Questions, seed: int) -> Reference:
    """Exact log p(x) and log p(y | x), or nearly so."""
    if vae.latent_size == 2:
        grid = references.grid_posterior(vae, questions)
        return Reference(grid.log_evidence, grid.query_log_prob, grid, "grid of 501 x 501")
    guide, _, _ = fit_guide(vae, questions, "spline", seed)
    x, mask = questions
    log_weights, log_y = [], []
    for _ in range(REFERENCE_DRAWS // 1000):
        with torch.no_grad():
            z = guide.sample_latents(1000)["z"]
            prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
            log_weights.append(vae.log_likelihood(z, x, mask) + prior - guide.log_prob({"z": z}))
            log_y.append(vae.log_likelihood(z, x, ~mask))
    log_w, log_wy = torch.cat(log_weights), torch.cat(log_weights) + torch.cat(log_y)
    log_evidence = log_mean_exp(log_w)
    size = (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()
    note = (
        f"importance sampling, {REFERENCE_DRAWS:,} draws, effective size "
        f"{float(size.median()):,.0f} (median), {float(size.min()):,.0f} (smallest)"
    )
    return Reference(log_evidence, log_mean_exp(log_wy) - log_evidence, None, note)


def answer_by_grid(vae: Any, questions: Questions, grid: references.Grid, seed: int) -> Answer:
    """As well as anything can do with so many draws."""
    pyro.set_rng_seed(seed)
    score, seconds = timed(lambda: references.score(vae, grid.sample(NUM_DRAWS), questions))
    return Answer(score, 0.0, seconds)


def answer_by_rejection(
    vae: Any, questions: Questions, grid: references.Grid, seed: int
) -> Answer:
    points = torch.cartesian_prod(grid.axis, grid.axis)
    log_prior = -0.5 * points.square().sum(-1, keepdim=True) - math.log(2 * math.pi)
    cell = 2 * float((grid.axis[1] - grid.axis[0]).log())
    log_likelihood = grid.log_posterior + grid.log_evidence - log_prior - cell
    bound = log_likelihood.amax(0) + 0.05  # for what lies between the points
    pyro.set_rng_seed(seed)
    drawn, seconds = timed(lambda: references.rejection(vae, questions, NUM_DRAWS, bound))
    score, seconds_of_score = timed(lambda: references.score(vae, drawn.z, questions))
    short = int((drawn.num_accepted < NUM_DRAWS).sum())
    note = f"{short} questions with fewer than {NUM_DRAWS} draws" if short else ""
    return Answer(score, 0.0, seconds + seconds_of_score, note=note)


def answer_by_alternation(vae: Any, questions: Questions, seed: int) -> Answer:
    pyro.set_rng_seed(seed)
    limits = (0.0, 1.0)
    z, seconds = timed(lambda: references.alternation(vae, questions, NUM_DRAWS, limits=limits))
    score, seconds_of_score = timed(lambda: references.score(vae, z, questions))
    return Answer(score, 0.0, seconds + seconds_of_score, note="50 rounds")


# -- parts ----------------------------------------------------------------------------------------


def make_stock_flow(model: Callable[..., Any]) -> AutoGuide:
    """The flow of Pyro's documentation of the guide."""
    flow = partial(iterated, 1, pyro_transforms.block_autoregressive)
    return AutoNormalizingFlow(model, flow)


def answers(
    vae: Any, questions: Questions, reference: Reference, args: argparse.Namespace
) -> dict[str, Callable[[], Answer]]:
    """The rows of the table, in the order of the paper's table 1."""
    seed = args.seed
    jobs: dict[str, Callable[[], Answer]] = {}
    for flow in FLOWS:
        if flow != "fcn" or vae.latent_size == 2:
            jobs[f'pyro_ext, "{flow}"'] = partial(
                answer_by_guide, vae, questions, flow, seed, reference.grid
            )
    for label, num, make_guide, settings in (
        (STOCK, args.svi_questions, AutoMultivariateNormal, SviSettings()),
        ("AutoNormalizingFlow, SVI", args.flow_questions, make_stock_flow, SviSettings(0.01)),
    ):
        if num:
            few = questions.first(num)
            jobs[label] = partial(
                answer_by_svi, vae, few, make_guide, seed, settings, reference.grid
            )
    if args.nuts_questions:
        few = questions.first(args.nuts_questions)
        jobs["NUTS"] = partial(answer_by_nuts, vae, few, 300, seed)
    if reference.grid is not None:
        grid = reference.grid
        jobs["rejection sampling"] = partial(answer_by_rejection, vae, questions, grid, seed)
        jobs["draws from the grid"] = partial(answer_by_grid, vae, questions, grid, seed)
    jobs["alternation with the encoder"] = partial(answer_by_alternation, vae, questions, seed)
    return jobs


def table(name: str, args: argparse.Namespace) -> None:
    vae, images = model_and_images(name)
    questions = references.random_questions(images.test, args.questions, SEEN, args.seed)
    progress(f"{name}: reference")
    reference = reference_of(vae, questions, args.seed)
    done: dict[str, Answer] = {}
    for label, job in answers(vae, questions, reference, args).items():
        progress(f"{name}: {label}")
        done[label] = job()
        rows = [table_row(label, answer, reference, done) for label, answer in done.items()]
        how = (
            f"one thread, {args.questions} questions, float32; log-densities in nats, times in "
            f"processor seconds for each question; {reference.note}: mean log p(x) "
            f"{float(reference.log_evidence.mean()):.2f}, mean log p(y given x) "
            f"{float(reference.query_log_prob.mean()):.2f}"
        )
        write_table(f"{NAME}_{name}", rows, how, PACKAGES)


def table_row(
    label: str, answer: Answer, reference: Reference, done: dict[str, Answer]
) -> dict[str, str]:
    """Means over questions; differences are from the reference for the same questions."""
    num, c_elbo, score = answer.num_questions, answer.c_elbo, answer.score
    fit = answer.fit_seconds / num
    stock = done.get(STOCK)
    faster = "-"
    if stock is not None and fit:
        faster = f"{stock.fit_seconds / stock.num_questions / fit:.1f}"

    def excess(values: Tensor | None, exact: Tensor) -> str:
        return "-" if values is None else f"{float((values - exact[:num]).nanmean()):+.3f}"

    return {
        "method": label,
        "questions": f"{num}",
        "C-ELBO": "-" if c_elbo is None else f"{float(c_elbo.mean()):.2f}",
        "C-ELBO - log p(x)": excess(c_elbo, reference.log_evidence),
        "log p(y given x)": f"{float(score.query_log_prob.nanmean()):.2f}",
        "error, 500 draws": excess(score.query_log_prob, reference.query_log_prob),
        "error, 10,000 draws": excess(answer.query_log_prob, reference.query_log_prob),
        "error, weighted": excess(answer.weighted, reference.query_log_prob),
        "error, by the grid": excess(answer.integrated, reference.query_log_prob),
        "SSIM": f"{float(score.ssim.nanmean()):.3f}",
        "sd": f"{float(score.standard_deviation.nanmean()):.3f}",
        "fit, s": f"{fit:.3g}" if fit else "-",
        "times faster": faster,
        "500 draws, s": f"{answer.predict_seconds / num:.2g}",
        "note": answer.note,
    }


def sweep(name: str, args: argparse.Namespace) -> None:
    """Squared error of what was not seen, against how much was (figure 11)."""
    vae, images = model_and_images(name)
    rows: list[dict[str, str]] = []
    for part in SWEEP:
        questions = references.random_questions(
            images.test, args.questions, (part, part), args.seed
        )
        row = {"pixels seen": f"{part:.0%}"}
        if vae.latent_size == 2:
            grid = references.grid_posterior(vae, questions, num=301)
            exact = references.score(vae, grid.sample(NUM_DRAWS), questions)
            row["exact (grid)"] = with_error(exact.squared_error)
            by_rejection = answer_by_rejection(vae, questions, grid, args.seed)
            row["rejection sampling"] = with_error(by_rejection.score.squared_error)
        for flow in SWEEP_FLOWS:
            progress(f"{name}: {flow}, {part:.0%} seen")
            answer = answer_by_guide(vae, questions, flow, args.seed)
            row[flow] = with_error(answer.score.squared_error)
        alternated = answer_by_alternation(vae, questions, args.seed)
        row["alternation with the encoder"] = with_error(alternated.score.squared_error)
        rows.append(row)
        how = (
            f"one thread, {args.questions} questions in each row; squared error of the pixels "
            "that were not seen, mean over draws and questions, ± standard error"
        )
        write_table(f"{NAME}_sweep_{name}", rows, how, PACKAGES)


def with_error(values: Tensor) -> str:
    values = values[values.isfinite()]
    if len(values) < 2:
        return "-"
    return f"{float(values.mean()):.4f} ± {float(values.std() / len(values) ** 0.5):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=("all", "table", "sweep"), default="all")
    names = [*autoencoder.MODELS, *(f"mnist_{name}" for name in autoencoder.MODELS)]
    parser.add_argument("--models", nargs="+", choices=names, default=list(autoencoder.MODELS))
    parser.add_argument("--questions", type=int, default=50)
    for name, number, method in (
        ("svi", 50, "AutoMultivariateNormal"),
        ("flow", 10, "AutoNormalizingFlow"),
        ("nuts", 5, "NUTS"),
    ):
        text = f"to {method}, the first ones; 0 leaves it out"
        parser.add_argument(f"--{name}-questions", type=int, default=number, help=text)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        if args.part in ("all", "table"):
            table(name, args)
        if args.part in ("all", "sweep") and name.endswith("bernoulli_2"):
            sweep(name, args)


if __name__ == "__main__":
    main()
