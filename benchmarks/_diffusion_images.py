"""Score flows on images: table 2 of the paper on digits, and densities beside other models."""

from __future__ import annotations

import argparse
import math
import os
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks._diffusion import PACKAGES, kept, spent, standard_error
from benchmarks._report import RESULTS, threads_in_words, write_table
from benchmarks.spline_flow_densities import IMAGES
from pyro_ext.datasets import digits
from pyro_ext.distributions import (
    DequantizedFlow,
    NeuralSplineFlow,
    ScoreFlow,
    UniformDequantization,
    VariationalDequantization,
    bits_per_dimension,
)
from pyro_ext.distributions.diffusion import (
    VPSDE,
    OdeSettings,
    SubVPSDE,
    dequantized_training_loss,
)
from pyro_ext.training import fit_density

# Hutchinson's estimate has no bias, and its errors are small beside differences between images
ODE = OdeSettings(rtol=1e-3, atol=1e-3, trace="hutchinson")
REPEATS = 20

# -- table 2, on digits ---------------------------------------------------------------------------


class Choice(NamedTuple):
    """A row of the table."""

    sde: str
    label: str
    weighting: str
    importance_sampling: bool
    is_variational: bool


# noise is learned through the bound, which is about the last weighting
CHOICES = [
    Choice(sde, label, weighting, importance_sampling, is_variational)
    for sde in ("VP", "subVP")
    for label, weighting, importance_sampling, is_variational in (
        ("baseline", "original", False, False),
        ("+ LW", "likelihood", False, False),
        ("+ LW + IS", "likelihood", True, False),
        ("+ LW + IS", "likelihood", True, True),
    )
]


def dequantized(choice: Choice) -> DequantizedFlow:
    diffusion = VPSDE(start=1e-3) if choice.sde == "VP" else SubVPSDE(start=1e-2)
    flow = ScoreFlow((1, 8, 8), hidden_features=16, sde=diffusion, dropout=0.1, ode=ODE)
    if not choice.is_variational:
        return DequantizedFlow(flow, UniformDequantization(17))
    noise = NeuralSplineFlow(
        64, context_features=64, transforms=2, hidden_features=64, bins=4, dropout=0.1
    )
    return DequantizedFlow(flow, VariationalDequantization(noise, 17))


