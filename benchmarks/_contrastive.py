"""Runs of likelihood-free inference with pyro_ext and with sbi, on one simulator and setting."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from benchmarks.simulators import TASKS, Task
from pyro_ext import (
    NeuralLikelihoodEstimator,
    NeuralPosteriorEstimator,
    NeuralRatioEstimator,
)
from pyro_ext.infer.contrastive.inspection import inspect_model
from pyro_ext.infer.contrastive.simulator import Simulator
from pyro_ext.infer.contrastive.sites import unconstrain

__all__ = ["METHODS", "NUM_DRAWS", "PACKAGES", "Run", "Setting", "estimator_for"]

NUM_DRAWS = 1000
METHODS = ("npe", "nre", "nle")
# the event-by-event simulator advances all its runs at once, and draws by rejection
WAYS = {"lotka_volterra_jump": "plate"}


class Setting(NamedTuple):
    """What is run."""

    task: str
    method: str
    atoms: int
    rounds: int
    simulations: int
    """Of each round."""
    seed: int

    @property
    def key(self) -> str:
        """What runs with different seeds have in common."""
        return json.dumps(self._replace(seed=0))


class Run(NamedTuple):
    """Draws of every round, and what they cost."""

    draws: list[Tensor]
    """Of the posterior after each round, shape ``(draws, d)``; those of all rounds but the last
    are what the next one was simulated with."""
    distances: list[float]
    """Median distance between the observation and the simulations of each round."""
    cpu_training: list[float]
    """Processor time in seconds that was spent on training up to the end of each round."""
    acceptance: list[float]
    """Part of a flow's draws that is inside the prior's support after each round."""
    cpu_sampling: float
    """Processor time of the draws after the last round."""
    num_failed: int


def estimator_for(setting: Setting, task: Task) -> Any:
    """An estimator of this package with its defaults."""
    options: dict[str, Any] = {
        "observed": ["x"],
        "latents": ["theta"],
        "vectorize": WAYS.get(task.name),
    }
    if setting.method == "npe":
        return NeuralPosteriorEstimator(task.model, num_atoms=setting.atoms, **options)
    if setting.method == "nre":
        return NeuralRatioEstimator(task.model, num_atoms=setting.atoms, **options)
    return NeuralLikelihoodEstimator(task.model, **options)


def run_ours(setting: Setting) -> Run:
    """Estimators of this package, with their defaults."""
    task = TASKS[setting.task]
    observation = task.observation().float()
    estimator = estimator_for(setting, task)
    run = Run([], [], [], [], 0.0, 0)
    posterior = None
    for i in range(setting.rounds):
        new = estimator.simulate(setting.simulations, posterior)
        if i:
            run.draws.append(new.latents["theta"])
        run.distances.append(_distance(new.observations["x"], observation))
        with _Clock(run):
            estimator.fit()
        posterior = estimator.posterior(observation)
        if setting.method == "npe":
            draws = posterior.sample(NUM_DRAWS)["theta"]
            run.acceptance.append(_fraction_inside(_prior(task), draws))
    start = time.process_time()
    run.draws.append(posterior.sample(NUM_DRAWS)["theta"])
    return run._replace(
        cpu_sampling=time.process_time() - start, num_failed=estimator.simulations.num_failed
    )


def run_sbi(setting: Setting) -> Run:
    """The same with sbi, in the settings of Durkan et al. 2020."""
    from sbi.inference import NLE, NPE_C, NRE_B

    task = TASKS[setting.task]
    observation = task.observation().float()
    structure = inspect_model(task.model, ["x"], ["theta"], ())
    simulator = Simulator(task.model, structure, WAYS.get(task.name))
    prior = _prior_for_sbi(task)
    fit = {
        "training_batch_size": 100,
        "learning_rate": 5e-4,
        "stop_after_epochs": 20,
        "validation_fraction": 0.1,
    }
    inference: Any
    if setting.method == "npe":
        inference = NPE_C(prior, density_estimator="maf", show_progress_bars=False)
    elif setting.method == "nre":
        inference = NRE_B(prior, classifier="resnet", show_progress_bars=False)
    else:
        inference = NLE(prior, density_estimator="maf", show_progress_bars=False)
    sampler: dict[str, Any] = {}
    if setting.method != "npe" or setting.rounds > 1:
        # what sbi advises where it would reject nearly all draws of a flow
        chains = {"num_chains": 100, "warmup_steps": 50, "thin": 5}
        sampler = {"mcmc_method": "slice_np_vectorized", "mcmc_parameters": chains}
        if setting.method == "npe":
            sampler["sample_with"] = "mcmc"
    run = Run([], [], [], [], 0.0, 0)
    num_failed = 0
    proposal: Any = prior
    for i in range(setting.rounds):
        quiet = {} if i == 0 else {"show_progress_bars": False}
        theta = proposal.sample((setting.simulations,), **quiet)
        if i:
            run.draws.append(theta)
        observed = simulator.simulate(unconstrain({"theta": theta}, structure)).observations["x"]
        run.distances.append(_distance(observed, observation))
        x = observed.flatten(1).float()
        num_failed += int((~x.isfinite().all(1)).sum())
        # sbi refuses failed simulations in ratio estimation, unless told to leave them out
        added = {"proposal": proposal} if setting.method == "npe" else {"exclude_invalid_x": True}
        # and NPE of the first round is maximum likelihood
        atoms = setting.method == "nre" or (setting.method == "npe" and i > 0)
        with _Clock(run):
            network = inference.append_simulations(theta, x, **added).train(
                **fit, **({"num_atoms": setting.atoms} if atoms else {})
            )
            proposal = inference.build_posterior(**sampler)
        proposal.set_default_x(observation.reshape(-1))
        if setting.method == "npe":
            with torch.no_grad():
                draws = network.sample((NUM_DRAWS,), condition=observation.reshape(1, -1))
            run.acceptance.append(_fraction_inside(_prior(task), draws[:, 0]))
    start = time.process_time()
    run.draws.append(proposal.sample((NUM_DRAWS,), show_progress_bars=False))
    return run._replace(cpu_sampling=time.process_time() - start, num_failed=num_failed)


PACKAGES: dict[str, Callable[[Setting], Run]] = {"pyro_ext": run_ours, "sbi": run_sbi}


class _Clock:
    """Add processor time to that of the rounds before."""

    def __init__(self, run: Run) -> None:
        self.times = run.cpu_training

    def __enter__(self) -> None:
        self.start = time.process_time()

    def __exit__(self, *_: object) -> None:
        spent = time.process_time() - self.start
        self.times.append(spent + (self.times[-1] if self.times else 0.0))


def _prior_for_sbi(task: Task) -> Any:
    """The distribution of the latent site, which for a box has to be sbi's own."""
    from sbi.utils import BoxUniform

    prior = _prior(task)
    base = getattr(prior, "base_dist", prior)
    if isinstance(base, torch.distributions.Uniform):
        return BoxUniform(base.low, base.high)
    return prior


def _prior(task: Task) -> Any:
    with torch.no_grad():
        return pyro.poutine.trace(task.model).get_trace().nodes["theta"]["fn"]


def _fraction_inside(prior: Any, draws: Tensor) -> float:
    is_inside: Tensor = prior.support.check(draws)
    return float(is_inside.double().mean())


def _distance(observed: Tensor, observation: Tensor) -> float:
    difference = (observed - observation).flatten(1)
    return float(difference[difference.isfinite().all(1)].norm(dim=1).median())
