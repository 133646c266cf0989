"""Structured Jacobians: what constrained HMC gains where noise is local, beside Mici.

Claim: with one deterministic site per step of the Lotka-Volterra simulator, exact draws of its
posterior come many times faster than from dense Jacobians, and the cost of an integrator step
grows linearly with the length of the series.

    python benchmarks/constrained_hmc_structure.py efficiency
    python benchmarks/constrained_hmc_structure.py length
    python benchmarks/constrained_hmc_structure.py chains

Data, posterior, tolerance and figures are those of ``constrained_hmc_lotka_volterra``, whose Mici
runs are repeated here at their two best settings; everything is of one thread. ``by steps`` has a
site for every step; ``recursion`` is the simulator as it runs, whose Jacobian is triangular;
``at once`` has one site for all, computed from the *observed* states. A single series leaves the
range of numbers after some hundred steps: ``by steps`` and ``at once`` have a new one every 50
steps, ``recursion`` stops at 400.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks._memory import growth
from benchmarks._report import progress, write_table
from pyro_ext import ConstrainedHMC, ConstrainedNUTS
from pyro_ext.infer.constrained_hmc.assembly import (
    Preferences,
    assemble,
    default_tolerances,
    settle,
)
from pyro_ext.infer.constrained_hmc.dynamics.integrator import (
    IntegratorSettings,
    PhaseState,
    leapfrog_step,
)
from pyro_ext.infer.constrained_hmc.dynamics.projection import quasi_newton
from pyro_ext.infer.constrained_hmc.model.constrained_model import ConstrainedModel
from pyro_ext.infer.constrained_hmc.system.constrained_system import project_momentum
from tutorials.lotka_volterra import simulator

NAME = "constrained_hmc_structure"
PACKAGES = ["torch", "pyro-ppl", "mici", "jax"]
TOLERANCE = 1e-9
DATA_SEED = 1238  # of a series that stays moderate for 400 steps


# -- models -------------------------------------------------------------------------------------


def observed_series(form: str, num_steps: int) -> Tensor:
    """One series, or except for the recursion as many of 50 steps as there are steps for."""
    if form == "recursion":
        return simulator.observed_data(DATA_SEED, num_steps)
    seeds = range(num_steps // simulator.NUM_STEPS)
    return torch.cat([simulator.observed_data(simulator.DATA_SEED + seed) for seed in seeds])


def means(form: str, theta: Tensor, x: Tensor) -> Tensor:
    """Noise-free next state of every observed state."""
    series = [x] if form == "recursion" else x.split(simulator.NUM_STEPS)
    previous = torch.cat(
        [torch.cat([x.new_tensor([simulator.INITIAL_POPULATIONS]), each[:-1]]) for each in series]
    )
    prey, predators = previous.unbind(-1)
    birth, predation, death, growth_rate = theta
    prey, predators = (
        prey * (1 + birth - predation * predators),
        predators * (1 - death + growth_rate * prey),
    )
    return torch.stack([prey, predators], -1)


def conditioned_model(form: str, x: Tensor) -> Callable[[], Any]:
    """The simulator in one of three forms, conditioned on a series."""
    num_steps = len(x)
    if form == "by steps":
        data = simulator.data_by_steps(x)
        return pyro.condition(lambda: model_by_steps(num_steps), data)

    def model() -> None:
        theta = pyro.sample("theta", dist.LogNormal(-2.0, 1.0).expand([4]).to_event(1))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand([num_steps, 2]).to_event(2))
        if form == "at once":
            pyro.deterministic("x", means(form, theta, x) + noise)
        else:
            pyro.deterministic("x", simulator.simulate(theta, noise))

    return pyro.condition(model, {"x": x})


def model_by_steps(num_steps: int) -> None:
    """As the simulator's, with a new series every 50 steps."""
    theta = pyro.sample("theta", dist.LogNormal(-2.0, 1.0).expand([4]).to_event(1))
    birth, predation, death, growth_rate = theta
    for t in range(num_steps):
        if t % simulator.NUM_STEPS == 0:
            prey, predators = theta.new_tensor(simulator.INITIAL_POPULATIONS)
        noise = pyro.sample(f"noise_{t}", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        mean = [
            prey * (1 + birth - predation * predators),
            predators * (1 - death + growth_rate * prey),
        ]
        prey, predators = pyro.deterministic(f"x_{t}", torch.stack(mean) + noise)


def true_inputs(form: str, x: Tensor) -> Tensor:
    """Inputs of the true parameters, and of the noise that makes them reproduce the series."""
    theta = torch.tensor(simulator.THETA_TRUE)
    noise = x - means(form, theta, x)
    return torch.cat([simulator.normals_from_parameters(theta), noise.reshape(-1)])


# -- cost of a step -----------------------------------------------------------------------------


class StepCost(NamedTuple):
    report: str
    setup_seconds: float
    seconds: float  # processor time of a step of all chains
    bytes: int  # by which memory grows in a step at most


def step_cost(form: str, num_steps: int, chains: int, structure: str, repeats: int) -> StepCost:
    """Median cost of one integrator step of all chains, at the true parameters."""
    x = observed_series(form, num_steps)
    start = time.process_time()
    model = ConstrainedModel(conditioned_model(form, x), (), {})
    u = true_inputs(form, x).expand(chains, -1).contiguous()
    with torch.no_grad():
        preferences = Preferences(chains, "auto", structure)
        assembly = settle(assemble(model, preferences), u, preferences)
        setup = time.process_time() - start
        system, scale = assembly.system, torch.ones(model.dim)
        settings = IntegratorSettings(
            quasi_newton, None, default_tolerances(model, TOLERANCE, 50), num_inner_steps=1
        )
        point = system.point(u, scale)

        def step() -> None:
            momentum = project_momentum(point.jacobian, torch.randn_like(point.position))
            status = torch.zeros(chains, dtype=torch.long)
            state = PhaseState(point, momentum)
            nonlocal spent
            before = time.process_time()
            _, info = leapfrog_step(system, scale, settings, state, 0.1, status)
            spent = time.process_time() - before
            failed = int((info.status != 0).sum())
            if failed:
                progress(f"{form}, T = {num_steps}: {failed} of {chains} chains failed")

        spent = 0.0
        step()
        times = []
        for _ in range(repeats):
            step()
            times.append(spent)
        grown = growth(step, "cpu")
    return StepCost(assembly.report, setup, statistics.median(times), grown)


def length(repeats: int) -> None:
    """Cost of a step against the length of the series."""
    rows = []
    plan = [
        ("at once", "auto", (50, 100, 200, 400, 800, 1600, 3200, 6400)),
        ("by steps", "auto", (50, 100, 200, 400, 800, 1600, 3200, 6400)),
        ("recursion", "autoregressive", (50, 100, 200, 400)),
        ("recursion", "dense", (50, 100, 200, 400)),
    ]
    for form, structure, lengths in plan:
        costs = []
        for num_steps in lengths:
            chains = max(1, min(64, 25_600 // num_steps if structure == "auto" else 64))
            if structure != "auto" and num_steps > 100:
                chains = 16
            progress(f"{form}, {structure}, T = {num_steps}")
            cost = step_cost(form, num_steps, chains, structure, repeats)
            costs.append((num_steps, cost.seconds / chains))
            rows.append(
                {
                    "model": form,
                    "structure": structure,
                    "T": f"{num_steps:,}",
                    "chains": str(chains),
                    "CPU ms per step and chain": f"{1e3 * cost.seconds / chains:.3g}",
                    "slope so far": slope(costs),
                    "MiB per chain": f"{cost.bytes / 2**20 / chains:.2g}",
                    "set-up CPU s": f"{cost.setup_seconds:.2g}",
                    "found": cost.report,
                }
            )
            write_table(f"{NAME}_length", rows, "one thread", PACKAGES[:2])


def slope(costs: list[tuple[int, float]]) -> str:
    """Growth of the log cost per log length over the last doubling of the length."""
    if len(costs) < 2:
        return "-"
    (n0, a), (n1, b) = costs[-2:]
    return f"{math.log(b / a) / math.log(n1 / n0):.2f}"


def chains(repeats: int) -> None:
    """Cost of a step against the number of chains, T = 50."""
    rows = []
    for number in (1, 4, 16, 64, 256, 1024):
        row = {"chains": f"{number:,}"}
        for form, structure in (("by steps", "auto"), ("recursion", "dense")):
            if structure == "dense" and number > 256:
                row[f"{structure}, ms per chain"] = "-"
                continue
            progress(f"{form}, {structure}, {number} chains")
            cost = step_cost(form, simulator.NUM_STEPS, number, structure, repeats)
            label = "structured" if structure == "auto" else structure
            row[f"{label}, ms"] = f"{1e3 * cost.seconds:.3g}"
            row[f"{label}, ms per chain"] = f"{1e3 * cost.seconds / number:.3g}"
            row[f"{label}, MiB"] = f"{cost.bytes / 2**20:.2g}"
        rows.append(row)
    header = max((list(row) for row in rows), key=len)
    rows = [{key: row.get(key, "-") for key in header} for row in rows]
    write_table(f"{NAME}_chains", rows, "one thread, processor time", PACKAGES[:2])


# -- efficiency ---------------------------------------------------------------------------------


def efficiency(seeds: int) -> None:
    from benchmarks import constrained_hmc_lotka_volterra as dense

    dense.set_up()
    jobs: list[tuple[str, Callable[[int], Any]]] = []
    for sampler, target in (("1-2", 0.8), ("dynamic", 0.7)):
        jobs.append(
            (
                f"Mici, {sampler} steps, target {target}",
                lambda seed, s=sampler, t=target: dense.run_mici(seed, 4, 200, 500, s, t),
            )
        )
    for label, kernel, number, settings in (
        ("dense, 64 chains", ConstrainedHMC, 64, {"structure": "dense"}),
        ("by steps, 4 chains", ConstrainedHMC, 4, {}),
        ("by steps, 64 chains", ConstrainedHMC, 64, {}),
        ("by steps, 256 chains", ConstrainedHMC, 256, {}),
        (
            "by steps, 64 chains, a quarter turn",
            ConstrainedHMC,
            64,
            {"trajectory_length": math.pi / 2},
        ),
        ("by steps, 64 chains, NUTS", ConstrainedNUTS, 64, {}),
        ("by steps, 64 chains, compile=True", ConstrainedHMC, 64, {"compile": True}),
        ("by steps, 256 chains, compile=True", ConstrainedHMC, 256, {"compile": True}),
    ):
        jobs.append(
            (
                f"pyro_ext, {label}",
                lambda seed, k=kernel, n=number, s=settings: run_by_steps(dense, seed, k, n, s),
            )
        )
    rows: list[dict[str, str]] = []
    for label, job in jobs:
        progress(label)
        rows.append(dense.efficiency_row(label, [job(seed) for seed in range(seeds)]))
        best = max(float(r["min ESS per CPU s"]) for r in rows if r["sampler"].startswith("Mici"))
        ratios = [f"{float(row['min ESS per CPU s']) / best:.1f}" for row in rows]
        table = [
            {**row, "ratio to best Mici": ratio} for row, ratio in zip(rows, ratios, strict=True)
        ]
        write_table(f"{NAME}_efficiency", table, f"one thread, {seeds} seeds", PACKAGES)


def run_by_steps(
    dense: Any, seed: int, kernel_class: Any, num_chains: int, settings: dict[str, Any]
) -> Any:
    x = simulator.observed_data()
    form = "recursion" if settings.get("structure") == "dense" else "by steps"
    kernel = kernel_class(conditioned_model(form, x), constraint_tol=TOLERANCE, **settings)
    return dense.run_kernel(kernel, seed, num_chains, warmup=100, draws=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ("all", "efficiency", "length", "chains")
    parser.add_argument("part", nargs="?", choices=parts, default="all")
    parser.add_argument("--seeds", type=int, default=2, help="runs per sampler")
    parser.add_argument("--repeats", type=int, default=8, help="steps timed per size")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    if args.part in ("all", "length"):
        length(args.repeats)
    if args.part in ("all", "chains"):
        chains(args.repeats)
    if args.part in ("all", "efficiency"):
        efficiency(args.seeds)


if __name__ == "__main__":
    main()
