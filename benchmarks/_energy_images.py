"""Energy machines on images: patches of photographs, digits, and the latent vectors of digits.

Data, splits and dequantisation are those of ``spline_flow_densities.py images`` and of
``spline_flow_vae.py``, and the rows of spline flows come from the tables of the former.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import time
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from benchmarks._energy import (
    LOSS,
    SMALL,
    count,
    difference,
    fit_for,
    weights_path,
    with_error,
)
from benchmarks._fit import Data
from benchmarks._report import RESULTS, progress, threads_in_words, write_table
from benchmarks._runs import kept, standard_error
from benchmarks._tutorials import load_siblings
from benchmarks.spline_flow_densities import IMAGES
from pyro_ext.distributions import (
    AutoregressiveEnergyMachine,
    KernelDensityAEM,
    NeuralSplineFlow,
)

PACKAGES = ["torch", "pyro-ppl", "scikit-learn"]
NUM_EXACT = 360
NUM_DRAWS, NUM_NODES = 50, 100
COLUMNS = (
    "model",
    "parameters",
    "test log-likelihood, nats",
    "standard error",
    "weights of step",
    "CPU s",
)
# a wider masked network than in the plane, and fewer waves; digits are few: without dropout the
# likelihood of the validation part was best after a fifth of the steps, and 4 nats lower
SETTINGS: dict[str, dict[str, Any]] = {
    "patches": {"hidden_features": 256, "frequencies": 2, "max_conditionals": 2048},
    "digits": {
        "hidden_features": 128,
        "frequencies": 1,
        "max_conditionals": 2048,
        "dropout": 0.3,
    },
}
TRAINING: dict[str, dict[str, Any]] = {
    "patches": {"batch": 256, "learning_rate": 1e-3},
    "digits": {"batch": 128, "learning_rate": 1e-3, "weight_decay": 1e-4},
}


# -- densities of images --------------------------------------------------------------------------


def image_machine_run(name: str, seconds: float, steps: int) -> dict[str, Any]:
    """Train a machine; values of the test rows."""
    data = IMAGES[name][0]()
    validation = data.validation
    if validation is None:  # rows of the training part that are not trained on
        validation = data.train[:500]
        data = data._replace(train=data.train[500:])
    torch.manual_seed(0)
    settings = {**SMALL, **SETTINGS[name]}
    aem = AutoregressiveEnergyMachine(data.train.shape[1], monitor_every=250, **settings)
    done = fit_for(
        seconds,
        aem,
        data.train,
        steps=steps,
        loss=LOSS,
        validation=validation[:500],
        evaluate_every=100,
        **TRAINING[name],
    )
    aem.eval()
    torch.save(aem.state_dict(), weights_path(name))
    progress(f"  {done}")
    return {**scores(aem, data, validation[:500]), **done, "parameters": count(aem)}


@torch.no_grad()
def scores(aem: AutoregressiveEnergyMachine, data: Data, validation: Tensor) -> dict[str, Any]:
    """Mean log-densities of test rows, in nats; quadrature on the first of them."""
    start = time.process_time()
    few = data.test[:NUM_EXACT]
    proposal = aem().proposal_log_prob(data.test).double()
    drawn = aem().log_prob(data.test, num_importance_samples=NUM_DRAWS).double()
    exact = aem().log_prob(few, exact=True).double()
    optimism = drawn[: len(few)] - exact
    thousand = aem().log_prob(few, num_importance_samples=1000).double()
    progress(f"  quadrature and estimates after {time.process_time() - start:.0f} s")
    kernels = KernelDensityAEM(aem, num_nodes=NUM_NODES)
    kernels.fit(validation)
    smooth = kernels().log_prob(few).double()
    # what the estimates are wrong by, on the rows with quadrature, corrects them on all
    corrected = drawn - optimism.mean()
    kde_difference = smooth - exact
    return {
        "AEM": float(corrected.mean()) + data.offset,
        "AEM error": standard_error(corrected),
        "proposal": float(proposal.mean()) + data.offset,
        "proposal error": standard_error(proposal),
        "AEM-KDE": float(corrected.mean() + kde_difference.mean()) + data.offset,
        "AEM-KDE error": math.hypot(standard_error(corrected), standard_error(kde_difference)),
        "gain": float((drawn - proposal).mean() - optimism.mean()),
        "gain error": standard_error(drawn - proposal),
        "optimism": float(optimism.mean()),
        "optimism error": standard_error(optimism),
        "optimism, 1,000 draws": difference(thousand, exact),
        "rows with quadrature": len(few),
        "evaluation": time.process_time() - start,
    }


def image_rows(name: str, run: dict[str, Any]) -> list[dict[str, str]]:
    """Spline flows, then the machine, its proposal and its kernels."""
    rows = spline_rows(name)
    for label, key in {
        "ResMADE with Gaussians (the proposal)": "proposal",
        "AEM-KDE": "AEM-KDE",
        "AEM": "AEM",
    }.items():
        values = (
            label,
            f"{run['parameters']:,}",
            f"{run[key]:.1f}",
            f"{run[f'{key} error']:.1f}",
            f"{run['best step']:,}",
            f"{run['seconds']:.0f}",
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def spline_rows(name: str) -> list[dict[str, str]]:
    """Those of the Gaussian and of our spline flows, from the table of that benchmark."""
    with open(os.path.join(RESULTS, f"spline_flow_{name}.md")) as file:
        lines = [line.strip(" |\n").split(" | ") for line in file if line.startswith("| ")]
    header, _, *body = lines
    rows = [dict(zip(header, values, strict=True)) for values in body]
    ours = [each for each in rows if each["library"] in ("-", "pyro_ext")]
    return [{column: each[column] for column in COLUMNS} for each in ours]


def images(name: str, args: argparse.Namespace) -> None:
    run = kept(
        f"aem_{name}_{args.seconds:.0f}",
        functools.partial(image_machine_run, name, args.seconds, args.steps),
    )
    how = (
        f"{threads_in_words(1)}; energy machine: {run['steps']:,} steps, {NUM_DRAWS} draws less "
        f"{run['optimism']:.3f} ± {run['optimism error']:.3f} nats, by which they are above "
        f"quadrature on {run['rows with quadrature']} rows (1,000 draws: "
        f"{with_error(*run['optimism, 1,000 draws'], digits=4)}); "
        f"{with_error(run['gain'], run['gain error'])} nats above its proposal"
    )
    write_table(f"aem_{name}", image_rows(name, run), how, PACKAGES)


def patches(args: argparse.Namespace) -> None:
    images("patches", args)


def digits(args: argparse.Namespace) -> None:
    images("digits", args)


# -- priors of an autoencoder ---------------------------------------------------------------------

DRAWS_PER_IMAGE, BOUND_DRAWS = 160, 50
NORMAL = "normal prior and posterior"


class Prior(nn.Module):
    """A prior from the log-density of a module; draws are not needed here."""

    def __init__(self, density: nn.Module, kind: str) -> None:
        super().__init__()
        self.density, self.kind = density, kind

    def log_prob(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, z.shape[-1])
        if self.kind == "proposal":
            values = self.density().proposal_log_prob(rows)
        elif self.kind == "AEM":
            values = self.density().log_prob(rows, num_importance_samples=NUM_DRAWS)
        else:
            values = self.density().log_prob(rows)
        return values.reshape(z.shape[:-1])


def vae_run(seconds: float, steps: int) -> dict[str, Any]:
    """Train an autoencoder with a normal prior, then other priors on its latent vectors."""
    (autoencoder,) = load_siblings("spline_flows", "vae")
    pixels = autoencoder.pixel_probabilities()
    generator = torch.Generator().manual_seed(0)  # the same pixels as for spline flows
    validation = autoencoder.binarize(pixels.validation, generator)
    test = autoencoder.binarize(pixels.test, generator)
    pyro.set_rng_seed(0)
    vae = autoencoder.build(autoencoder.MODELS[NORMAL])
    history = autoencoder.train(vae, pixels.train, validation, autoencoder.Training())
    data, held_out = (latent(vae, part) for part in (pixels.train, pixels.validation))
    progress(f"  autoencoder after {history.cpu_seconds:.0f} s")

    torch.manual_seed(0)
    aem = AutoregressiveEnergyMachine(data.shape[1], **{**SMALL, "frequencies": 2})
    training = {"validation": held_out[:2000], "evaluate_every": 250}
    done = fit_for(
        seconds, aem, data, batch=256, learning_rate=2e-3, steps=steps, loss=LOSS, **training
    )
    kernels = KernelDensityAEM(aem.eval(), num_nodes=NUM_NODES)
    kernels.fit(held_out[:1000])
    torch.manual_seed(0)
    flow = NeuralSplineFlow(data.shape[1], transforms=5, hidden_features=64)
    flow_done = fit_for(done["seconds"], flow, data, batch=256, learning_rate=1e-3, **training)
    kinds = {
        "normal": (vae.prior, "", 0.0, 0),
        "RQ-NSF (C)": (flow.eval(), "", flow_done["seconds"], count(flow)),
        "proposal": (aem, "proposal", done["seconds"], count(aem)),
        "AEM-KDE": (kernels, "", done["seconds"], count(aem)),
        "AEM": (aem, "AEM", done["seconds"], count(aem)),
    }
    results: dict[str, Any] = {"steps": done["steps"], "autoencoder": history.cpu_seconds}
    for name, (density, kind, spent, parameters) in kinds.items():
        prior = Prior(density, kind)
        weights = log_weights(vae, prior, test)
        results[name] = {
            "elbo": weights.mean(0).tolist(),
            "log p": (weights.logsumexp(0) - math.log(len(weights))).tolist(),
            "seconds": spent,
            "parameters": parameters,
        }
        progress(f"  {name}: {float(weights.mean()):.2f}")
    z = latent(vae, pixels.test)[:NUM_EXACT]
    with torch.no_grad():
        exact = aem().log_prob(z, exact=True)
        for number in (NUM_DRAWS, 1000):
            drawn = aem().log_prob(z, num_importance_samples=number)
            results[f"optimism, {number:,} draws"] = difference(drawn, exact)
    return results


@torch.no_grad()
def latent(vae: Any, probabilities: Tensor) -> Tensor:
    """Draws of the aggregate posterior (Nash and Durkan 2019, eq. 11), pixels drawn anew."""
    x = torch.bernoulli(probabilities.repeat(DRAWS_PER_IMAGE, 1))
    return torch.cat([vae.posterior(vae.encoder(part)).sample() for part in x.split(20_000)])


@torch.no_grad()
def log_weights(vae: Any, prior: Prior, x: Tensor) -> Tensor:
    """Log importance weights with another prior, the same draws for all, ``(draws, n)``."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(1)
    posterior = vae.posterior(vae.encoder(x))
    z = posterior.sample((BOUND_DRAWS,))
    torch.set_rng_state(generator_state)
    return prior.log_prob(z) + vae.pixels(z).log_prob(x) - posterior.log_prob(z)


