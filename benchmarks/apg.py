"""Amortized population Gibbs: what an iteration of training costs.

    python benchmarks/apg.py speed     # beside the same algorithm for this one model, without Pyro
    python benchmarks/apg.py scaling   # against particles, sweeps, points and data sets

Claim: generality costs nothing. A training iteration of ``pyro_ext.infer.APG`` on a Pyro model is
no slower than the same algorithm written out for this model in plain PyTorch
(``benchmarks/peers/apg_plain.py``), and the cost is at most linear in the number of particles,
sweeps, points and data sets.

The problem is the Gaussian mixture of Wu et al. 2020, section 5.1: 20 data sets of 60 points, 10
particles, 10 sweeps, single precision. Times are processor time of one thread, the median and the
fastest of some iterations, in turns with the peer.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
import time
from collections.abc import Callable

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tutorials", "apg_mixture")]

import model
import pyro
import torch
from torch import Tensor

from benchmarks._report import progress, write_table
from benchmarks.peers.apg_plain import PlainAPG
from pyro_ext.infer import APG

NAME = "apg"
PACKAGES = ["torch", "pyro-ppl"]
PAPER = {"num_sets": 20, "num_points": 60, "num_particles": 10, "num_sweeps": 10}

Step = Callable[[Tensor], object]


def ours(num_particles: int, num_sweeps: int) -> Step:
    proposals = model.Proposals()
    sampler = APG(
        model.mixture,
        proposals.encode,
        [proposals.update_clusters, proposals.update_assignments],
        torch.optim.Adam(proposals.parameters(), lr=1e-3, betas=(0.9, 0.99)),
        num_particles=num_particles,
        num_sweeps=num_sweeps,
        batch_plate="data_sets",
        local_plates=["points"],
    )
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
        x, _ = model.simulate(setting["num_sets"], setting["num_points"])
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
            x, _ = model.simulate(setting["num_sets"], setting["num_points"])
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", default=["speed", "scaling"])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    for name in args.what:
        {"speed": speed, "scaling": scaling}[name](args.repeats)


if __name__ == "__main__":
    main()
