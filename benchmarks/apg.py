"""Amortized population Gibbs: what it reaches on the mixtures of the paper, and what it costs.

    python benchmarks/apg.py mixture   # table 1a of the paper, and kinds of resampling
    python benchmarks/apg.py rings     # table 1b, and data sets of other sizes
    python benchmarks/apg.py speed     # beside the same algorithm for this one model, without Pyro
    python benchmarks/apg.py scaling   # against particles, sweeps, points and data sets

Claims: learned block updates are nearly the exact ones, so that sweeps bring the particles to the
posterior where encoders alone fail (``mixture``, ``rings``, with the weights that ship with the
tutorials, which two seeds trained). Generality costs nothing: a training iteration of
``pyro_ext.infer.APG`` on a Pyro model is no slower than the same algorithm written out for this
model in plain PyTorch (``benchmarks/peers/apg_plain.py``), and the cost is at most linear in the
number of particles, sweeps, points and data sets.

The problems are those of Wu et al. 2020, sections 5.1 and 5.2, in single precision. ``speed`` and
``scaling`` use the mixture: 20 data sets of 60 points, 10 particles, 10 sweeps. Times are
processor time of one thread, median and fastest of some iterations, in turns with the peer.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pyro
import torch
from torch import Tensor

from benchmarks._report import progress, write_table
from benchmarks._tutorials import load_siblings
from benchmarks.peers.apg_plain import PlainAPG
from pyro_ext.infer import APG

NAME = "apg"
PACKAGES = ["torch", "pyro-ppl"]
PAPER = {"num_sets": 20, "num_points": 60, "num_particles": 10, "num_sweeps": 10}
SEEDS = (0, 1)  # of training
NOTHING = "-"
PARTS = ("all", "{mu, tau}", "{c}", "a point")

MODEL, TRAIN, METRICS, BASELINES = load_siblings(
    "apg_mixture", "model", "train", "metrics", "baselines"
)

Step = Callable[[Tensor], object]


def ours(num_particles: int, num_sweeps: int) -> Step:
    proposals = MODEL.Proposals()
    optim = torch.optim.Adam(proposals.parameters(), lr=1e-3, betas=(0.9, 0.99))
    settings = {"num_particles": num_particles, "num_sweeps": num_sweeps}
    sampler: APG = TRAIN.make_sampler(proposals, optim, **settings)
    return sampler.step


def plain(num_particles: int, num_sweeps: int) -> Step:
    network = PlainAPG()
    optim = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.9, 0.99))

    def step(x: Tensor) -> float:
        optim.zero_grad()
        loss = network(x, num_particles, num_sweeps)
        loss.backward()
        optim.step()
        return loss.item()

    return step


SAMPLERS = {"pyro_ext": ours, "plain PyTorch": plain}


def seconds(steps: dict[str, Step], x: Tensor, repeats: int) -> dict[str, list[float]]:
    """Processor time of iterations, in turns, sorted."""
    for step in steps.values():
        step(x)  # the first iteration looks at the model
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            gc.collect()
            started = time.process_time()
            step(x)
            times[name].append(time.process_time() - started)
    return {name: sorted(values) for name, values in times.items()}


def median(values: list[float]) -> float:
    return values[len(values) // 2]


def speed(repeats: int) -> None:
    rows = []
    for num_sweeps in (1, 5, 10):
        progress(f"{num_sweeps} sweeps")
        setting = {**PAPER, "num_sweeps": num_sweeps}
        x, _ = MODEL.simulate(setting["num_sets"], setting["num_points"])
        made = {n: make(setting["num_particles"], num_sweeps) for n, make in SAMPLERS.items()}
        times = seconds(made, x, repeats)
        for name, values in times.items():
            rows.append(
                {
                    "sweeps K": str(num_sweeps),
                    "sampler": name,
                    "median, ms": f"{1e3 * median(values):.0f}",
                    "fastest, ms": f"{1e3 * values[0]:.0f}",
                    "median / plain": f"{median(values) / median(times['plain PyTorch']):.2f}",
                }
            )
    how = "processor time of one iteration on one thread, 20 data sets of 60 points, L = 10"
    write_table(f"{NAME}_speed", rows, how, PACKAGES)


def scaling(repeats: int) -> None:
    rows = []
    what = {"num_particles": "L", "num_sweeps": "K", "num_points": "N", "num_sets": "B"}
    for key, letter in what.items():
        row = {"varied": letter}
        base = 0.0
        for factor in (1, 2, 4):
            setting = {**PAPER, "num_sweeps": 5}
            setting[key] *= factor
            progress(f"{letter} = {setting[key]}")
            x, _ = MODEL.simulate(setting["num_sets"], setting["num_points"])
            step = ours(setting["num_particles"], setting["num_sweeps"])
            cost = median(seconds({"": step}, x, repeats)[""])
            base = base or cost
            row[f"x {factor}"] = f"{1e3 * cost:.0f} ms ({cost / base:.1f})"
        rows.append(row)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    how = (
        "processor time of one iteration on one thread (and relative to the first), from L = 10, "
        f"K = 5, N = 60, B = 20; largest memory of the process in all {peak:.0f} MB"
    )
    write_table(f"{NAME}_scaling", rows, how, PACKAGES)


def per_seed(values: list[float], digits: int) -> str:
    """The figures of all seeds."""
    return ", ".join(f"{value:.{digits}f}" for value in values)


def mixture(num_sets: int) -> None:
    """Table 1a: encoders alone, and sweeps, trained with two seeds."""
    x, latents = MODEL.simulate(num_sets)
    truth = MODEL.log_joint(x, latents)
    samplers: dict[str, list[APG]] = {
        f"wake-sleep, {name}": [
            BASELINES.make_sampler(BASELINES.load(name, seed)) for seed in SEEDS
        ]
        for name in BASELINES.ENCODERS
    }
    proposals = [TRAIN.load(MODEL.Proposals(), seed) for seed in SEEDS]
    learned = [TRAIN.make_sampler(each) for each in proposals]
    exact = TRAIN.make_sampler(TRAIN.load(MODEL.ExactProposals()))
    divergences = [METRICS.block_divergences(each, x, latents) for each in proposals]
    rows = [_mixture_row(name, several, x, truth, 1) for name, several in samplers.items()]
    for num_sweeps in (5, 10, 15, 31):
        name = f"blocks, K = {num_sweeps}"
        progress(name)
        rows.append(_mixture_row(name, learned, x, truth, num_sweeps))
        rows[-1]["KL {mu, tau}, median"] = per_seed([d.median().item() for d, _ in divergences], 4)
        rows[-1]["KL {c}, a point"] = per_seed([d.mean().item() for _, d in divergences], 4)
    rows.append(_mixture_row("exact updates, K = 31", [exact], x, truth, 31))
    how = (
        f"{num_sets} data sets of 60 points, L = 10, trained with K = 5; the figures of two seeds "
        "of training; log joint: average over particles, minus that of the truth"
    )
    write_table(f"{NAME}_mixture", rows, how, PACKAGES)
    _resampling(proposals[0], x, truth)


def _mixture_row(
    name: str, samplers: list[APG], x: Tensor, truth: Tensor, num_sweeps: int
) -> dict[str, str]:
    """Log joint density and effective fractions of the particles, one figure for each seed."""
    figures: dict[str, list[float]] = {}

    def add(key: str, value: Tensor) -> None:
        figures.setdefault(key, []).append(value.mean().item())

    for sampler in samplers:
        *_, particles = sampler.sweeps(x, num_sweeps=num_sweeps)
        add("log joint", particles.log_joint - truth)
        history = sampler.sample(x, num_sweeps=num_sweeps).history
        if num_sweeps == 1:
            add("ESS / L, all", history.ess["encoder"])
            continue
        add("ESS / L, all", METRICS.ess_of_a_sweep(sampler, x, num_sweeps))
        for key, block in (("{mu, tau}", "cluster"), ("{c}", "assignment")):
            add(f"ESS / L, {key}", history.ess[block][-1])
        add("ESS / L, a point", history.local_ess["assignment"][-1])
    columns = [
        "log joint",
        "ESS / L, all",
        "ESS / L, {mu, tau}",
        "ESS / L, {c}",
        "ESS / L, a point",
    ]
    row = {"sampler": name}
    for key in columns:
        digits = 1 if key == "log joint" else 3
        row[key] = per_seed(figures[key], digits) if key in figures else NOTHING
    return {**row, "KL {mu, tau}, median": NOTHING, "KL {c}, a point": NOTHING}


def _resampling(proposals: Any, x: Tensor, truth: Tensor) -> None:
    """What resampling between blocks does, and its kinds."""
    rows = []
    for resampler in ("systematic", "multinomial", None):
        progress(f"resampling: {resampler}")
        sampler = TRAIN.make_sampler(proposals, resampler=resampler)
        for num_sweeps in (5, 10, 31):
            result = sampler.sample(x, num_sweeps=num_sweeps)
            gap = result.history.log_joint[-1] - truth
            history = result.history
            rows.append(
                {
                    "resampling": resampler or "none",
                    "sweeps K": str(num_sweeps),
                    "log joint, weighted": f"{gap.mean():.1f}",
                    "ESS / L at the end": f"{result.ess.mean() / len(result.log_weights):.3f}",
                    "of an update of {mu, tau}": f"{history.ess['cluster'][-1].mean():.3f}",
                    "of an update of {c}": f"{history.ess['assignment'][-1].mean():.3f}",
                }
            )
    how = f"{len(x)} data sets of 60 points, L = 10; log joint minus that of the truth"
    write_table(f"{NAME}_resampling", rows, how, PACKAGES)


def rings(num_sets: int) -> None:
    """Table 1b: the decoder is learned, too; data sets of 200 points, and of other sizes."""
    model, train = load_siblings("apg_rings", "model", "train")
    data = {n: model.simulate(num_sets, n) for n in (100, 200, 400, 600)}
    truth = {n: model.log_joint(*pair) for n, pair in data.items()}
    methods = [(name, 1) for name in train.baselines.ENCODERS]
    methods += [(train.SAMPLER, num_sweeps) for num_sweeps in (1, 5, 10, 20, 40)]
    rows = []
    for name, num_sweeps in methods:
        progress(f"{name}, {num_sweeps} sweeps")
        loaded = [train.load(name, seed) for seed in SEEDS]
        samplers = [train.make_sampler(p["rings"], p["proposals"]) for p in loaded]
        row = {"sampler": f"wake-sleep, {name}"}
        if name == train.SAMPLER:
            row["sampler"] = f"blocks, K = {num_sweeps}"
        ess: dict[str, list[float]] = {}
        for num_points, (x, _) in data.items():
            results = [s.sample(x, num_sweeps=num_sweeps) for s in samplers]
            gaps = [r.history.log_joint[-1] - truth[num_points] for r in results]
            row[f"N = {num_points}"] = per_seed([gap.mean().item() for gap in gaps], 0)
            if num_points == 200:
                for result in results:
                    for block, value in result.history.ess.items():
                        ess.setdefault(block, []).append(value[-1].mean().item())
        for block, title in (
            ("encoder", "all"),
            ("centre", "{mu}"),
            ("assignment,angle", "{c, a}"),
        ):
            shown = block in ess and (block == "encoder") == (num_sweeps == 1)
            row[f"ESS / L, {title}"] = per_seed(ess[block], 3) if shown else NOTHING
        rows.append(row)
    how = (
        f"log joint minus that of the truth, {num_sets} data sets of N points each, L = 10, "
        "trained on data sets of 100 points with K = 5; the figures of two seeds of training; ESS "
        "for N = 200"
    )
    write_table(f"{NAME}_rings", rows, how, PACKAGES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = {"mixture": mixture, "rings": rings, "speed": speed, "scaling": scaling}
    parser.add_argument("what", nargs="*", default=list(commands))
    parser.add_argument("--repeats", type=int, default=15, help="iterations to time")
    parser.add_argument("--num-sets", type=int, default=100, help="data sets of the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.what:
        pyro.set_rng_seed(0)
        size = args.repeats if name in ("speed", "scaling") else args.num_sets
        commands[name](size)


if __name__ == "__main__":
    main()
