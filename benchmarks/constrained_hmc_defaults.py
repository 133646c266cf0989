"""ConstrainedHMC as it comes, beside the best of many settings made by hand.

Claim: with the default settings it has at least half as many effective draws per integrator step,
and per second, as with the best fixed step size and trajectory length of a grid.

    python benchmarks/constrained_hmc_defaults.py [--problems sphere series] [--seeds 3]

The problems are those whose exact posteriors the tests know. An effective sample size is the
smallest of bulk, tail and sd over all numbers that are looked at. Every setting has 16 chains and
as many draws; warm-up is not counted. All that is shown is from several seeds: effective draws of
all of them by steps of all of them, and the share of the best of the worst seed. The best two of
the grid run again with these seeds, and this counts, because the largest of many noisy numbers is
too large.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import torch

from benchmarks._report import progress, write_table
from pyro_ext import ConstrainedHMC, ConstrainedNUTS
from tutorials.lotka_volterra import simulator

CHAINS, WARMUP = 16, 100
STEP_SIZES = (0.15, 0.3, 0.6, 1.0, 1.5, 2.2)
LENGTHS = (0.6, 1.1, 1.57, 2.4, 4.0)
MOST_STEPS = 12


# -- problems -----------------------------------------------------------------------------------


class Problem(NamedTuple):
    model: Callable[[], Any]
    data: dict[str, Any]
    names: tuple[str, ...]  # sites whose effective sample sizes count
    draws: int = 150
    step_sizes: tuple[float, ...] = STEP_SIZES
    most_steps: int = MOST_STEPS


def linear() -> Problem:
    """Thirty normal inputs of different widths, four linear outputs."""
    generator = torch.Generator().manual_seed(30)
    loc, width = torch.randn(30, generator=generator), torch.rand(30, generator=generator)
    matrix = torch.randn(4, 30, generator=generator)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(loc, 0.5 + 2 * width).to_event(1))
        pyro.deterministic("y", matrix @ x)

    return Problem(model, {"y": torch.tensor([2.0, -1.0, 3.0, 0.5])}, ("x",))


def sphere() -> Problem:
    """Uniform on a sphere, where the energy is constant."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.deterministic("square", x.square().sum())

    return Problem(model, {"square": torch.tensor(2.9)}, ("x",), draws=100)


def torus() -> Problem:
    """Normal inputs at a distance from a ring: a density that is higher on one side."""

    def model() -> None:
        loc, width = torch.tensor([0.8, 0.0, 0.4]), torch.tensor([1.0, 1.5, 1.0])
        x = pyro.sample("x", dist.Normal(loc, width).to_event(1))
        pyro.deterministic("distance", (x[:2].norm() - 1.5).square() + x[2].square())

    return Problem(model, {"distance": torch.tensor(0.64)}, ("x",), draws=80)


def skewed() -> Problem:
    """A bent function of one input with noise whose scale depends on it."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        spread = 0.5 + 0.4 * torch.sigmoid(3 * z)
        pyro.deterministic("y", 0.7 * z.exp() - 0.4 * z.square() + spread * noise)

    return Problem(model, {"y": torch.tensor(1.5)}, ("z", "noise"))


def summaries() -> Problem:
    """Mean and variance of five normals, whose location and scale are unknown."""

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        log_scale = pyro.sample("log_scale", dist.Normal(0.0, 0.5))
        x = pyro.sample("x", dist.Normal(loc, log_scale.exp()).expand([5]).to_event(1))
        pyro.deterministic("summaries", torch.stack([x.mean(), x.var()]))

    return Problem(model, {"summaries": torch.tensor([1.2, 0.8])}, ("loc", "log_scale", "x"))


def pinned() -> Problem:
    """An observed site pins one of three inputs down to a hundredth of its prior width."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("x", dist.Normal(z[1], 0.01), obs=torch.tensor(0.3))
        pyro.deterministic("y", z[0] + z[1] + z[2])

    steps = (0.006, 0.012, 0.018)
    return Problem(
        model, {"y": torch.tensor(1.0)}, ("z",), draws=60, step_sizes=steps, most_steps=200
    )