def vae(args: argparse.Namespace) -> None:
    """Nash and Durkan 2019, table 2."""
    run = kept(f"aem_vae_{args.seconds:.0f}", functools.partial(vae_run, args.seconds, args.steps))
    normal, rows = torch.tensor(run["normal"]["log p"]), []
    for label, name in {
        "normal": "normal",
        "RQ-NSF (C)": "RQ-NSF (C)",
        "ResMADE with Gaussians (the proposal)": "proposal",
        "AEM-KDE": "AEM-KDE",
        "AEM": "AEM",
    }.items():
        found = run[name]
        elbo, log_p = torch.tensor(found["elbo"]), torch.tensor(found["log p"])
        rows.append(
            {
                "prior": label,
                "test ELBO": with_error(float(elbo.mean()), standard_error(elbo)),
                "log p(x)": with_error(float(log_p.mean()), standard_error(log_p)),
                "gain in log p(x)": "-"
                if name == "normal"
                else with_error(*difference(log_p, normal)),
                "parameters of the prior": f"{found['parameters']:,}",
                "CPU s": f"{found['seconds']:.0f}",
            }
        )
    how = (
        f"{threads_in_words(1)}, autoencoder trained with the normal prior, the others afterwards "
        f"on its latent vectors; log p(x) from {BOUND_DRAWS} draws; energy machine: "
        f"{run['steps']:,} steps, its log-densities from {NUM_DRAWS} draws are "
        f"{with_error(*run[f'optimism, {NUM_DRAWS} draws'], digits=4)} nats above quadrature, "
        f"from 1,000 draws {with_error(*run['optimism, 1,000 draws'], digits=4)}"
    )
    write_table("aem_vae", rows, how, PACKAGES)
