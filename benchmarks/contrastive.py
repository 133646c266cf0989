"""Likelihood-free inference: pyro_ext beside sbi, on simulators with known posteriors.

Claim: draws as close to the exact posterior as sbi's at the same number of simulations, after at
most half the processor time of training.

    python benchmarks/contrastive.py run two_moons npe --simulations 2000
    python benchmarks/contrastive.py run slcp nre --atoms 10 --rounds 5 --simulations 1000
    python benchmarks/contrastive.py suite                 # all of the table, hours
    python benchmarks/contrastive.py table

Both run on the same machine in the same process, one thread, float32, one after the other, with
draws from the same prior: the Pyro model is ours as it is, and is handed to sbi as a prior and a
function. Settings of sbi are those of Durkan et al. 2020 (minibatches of 100, step size 5e-4,
a tenth held out, patience of 20 epochs, a MAF of five layers, a residual network of two blocks of
50); ours are the defaults. ``npe`` is maximum likelihood in the first round and SNPE-C after it,
``nre`` the ratio among K parameters, ``nle`` the likelihood.

Figures: C2ST of 1,000 draws (pyro_ext.diagnostics.classifier_two_sample_test, 1/2 is perfect),
minus the log-density of the true parameters by a Gaussian kernel estimate of the draws, seconds of
processor time. Every finished run is a line of ``benchmarks/output/contrastive.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
from scipy.stats import gaussian_kde
from torch import Tensor

from benchmarks._report import OUTPUT, progress, write_table
from benchmarks.simulators import TASKS, Task, cached_reference
from pyro_ext import (
    NeuralLikelihoodEstimator,
    NeuralPosteriorEstimator,
    NeuralRatioEstimator,
)
from pyro_ext.diagnostics import classifier_two_sample_test
from pyro_ext.infer.contrastive.inspection import inspect_model
from pyro_ext.infer.contrastive.simulator import Simulator

RESULTS_FILE = os.path.join(OUTPUT, "contrastive.jsonl")
NUM_DRAWS = 1000
METHODS = ("npe", "nre", "nle")
# the event-by-event simulator advances all its runs at once, and draws by rejection
WAYS = {"lotka_volterra_jump": "plate"}


class Setting(NamedTuple):
    """One run."""

    task: str
    method: str
    atoms: int
    rounds: int
    simulations: int
    seed: int

    @property
    def key(self) -> str:
        """What runs with different seeds have in common."""
        return json.dumps(self._replace(seed=0))


class Run(NamedTuple):
    """Draws, and what they cost."""

    draws: Tensor
    cpu_training: float
    cpu_sampling: float
    num_failed: int


SUITE = [
    *(Setting("two_moons", m, 10, 1, 2000, s) for s in range(3) for m in ("npe", "nre")),
    *(Setting("two_moons", "nre", k, 1, 2000, 0) for k in (2, 100)),
    Setting("two_moons", "nle", 10, 1, 2000, 0),
    *(Setting("slcp", m, 10, 1, 5000, s) for s in range(3) for m in ("npe", "nre")),
    *(Setting("slcp", m, k, 5, 1000, 0) for k in (2, 10, 100) for m in ("npe", "nre")),
    *(Setting("queue", m, 10, 1, 2000, 0) for m in ("npe", "nre")),
    *(Setting("lotka_volterra_jump", m, 10, 1, 2000, 0) for m in ("npe", "nre")),
]


def run_ours(setting: Setting, task: Task) -> Run:
    """Estimators of this package, with their defaults."""
    options: dict[str, Any] = {
        "observed": ["x"],
        "latents": ["theta"],
        "vectorize": WAYS.get(task.name),
    }
    if setting.method == "npe":
        estimator: Any = NeuralPosteriorEstimator(task.model, num_atoms=setting.atoms, **options)
    elif setting.method == "nre":
        estimator = NeuralRatioEstimator(task.model, num_atoms=setting.atoms, **options)
    else:
        estimator = NeuralLikelihoodEstimator(task.model, **options)
    observation = task.observation().float()
    training = 0.0
    posterior = None
    for _ in range(setting.rounds):
        estimator.simulate(setting.simulations, posterior)
        start = time.process_time()
        estimator.fit()
        training += time.process_time() - start
        posterior = estimator.posterior(observation)
    start = time.process_time()
    draws = posterior.sample(NUM_DRAWS)["theta"]
    sampling = time.process_time() - start
    return Run(draws, training, sampling, estimator.simulations.num_failed)


def run_sbi(setting: Setting, task: Task) -> Run:
    """The same with sbi."""
    from sbi.inference import NLE, NPE_C, NRE_B
    from sbi.utils import BoxUniform

    structure = inspect_model(task.model, ["x"], ["theta"], ())
    simulator = Simulator(task.model, structure, WAYS.get(task.name))
    support = structure.latents[0].support.base_constraint
    prior = BoxUniform(*(side.expand(structure.features) for side in _ends(support)))
    fit = {
        "training_batch_size": 100,
        "learning_rate": 5e-4,
        "stop_after_epochs": 20,
        "validation_fraction": 0.1,
    }
    inference: Any
    if setting.method == "npe":
        inference = NPE_C(prior, density_estimator="maf", show_progress_bars=False)
        fit["num_atoms"] = setting.atoms
    elif setting.method == "nre":
        inference = NRE_B(prior, classifier="resnet", show_progress_bars=False)
        fit["num_atoms"] = setting.atoms
    else:
        inference = NLE(prior, density_estimator="maf", show_progress_bars=False)
    sampler: dict[str, Any] = {}
    if setting.method != "npe":
        chains = {"num_chains": 100, "warmup_steps": 50, "thin": 5}
        sampler = {"mcmc_method": "slice_np_vectorized", "mcmc_parameters": chains}
    observation = task.observation().float().reshape(-1)
    proposal: Any = prior
    training, num_failed = 0.0, 0
    for i in range(setting.rounds):
        quiet = {} if i == 0 else {"show_progress_bars": False}
        theta = proposal.sample((setting.simulations,), **quiet)
        site = structure.latents[0]
        x = simulator.simulate(site.transform.inv(theta)).observations["x"].flatten(1).float()
        num_failed += int((~x.isfinite().all(1)).sum())
        start = time.process_time()
        # sbi refuses failed simulations in ratio estimation, unless told to leave them out
        invalid = {"exclude_invalid_x": True} if setting.method != "npe" else {}
        proposed = {"proposal": proposal} if setting.method == "npe" else {}
        inference.append_simulations(theta, x, **proposed, **invalid).train(
            **(fit if setting.method != "npe" or i else _without(fit, "num_atoms"))
        )
        posterior = inference.build_posterior(**sampler)
        training += time.process_time() - start
        posterior.set_default_x(observation)
        proposal = posterior
    start = time.process_time()
    draws = proposal.sample((NUM_DRAWS,), show_progress_bars=False)
    return Run(draws, training, time.process_time() - start, num_failed)


def _ends(support: Any) -> Iterator[Tensor]:
    yield from (torch.as_tensor(e) for e in (support.lower_bound, support.upper_bound))


def _without(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != name}


PACKAGES: dict[str, Callable[[Setting, Task], Run]] = {"pyro_ext": run_ours, "sbi": run_sbi}


def figures(draws: Tensor, task: Task) -> dict[str, float]:
    """How good draws are."""
    result: dict[str, float] = {}
    if task.reference is not None:
        exact = cached_reference(task, NUM_DRAWS).draws
        torch.manual_seed(0)
        test = classifier_two_sample_test(exact, draws.to(exact))
        result["c2st"] = test.accuracy
    if task.truth is not None:
        density = gaussian_kde(draws.numpy().astype(float).T)
        result["nltp"] = -float(density.logpdf(task.truth.numpy().astype(float))[0])
    return result


def run(package: str, setting: Setting) -> dict[str, Any]:
    """One run, kept in the file of results."""
    task = TASKS[setting.task]
    torch.manual_seed(setting.seed)
    np.random.seed(setting.seed)
    with warnings.catch_warnings():
        if package == "sbi":
            warnings.simplefilter("ignore")
        found = PACKAGES[package](setting, task)
    record = {
        "package": package,
        **setting._asdict(),
        "cpu_training": found.cpu_training,
        "cpu_sampling": found.cpu_sampling,
        "num_failed": found.num_failed,
        **figures(found.draws.detach(), task),
    }
    os.makedirs(OUTPUT, exist_ok=True)
    with open(RESULTS_FILE, "a") as file:
        file.write(json.dumps(record) + "\n")
    progress(json.dumps(record))
    return record


def records() -> list[dict[str, Any]]:
    """All finished runs."""
    if not os.path.exists(RESULTS_FILE):
        return []
    with open(RESULTS_FILE) as file:
        return [json.loads(line) for line in file]


def _setting(record: dict[str, Any]) -> Setting:
    return Setting(**{name: record[name] for name in Setting._fields})


def suite(packages: list[str]) -> None:
    """Every run of the table that is not there yet."""
    done = {(record["package"], _setting(record)) for record in records()}
    for setting in SUITE:
        for package in packages:
            if (package, setting) not in done:
                run(package, setting)


def table() -> None:
    """One row per setting and package, seeds together."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records():
        groups.setdefault((_setting(record).key, record["package"]), []).append(record)
    rows: list[dict[str, str]] = []
    for _, runs in sorted(groups.items()):
        first = runs[0]
        has_atoms = first["method"] == "nre" or (first["method"] == "npe" and first["rounds"] > 1)
        rows.append(
            {
                "task": first["task"],
                "method": first["method"],
                "K": str(first["atoms"]) if has_atoms else "",
                "simulations": f"{first['rounds']} x {first['simulations']}",
                "package": first["package"],
                "C2ST": _mean_and_range(runs, "c2st"),
                "-log p(true)": _mean_and_range(runs, "nltp"),
                "training, CPU s": _mean_and_range(runs, "cpu_training", digits=1),
                "drawing 1,000, CPU s": _mean_and_range(runs, "cpu_sampling", digits=2),
                "failed": str(first["num_failed"]),
                "seeds": str(len(runs)),
            }
        )
    write_table("contrastive", rows, "one thread", ["torch", "pyro-ppl", "sbi"])


def _mean_and_range(runs: list[dict[str, Any]], name: str, digits: int = 3) -> str:
    values = [run[name] for run in runs if name in run]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["run", "suite", "table"], nargs="?", default="suite")
    parser.add_argument("task", choices=list(TASKS), nargs="?")
    parser.add_argument("method", choices=METHODS, nargs="?")
    parser.add_argument("--atoms", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--simulations", type=int, default=1000, help="of each round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packages", nargs="+", choices=list(PACKAGES), default=list(PACKAGES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "run":
        if arguments.task is None or arguments.method is None:
            parser.error("run needs a task and a method")
        for package in arguments.packages:
            setting = Setting(
                arguments.task,
                arguments.method,
                arguments.atoms,
                arguments.rounds,
                arguments.simulations,
                arguments.seed,
            )
            run(package, setting)
    if arguments.command == "suite":
        suite(arguments.packages)
    if records():
        table()


if __name__ == "__main__":
    main()