def ablation_run(choice: Choice, steps: int) -> dict[str, Any]:
    """Train on digits; what is lost per image, by the equation and by the bound."""
    torch.manual_seed(0)
    data = digits(fractions=(0.8, 0.05, 0.15))
    train, test = data.train.float(), data.test.float()
    model = dequantized(choice)
    flow = model.flow
    settings = {
        "weighting": choice.weighting,
        "importance_sampling": choice.importance_sampling,
    }

    def loss(module: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
        if choice.is_variational:
            return dequantized_training_loss(model, x)
        with torch.no_grad():
            values = model().dequantize(x)[0][0]
        return flow.training_loss(values, **settings)

    result, seconds = spent(
        lambda: fit_density(
            model,
            train,
            loss=loss,
            num_steps=steps,
            batch_size=64,
            learning_rate=2e-3,
            ema_decay=0.998,
            progress=False,
        )
    )
    model.eval()
    with torch.no_grad():
        values, log_density = model().dequantize(test, num_samples=1)
        bound = flow().elbo(values[0], 50).value - log_density[0] - 64 * math.log(17)
        nll = -model().log_prob(test)
    return {
        "bound": float(-bound.mean()),
        "nll": float(nll.mean()),
        "error": standard_error(nll),
        "difference error": standard_error(nll + bound),
        "loss sd": float(result.losses[-steps // 10 :].std()),
        "seconds": seconds,
    }


def ablation(args: argparse.Namespace) -> None:
    steps = args.steps or 2000
    rows = []
    for choice in CHOICES:
        dequantization = "variational" if choice.is_variational else "uniform"
        key = f"ablation_{choice.sde}_{choice.weighting}_{choice.importance_sampling}"
        result = kept(f"{key}_{dequantization}_{steps}", partial(ablation_run, choice, steps))
        rows.append(
            {
                "model": choice.label,
                "SDE": choice.sde,
                "dequantised": dequantization,
                "NLL, nats": f"{result['nll']:.1f}",
                "bound, nats": f"{result['bound']:.1f}",
                "standard error": f"{result['error']:.1f}",
                "of bound - NLL": f"{result['difference error']:.2f}",
                "NLL, bits/dim": bits(result["nll"]),
                "bound, bits/dim": bits(result["bound"]),
                "sd of the loss": f"{result['loss sd']:.1f}",
                "CPU s": f"{result['seconds']:.0f}",
            }
        )
    how = f"{threads_in_words(1)}, {steps} steps of 64 digits"
    write_table("diffusion_ablation", rows, how, [*PACKAGES, "scikit-learn"])


def bits(nats: float) -> str:
    return f"{float(bits_per_dimension(torch.tensor(-nats), 64)):.3f}"


# -- densities beside those of other models -------------------------------------------------------


class Pictures(NamedTuple):
    """Training and test rows in their own units, and what to add to log-densities."""

    train: Tensor
    validation: Tensor
    test: Tensor
    offset: float


def pictures(name: str) -> Pictures:
    """The data, splits and dequantisation of the benchmark of spline flows."""
    data = IMAGES[name][0]()
    train, validation = data.train, data.validation
    if validation is None:  # rows of the training part that are not trained on
        train, validation = train[500:], train[:500]
    if name == "patches":
        return Pictures(train, validation, data.test[:1000], data.offset)
    # images again, of one scale for all pixels
    parts = (x * data.std.float() + data.mean.float() for x in (train, validation, data.test))
    rows = [x.reshape(-1, 1, 8, 8) for x in parts]
    return Pictures(*rows, data.offset + float(data.std.log().sum()))


def image_flow(name: str) -> ScoreFlow:
    if name == "patches":
        return ScoreFlow(63, hidden_features=256, sde=VPSDE(start=1e-4), ode=ODE)
    return ScoreFlow((1, 8, 8), hidden_features=16, sde=VPSDE(start=1e-3), dropout=0.1, ode=ODE)


TRAINING: dict[str, dict[str, Any]] = {
    "patches": {"num_steps": 3000, "batch_size": 256, "learning_rate": 2e-3},
    "digits": {"num_steps": 1500, "batch_size": 64, "learning_rate": 2e-3},
}


def image_run(name: str, training: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    data, flow = pictures(name), image_flow(name)
    # at many times for each row, so that the best weights are not those of lucky ones
    repeats = max(1, REPEATS * 180 // len(data.validation))
    validation = data.validation.repeat(repeats, *[1] * (data.test.dim() - 1))
    result, seconds = spent(
        lambda: fit_density(
            flow,
            data.train,
            validation=validation,
            loss=ScoreFlow.training_loss,
            ema_decay=0.998,
            evaluate_every=200,
            progress=False,
            **training,
        )
    )
    flow.eval()
    with torch.no_grad():
        found = flow().density(data.test)
        bound = flow().elbo(data.test, 50).value
    return {
        "log_prob": float(found.log_prob.mean()) + data.offset,
        "error": standard_error(found.log_prob),
        "bound": float(bound.mean()) + data.offset,
        "bound error": standard_error(bound),
        "evaluations": float(found.num_evaluations.double().mean()),
        "parameters": sum(p.numel() for p in flow.parameters()),
        "best step": result.best_step,
        "seconds": seconds,
    }


COLUMNS = (
    "model",
    "parameters",
    "test log-likelihood, nats",
    "nats per dimension",
    "standard error",
    "weights of step",
    "CPU s",
)


def image_rows(name: str, result: dict[str, Any]) -> list[dict[str, str]]:
    size = 63 if name == "patches" else 64
    others = [*other_rows(f"spline_flow_{name}"), *other_rows(f"aem_{name}")]
    rows = {row["model"]: row for row in others}  # some models are in both tables
    for label, key, error in (
        ("ScoreFlow, log_prob", "log_prob", "error"),
        ("ScoreFlow, elbo", "bound", "bound error"),
    ):
        rows[label] = {
            "model": label,
            "parameters": f"{result['parameters']:,}",
            "test log-likelihood, nats": f"{result[key]:.1f}",
            "standard error": f"{result[error]:.1f}",
            "weights of step": f"{result['best step']}",
            "CPU s": f"{result['seconds']:.0f}",
        }
    for row in rows.values():
        row["nats per dimension"] = f"{float(row['test log-likelihood, nats']) / size:.3f}"
    return [{column: row[column] for column in COLUMNS} for row in rows.values()]


def other_rows(table: str) -> list[dict[str, str]]:
    """Our other models, from the table of another benchmark, if it has been run."""
    path = os.path.join(RESULTS, f"{table}.md")
    if not os.path.exists(path):
        return []
    with open(path) as file:
        lines = [line.strip(" |\n").split(" | ") for line in file if line.startswith("| ")]
    header, _, *body = lines
    rows = [dict(zip(header, values, strict=True)) for values in body]
    return [row for row in rows if row.get("library", "pyro_ext") in ("-", "pyro_ext")]


def images(args: argparse.Namespace) -> None:
    for name in ("patches", "digits"):
        training = TRAINING[name]
        if args.steps:
            training = training | {"num_steps": args.steps}
        steps = training["num_steps"]
        result = kept(f"{name}_{steps}", partial(image_run, name, training))
        how = (
            f"{threads_in_words(1)}; score flow: {steps:,} steps of {training['batch_size']}, "
            f"{result['evaluations']:.0f} evaluations for each log_prob"
        )
        packages = [*PACKAGES, "scikit-learn"]
        write_table(f"diffusion_{name}", image_rows(name, result), how, packages)