def series() -> Problem:
    """An autoregression with thirty steps of two outputs, and a site per step."""
    generator = torch.Generator().manual_seed(3)
    data, y = {}, torch.zeros(2)
    for t in range(30):
        noise = torch.randn(2, generator=generator)
        y = 0.7 * y + 0.4 + 0.5 * torch.stack([noise[0], 0.6 * noise[0] + noise[1]])
        data[f"y_{t}"] = y

    def model() -> None:
        rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        y = torch.zeros(2)
        for t in range(30):
            n = pyro.sample(f"n_{t}", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            mixed = torch.stack([n[0], 0.6 * n[0] + n[1]])
            y = pyro.deterministic(f"y_{t}", rate * y + level + 0.5 * mixed)

    return Problem(model, data, ("rate", "level"))


def lotka_volterra() -> Problem:
    """Section 7.1 of the paper, with a site per step."""
    data = simulator.data_by_steps(simulator.observed_data())
    return Problem(simulator.model_by_steps, data, ("theta",))


PROBLEMS = {
    "linear": linear,
    "sphere": sphere,
    "torus": torus,
    "skewed": skewed,
    "summaries": summaries,
    "pinned": pinned,
    "series": series,
    "Lotka-Volterra": lotka_volterra,
}


# -- runs ---------------------------------------------------------------------------------------


class Efficiency(NamedTuple):
    ess: float
    steps: int
    seconds: float  # of processor time

    @property
    def per_step(self) -> float:
        """Effective draws per thousand integrator steps of a chain."""
        return 1e3 * self.ess / self.steps

    @property
    def per_second(self) -> float:
        return self.ess / self.seconds


def pooled(runs: list[Efficiency]) -> Efficiency:
    """Effective draws of several runs by what they took together."""
    return Efficiency(*map(sum, zip(*runs, strict=True)))


def measure(problem: Problem, kernel_class: Any, seed: int, **settings: Any) -> Efficiency:
    """Sample with some settings, and count what the draws after warm-up took."""
    pyro.set_rng_seed(seed)
    kernel = kernel_class(pyro.condition(problem.model, problem.data), **settings)
    kernel.num_chains = CHAINS
    warmup = WARMUP if settings.get("adapt_step_size", True) else 20
    kernel.setup(warmup)
    for _ in range(warmup):
        kernel.sample({})
    start = time.process_time()
    draws = []
    for _ in range(problem.draws):
        values = kernel.sample({})
        draws.append(torch.cat([values[name].reshape(CHAINS, -1) for name in problem.names], -1))
    seconds = time.process_time() - start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of chains that never move, with steps that are too long
        kernel.cleanup()
        ess = smallest_ess(torch.stack(draws, 1).numpy())
    steps = sum(int(chain["num_steps"].sum()) for chain in kernel.chain_diagnostics())
    return Efficiency(ess, steps, seconds)


def smallest_ess(draws: np.ndarray) -> float:
    """Of bulk, tail and sd, over all numbers, ``(chains, draws, numbers)``."""
    sizes = [
        float(arviz.ess(draws[:, :, i], method=method))
        for i in range(draws.shape[-1])
        for method in ("bulk", "tail", "sd")
    ]
    return float(np.nan_to_num(min(sizes, key=lambda size: size if size == size else 0.0)))


Setting = tuple[float, float]  # step size and trajectory length


def best_by_hand(problem: Problem, seeds: range) -> list[tuple[Setting, Efficiency]]:
    """The best of a grid of fixed step sizes and trajectory lengths, per step and per second."""
    quick = problem._replace(draws=problem.draws // 2)
    grid = [
        (step, length)
        for step in problem.step_sizes
        for length in LENGTHS
        if step <= length <= problem.most_steps * step
    ]
    found = {setting: by_hand(quick, 0, setting) for setting in grid}
    again: dict[Setting, Efficiency] = {}
    for key in (lambda s: found[s].per_step, lambda s: found[s].per_second):
        for setting in sorted(grid, key=key)[-2:]:
            if setting not in again:
                again[setting] = pooled([by_hand(problem, seed, setting) for seed in seeds])
    by_step = max(again.items(), key=lambda item: item[1].per_step)
    return [by_step, max(again.items(), key=lambda item: item[1].per_second)]


def by_hand(problem: Problem, seed: int, setting: Setting) -> Efficiency:
    step_size, length = setting
    return measure(
        problem,
        ConstrainedHMC,
        seed,
        step_size=step_size,
        trajectory_length=length,
        adapt_step_size=False,
        max_num_steps=2 * problem.most_steps,
    )


def defaults(names: list[str], num_seeds: int) -> None:
    rows, seeds = [], range(1, 1 + num_seeds)
    for name in names:
        problem = PROBLEMS[name]()
        progress(name)
        runs = [measure(problem, ConstrainedHMC, seed) for seed in seeds]
        ours, worst = pooled(runs), min(run.per_step for run in runs)
        nuts = pooled([measure(problem, ConstrainedNUTS, seed) for seed in seeds])
        (setting, by_step), (_, by_second) = best_by_hand(problem, seeds)
        rows.append(
            {
                "problem": name,
                "ESS": f"{ours.ess / num_seeds:.0f} of {CHAINS * problem.draws}",
                "ESS per 1000 steps": f"{ours.per_step:.3g}",
                "best by hand": f"{by_step.per_step:.3g}",
                "its step size, length": "{:g}, {:g}".format(*setting),
                "share of the best": f"{ours.per_step / by_step.per_step:.2f}",
                "worst seed": f"{worst / by_step.per_step:.2f}",
                "ESS per CPU s": f"{ours.per_second:.3g}",
                "best per CPU s": f"{by_second.per_second:.3g}",
                "share of it": f"{ours.per_second / by_second.per_second:.2f}",
                "NUTS, ESS per 1000 steps": f"{nuts.per_step:.3g}",
            }
        )
        note = f"one thread, {num_seeds} seeds"
        write_table("constrained_hmc_defaults", rows, note, ["torch", "pyro-ppl"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    defaults(args.problems, args.seeds)


if __name__ == "__main__":
    main()
