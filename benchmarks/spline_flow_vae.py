"""Variational autoencoders with flows as prior and posterior (Durkan et al. 2019, section 5.2).

Claim: spline flows as prior and posterior raise the likelihood of held-out images over normal
distributions, and at least as much as affine flows that are trained for as many steps.

    python benchmarks/spline_flow_vae.py
    python benchmarks/spline_flow_vae.py --seeds 0 1 2

The images are scikit-learn's digits, 8 by 8 pixels, drawn black or white anew in every step; the
model is that of the tutorial ``spline_flows``. Training follows appendix B.2: Adam, its step size
falling to zero along half a cosine, the Kullback-Leibler term weighted from 0.5 to 1 over the
first tenth, weights chosen on the validation part. One thread, float32, values in nats.

Every finished run is a file in ``benchmarks/output/spline_flow_vae``: started again with the same
settings, the script does what is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tutorials", "spline_flows")]

import pyro
import torch
import vae as autoencoder
from torch import Tensor

from benchmarks._report import OUTPUT, progress, threads_in_words, write_table

NAME = "spline_flow_vae"
NORMAL = "normal prior and posterior"
NUM_ELBO_SAMPLES = 100
NUM_IMPORTANCE_SAMPLES = 1000


def run(name: str, seed: int, training: autoencoder.Training, transforms: int) -> dict[str, Any]:
    """Train and evaluate one model, or load what an earlier run has found."""
    settings = f"{name}, seed {seed}, {transforms} transforms, {tuple(training)}"
    letters = (c if c.isalnum() or c in ".-" else "_" for c in settings)
    path = os.path.join(OUTPUT, NAME, "".join(letters) + ".pt")
    if os.path.exists(path):
        return torch.load(path)
    progress(settings)
    pixels = autoencoder.pixel_probabilities()
    generator = torch.Generator().manual_seed(0)  # the same pixels for all models and seeds
    validation = autoencoder.binarize(pixels.validation, generator)
    test = autoencoder.binarize(pixels.test, generator)
    pyro.set_rng_seed(seed)
    vae = autoencoder.build(autoencoder.MODELS[name], transforms=transforms)
    history = autoencoder.train(vae, pixels.train, validation, training)
    start = time.process_time()
    result = {
        "elbo": autoencoder.elbo(vae, test, NUM_ELBO_SAMPLES),
        "log p": autoencoder.importance_weighted(vae, test, NUM_IMPORTANCE_SAMPLES),
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "best step": history.best_step,
        "validation": history.validation_elbos,
        "training": history.cpu_seconds,
        "evaluation": time.process_time() - start,
    }
    values = ", ".join(f"{float(result[key].mean()):.2f}" for key in ("elbo", "log p"))
    progress(f"    {values}; {result['training']:.0f} s, {result['evaluation']:.0f} s")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    torch.save(result, path)
    return result


def table_row(
    name: str, results: list[dict[str, Any]], normal: list[dict[str, Any]]
) -> dict[str, str]:
    """Means over images and seeds; the standard errors are those over images."""
    elbo, log_p = (torch.stack([each[key] for each in results]) for key in ("elbo", "log p"))
    log_p_of_normal = torch.stack([each["log p"] for each in normal])
    by_seed = (log_p - log_p_of_normal).mean(1)
    row = {
        "prior and posterior": name,
        "test ELBO": with_standard_error(elbo.mean(0)),
        "log p(x)": with_standard_error(log_p.mean(0)),
        "gain in log p(x)": "-",
        "of each seed": "-",
        "parameters": f"{results[0]['parameters']:,}",
        "weights of step": ", ".join(f"{each['best step']}" for each in results),
        "CPU s": f"{sum(each['training'] for each in results) / len(results):.0f}",
    }
    if name != NORMAL:
        row["gain in log p(x)"] = with_standard_error((log_p - log_p_of_normal).mean(0))
        row["of each seed"] = ", ".join(f"{gain:.2f}" for gain in by_seed.tolist())
    return row


def with_standard_error(values: Tensor) -> str:
    return f"{values.mean():.2f} ± {values.std() / len(values) ** 0.5:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--transforms", type=int, default=5, help="steps of each flow")
    args = parser.parse_args()
    torch.set_num_threads(1)
    training = autoencoder.Training(num_steps=args.steps)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in autoencoder.MODELS}
    for seed in args.seeds:
        for name, of_model in results.items():
            of_model.append(run(name, seed, training, args.transforms))
    rows = [table_row(name, of_model, results[NORMAL]) for name, of_model in results.items()]
    seeds = f"{len(args.seeds)} seeds" if len(args.seeds) > 1 else "one seed"
    how = f"{threads_in_words(1)}, {args.steps:,} steps of {training.batch_size} images, {seeds}"
    write_table(NAME, rows, how, ["torch", "pyro-ppl", "scikit-learn"])


if __name__ == "__main__":
    main()
