"""Constrained HMC on Lotka-Volterra: pyro_ext beside Mici, on one machine in one run.

Claim: effective draws per second of the exact posterior of a stochastic simulator, and how the
cost of an integrator step grows with the length of the series and with the number of chains.

    python benchmarks/constrained_hmc_lotka_volterra.py efficiency
    python benchmarks/constrained_hmc_lotka_volterra.py scaling

Both samplers get the same simulator (the full recursion, no teacher forcing), the same data, the
same dense Jacobian, one thread, and the constraint tolerance 1e-9. Mici's functions are compiled
by JAX, its best-performing way of use, with derivatives by the fastest mode. Figures are medians
over seeds. ``min ESS`` is the smallest of bulk, tail and sd ESS over the four parameters: near a
half turn trajectories are antithetic, so that bulk ESS alone exceeds the number of draws while
the spread mixes badly. ``sd error`` is the largest relative error of a posterior standard
deviation of log theta against quadrature, in percent. Compilation is timed apart.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from typing import NamedTuple

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import arviz as az
import jax
import jax.numpy as jnp
import mici
import numpy as np
import pyro
import torch

from pyro_ext import MCMC, ConstrainedHMC
from pyro_ext.infer.constrained_hmc.assembly import build_system, default_tolerances
from pyro_ext.infer.constrained_hmc.dynamics.integrator import (
    IntegratorSettings,
    PhaseState,
    leapfrog_step,
)
from pyro_ext.infer.constrained_hmc.dynamics.projection import quasi_newton
from pyro_ext.infer.constrained_hmc.model.constrained_model import ConstrainedModel
from pyro_ext.infer.constrained_hmc.system.constrained_system import project_momentum
from tutorials.lotka_volterra import simulator

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")
NAME = "constrained_hmc_lotka_volterra"
TOLERANCE = 1e-9


class Timer(NamedTuple):
    wall: float
    cpu: float


class Run(NamedTuple):
    """One run of one sampler."""

    theta: np.ndarray  # (chains, draws, 4)
    setup: Timer
    warmup: Timer
    main: Timer
    compile_seconds: float
    steps: float  # integrator steps of all chains in the main phase


@contextmanager
def timed(store: dict[str, Timer], name: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    store[name] = Timer(time.perf_counter() - wall, time.process_time() - cpu)


# -- pyro_ext -----------------------------------------------------------------------------------


def run_ours(seed: int, chains: int, warmup: int, draws: int, **settings: object) -> Run:
    conditioned = pyro.condition(simulator.model, {"x": simulator.observed_data()})
    kernel = ConstrainedHMC(conditioned, constraint_tol=TOLERANCE, **settings)
    return run_kernel(kernel, seed, chains, warmup, draws)


def run_kernel(kernel: ConstrainedHMC, seed: int, chains: int, warmup: int, draws: int) -> Run:
    pyro.set_rng_seed(seed)
    marks: dict[str, tuple[float, float]] = {}

    def hook(kernel: object, params: object, stage: str, i: int) -> None:
        marks[f"{stage} {i}"] = (time.perf_counter(), time.process_time())

    start = (time.perf_counter(), time.process_time())
    mcmc = MCMC(kernel, draws, warmup, num_chains=chains, hook_fn=hook, disable_progbar=True)
    mcmc.run()
    stats = kernel.chain_diagnostics()
    first, last = marks["Warmup 0"], marks[f"Warmup {warmup - 1}"]
    end = marks[f"Sample {draws - 1}"]
    return Run(
        theta=mcmc.get_samples(group_by_chain=True)["theta"].numpy(),
        setup=Timer(first[0] - start[0], first[1] - start[1]),
        warmup=Timer(last[0] - first[0], last[1] - first[1]),
        main=Timer(end[0] - last[0], end[1] - last[1]),
        compile_seconds=0.0,
        steps=float(sum(int(chain["num_steps"].sum()) for chain in stats)),
    )


# -- Mici ---------------------------------------------------------------------------------------


def mici_functions(y: np.ndarray) -> dict[str, Callable]:
    """The same simulator in JAX, every model function compiled by hand."""
    observed = jnp.asarray(y)
    initial = jnp.asarray(simulator.INITIAL_POPULATIONS)

    def constr(u):
        theta = jnp.exp(simulator.PRIOR_LOC + simulator.PRIOR_SCALE * u[:4])

        def step(q, noise):
            prey = q[0] + theta[0] * q[0] - theta[1] * q[0] * q[1] + noise[0]
            predator = q[1] - theta[2] * q[1] + theta[3] * q[0] * q[1] + noise[1]
            q = jnp.array([prey, predator])
            return q, q

        return (jax.lax.scan(step, initial, u[4:].reshape(-1, 2))[1] - observed).ravel()

    identity = jnp.eye(4 + y.size)

    def jacobian(u):
        value, product = jax.linearize(constr, u)
        return jax.vmap(product, out_axes=1)(identity), value

    constr_jit, jacobian_jit = jax.jit(constr), jax.jit(jacobian)
    product_jit = jax.jit(jax.grad(lambda u, m: jnp.sum(m * jacobian(u)[0])))

    def jacob_constr(u):
        return tuple(np.asarray(part) for part in jacobian_jit(u))

    def mhp_constr(u):
        return (lambda m: np.asarray(product_jit(u, np.asarray(m))), *jacob_constr(u))

    return {
        "neg_log_dens": lambda u: 0.5 * (u @ u),
        "grad_neg_log_dens": lambda u: (u, 0.5 * (u @ u)),
        "constr": lambda u: np.asarray(constr_jit(u)),
        "jacob_constr": jacob_constr,
        "mhp_constr": mhp_constr,
    }


def mici_system(y: np.ndarray) -> mici.systems.DenseConstrainedEuclideanMetricSystem:
    return mici.systems.DenseConstrainedEuclideanMetricSystem(
        dens_wrt_hausdorff=False, **mici_functions(y)
    )


def mici_integrator(system: object, step_size: float | None) -> object:
    return mici.integrators.ConstrainedLeapfrogIntegrator(
        system,
        step_size=step_size,
        projection_solver=mici.solvers.solve_projection_onto_manifold_quasi_newton,
        projection_solver_kwargs={"constraint_tol": TOLERANCE, "position_tol": 1e-8},
        reverse_check_tol=2e-8,
    )


def run_mici(seed: int, chains: int, warmup: int, draws: int, sampler: str, target: float) -> Run:
    rng = np.random.default_rng(seed)
    y = simulator.observed_data().numpy()
    system = mici_system(y)
    integrator = mici_integrator(system, None)
    if sampler == "dynamic":
        transition = mici.samplers.DynamicMultinomialHMC(system, integrator, rng)
    else:
        low, high = (int(part) for part in sampler.split("-"))
        transition = mici.samplers.RandomMetropolisHMC(
            system, integrator, rng, n_step_range=(low, high + 1)
        )
    # Mici needs points on the manifold; from prior draws it crashes, so it starts near the truth
    starts = [mici_start(-4 + 0.1 * rng.standard_normal(4), y) for _ in range(chains)]
    clock: dict[str, Timer] = {}
    with timed(clock, "compile"):
        state = mici.states.ChainState(pos=starts[0].copy(), mom=None, dir=1)
        state.mom = system.sample_momentum(state, rng)
        system.h(state), system.dh1_dpos(state)
    adapters = [mici.adapters.DualAveragingStepSizeAdapter(target)]
    with timed(clock, "warmup"):
        states = transition.sample_chains(
            warmup, 0, starts, adapters=adapters, display_progress=False
        )[0]

    def trace(state):
        return {"theta": np.exp(simulator.PRIOR_LOC + simulator.PRIOR_SCALE * state.pos[:4])}

    with timed(clock, "main"):
        _, traces, stats = transition.sample_chains(
            0, draws, states, adapters=None, trace_funcs=[trace], display_progress=False
        )
    return Run(
        theta=np.stack(traces["theta"]),
        setup=Timer(0.0, 0.0),
        warmup=clock["warmup"],
        main=clock["main"],
        compile_seconds=clock["compile"].wall,
        steps=float(np.sum(np.stack(stats["n_step"]))),
    )


def mici_start(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    theta = simulator.parameters_from_normals(torch.as_tensor(z))
    noise = simulator.solve_noise(theta, torch.as_tensor(y))
    return np.concatenate([z, noise.numpy().ravel()])


# -- efficiency ---------------------------------------------------------------------------------


def efficiency_row(label: str, runs: list[Run]) -> dict[str, str]:
    truth = simulator.exact_posterior()
    log_sd = np.asarray(truth.log_sd)
    rows = []
    for run in runs:
        ess = {
            method: min(az.ess(run.theta[:, :, i], method=method) for i in range(4))
            for method in ("bulk", "tail", "sd")
        }
        sd = np.log(run.theta).reshape(-1, 4).std(0, ddof=1)
        smallest = min(ess.values())
        rows.append(
            {
                "steps per draw": run.steps / (run.theta.shape[0] * run.theta.shape[1]),
                "CPU ms per step and chain": 1e3 * run.main.cpu / run.steps,
                "bulk ESS": ess["bulk"],
                "tail ESS": ess["tail"],
                "sd ESS": ess["sd"],
                "min ESS per CPU s": smallest / run.main.cpu,
                "min ESS per s": smallest / run.main.wall,
                "sd error %": 100 * float(np.abs(sd / log_sd - 1).max()),
                "setup and warm-up s": run.setup.wall + run.warmup.wall,
                "compile s": run.compile_seconds,
            }
        )
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return {"sampler": label, **{key: f"{value:.3g}" for key, value in medians.items()}}


def efficiency(seeds: int, with_compile: bool) -> None:
    jobs: list[tuple[str, Callable[[int], Run]]] = []
    for sampler, target in (("dynamic", 0.8), ("dynamic", 0.7), ("1-2", 0.8), ("1-3", 0.8)):
        jobs.append(
            (
                f"Mici, {sampler} steps, target {target}",
                lambda seed, s=sampler, t=target: run_mici(seed, 4, 200, 500, s, t),
            )
        )
    jobs.append(("pyro_ext, 4 chains", lambda seed: run_ours(seed, 4, 100, 200)))
    jobs.append(("pyro_ext, 64 chains", lambda seed: run_ours(seed, 64, 100, 100)))
    rows = []
    for label, job in jobs:
        rows.append(efficiency_row(label, [job(seed) for seed in range(seeds)]))
        report_efficiency(rows)
    if with_compile:
        rows.append(compiled_row(seeds))
        report_efficiency(rows)


def report_efficiency(rows: list[dict[str, str]]) -> None:
    best = max(float(row["min ESS per CPU s"]) for row in rows if row["sampler"].startswith("M"))
    ratios = [{"ratio to best Mici": f"{float(r['min ESS per CPU s']) / best:.2f}"} for r in rows]
    report("efficiency", [{**row, **ratio} for row, ratio in zip(rows, ratios, strict=True)])


def compiled_row(seeds: int) -> dict[str, str]:
    """The first run in a process compiles; its excess setup time is the compile time."""
    plain = run_ours(0, 64, 2, 2).setup.wall
    compile_seconds = run_ours(0, 64, 2, 2, compile=True).setup.wall - plain
    runs = [run_ours(seed, 64, 100, 200, compile=True) for seed in range(seeds)]
    runs = [run._replace(compile_seconds=compile_seconds) for run in runs]
    return efficiency_row("pyro_ext, 64 chains, compile=True", runs)


# -- cost of a step -----------------------------------------------------------------------------


def our_step_seconds(num_steps: int, chains: int, repeats: int) -> float:
    """Median wall time of one integrator step of all chains, at the true parameters."""
    y = simulator.observed_data(seed=1238, num_steps=num_steps)
    conditioned = pyro.condition(long_model(num_steps), {"x": y})
    model = ConstrainedModel(conditioned, (), {})
    system = build_system(model, chains)
    scale = torch.ones(model.dim)
    settings = IntegratorSettings(
        quasi_newton, None, default_tolerances(model, TOLERANCE, 50), num_inner_steps=1
    )
    theta = torch.tensor(simulator.THETA_TRUE)
    noise = simulator.solve_noise(theta, y)
    u = torch.cat([(theta.log() - simulator.PRIOR_LOC) / simulator.PRIOR_SCALE, noise.reshape(-1)])
    with torch.no_grad():
        point = system.point(u.expand(chains, -1).contiguous(), scale)
        times = []
        for _ in range(repeats):
            momentum = project_momentum(point.jacobian, torch.randn_like(point.position))
            status = torch.zeros(chains, dtype=torch.long)
            start = time.perf_counter()
            leapfrog_step(system, scale, settings, PhaseState(point, momentum), 0.1, status)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def long_model(num_steps: int) -> Callable[[], None]:
    import pyro.distributions as dist

    def model() -> None:
        theta = pyro.sample("theta", dist.LogNormal(-2.0, 1.0).expand([4]).to_event(1))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand([num_steps, 2]).to_event(2))
        pyro.deterministic("x", simulator.simulate(theta, noise))

    return model


def mici_step_seconds(num_steps: int, repeats: int) -> float:
    y = simulator.observed_data(seed=1238, num_steps=num_steps).numpy()
    system, rng = mici_system(y), np.random.default_rng(0)
    integrator = mici_integrator(system, 0.1)
    z = (np.log(simulator.THETA_TRUE) - simulator.PRIOR_LOC) / simulator.PRIOR_SCALE
    start_position = mici_start(z, y)
    times = []
    for _ in range(repeats):
        state = mici.states.ChainState(pos=start_position.copy(), mom=None, dir=1)
        state.mom = system.sample_momentum(state, rng)
        system.h(state), system.dh1_dpos(state)
        start = time.perf_counter()
        integrator.step(state)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def scaling(repeats: int) -> None:
    rows = []
    for num_steps in (50, 100, 200, 400):
        chains = 64 if num_steps <= 100 else 16
        ours = our_step_seconds(num_steps, chains, repeats) / chains
        theirs = mici_step_seconds(num_steps, repeats)
        rows.append(
            {
                "T": str(num_steps),
                "constraints": str(2 * num_steps),
                "chains (ours)": str(chains),
                "pyro_ext ms per step and chain": f"{1e3 * ours:.3g}",
                "Mici ms per step": f"{1e3 * theirs:.3g}",
                "ratio": f"{theirs / ours:.2f}",
            }
        )
    report("cost_against_length", rows)
    rows = []
    for chains in (1, 4, 16, 64, 256):
        seconds = our_step_seconds(50, chains, repeats)
        rows.append(
            {
                "chains": str(chains),
                "ms per step": f"{1e3 * seconds:.3g}",
                "ms per step and chain": f"{1e3 * seconds / chains:.3g}",
            }
        )
    report("cost_against_chains", rows)


# -- report -------------------------------------------------------------------------------------


def report(name: str, rows: list[dict[str, str]]) -> None:
    """Print a Markdown table and keep it under ``benchmarks/results``."""
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row[key] for key in header) + " |" for row in rows]
    table = "\n".join(lines)
    print(f"\n{name}\n{table}", flush=True)
    os.makedirs(RESULTS, exist_ok=True)
    note = (
        f"{date.today()}, {machine()}, one thread; torch {torch.__version__}, "
        f"mici {version('mici')}, jax {jax.__version__}."
    )
    with open(os.path.join(RESULTS, f"{NAME}_{name}.md"), "w") as file:
        file.write(f"{note}\n\n{table}\n")


def machine() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return f"{models[0]}, {len(models)} cores"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def set_up() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    jax.config.update("jax_enable_x64", True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=("all", "efficiency", "scaling"), default="all")
    parser.add_argument("--seeds", type=int, default=2, help="runs per sampler")
    parser.add_argument("--repeats", type=int, default=8, help="steps timed per size")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled run")
    args = parser.parse_args()
    set_up()
    if args.part in ("all", "efficiency"):
        efficiency(args.seeds, not args.no_compile)
    if args.part in ("all", "scaling"):
        scaling(args.repeats)


if __name__ == "__main__":
    main()
