"""Autoregressive energy machines: speed, memory, and densities in the plane.

Claims: a training step takes at most 0.7 of the time of the authors' code; log-densities from
20,000 importance samples need bounded memory; the machine is better than its own proposal where
that is too smooth, its estimates agree with quadrature, and no run diverges.

    python benchmarks/aem.py speed       # training step; --reference PATH times the authors' code
    python benchmarks/aem.py sizes       # against features and importance samples
    python benchmarks/aem.py evaluation  # 20,000 importance samples: time and memory
    python benchmarks/aem.py densities   # four densities, beside a spline flow of the same time
    python benchmarks/aem.py starts      # ten seeds, with and without warm-up
    python benchmarks/aem.py calibration # errors of normalisers of the four, against samples
    python benchmarks/aem.py patches     # patches of photographs, and `digits`, beside flows
    python benchmarks/aem.py vae         # prior of a trained autoencoder

PATH: folder ``pytorch`` of a clone of github.com/conormdurkan/autoregressive-energy-machines.
The network sizes of the first parts are those of its experiments in the plane (Nash and Durkan
2019, table 3), those of the others smaller.
Times are processor time with one thread, which other programs on the machine spoil least; the
programs take turns, and figures are medians. Densities are means over test points, in nats, and
of quadrature but where they say otherwise. Finished runs are kept in ``benchmarks/output``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from benchmarks._energy import BATCH
from benchmarks._energy_images import digits, patches, vae
from benchmarks._energy_plane import DENSITIES, calibration, densities, starts
from benchmarks._memory import growth
from benchmarks._report import threads_in_words, write_table
from pyro_ext.distributions import AutoregressiveEnergyMachine

PACKAGES = ["torch", "pyro-ppl"]
LEARNING_RATE = 5e-4
Step = Callable[[], None]


# -- speed ----------------------------------------------------------------------------------------


def our_step(features: int = 2, **settings: Any) -> Step:
    """A training step at the paper's setting."""
    aem = AutoregressiveEnergyMachine(features, monitor_every=0, **settings)
    x, optimizer = torch.randn(BATCH, features), torch.optim.Adam(aem.parameters(), LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        aem.training_loss(x).backward()
        optimizer.step()

    return step


def reference_step(path: str) -> Step:
    """The same with the authors' code."""
    sys.path.insert(0, path)
    import models  # type: ignore[import-not-found]

    made = models.ResidualMADE(2, 4, 256, 64 + 30)
    energy = models.ResidualEnergyNet(65, 4, 128, energy_upper_bound=0.0)
    aem = models.AEM(made, energy, 64, 10, "gaussian", 20, 1e-3)
    parameters = [*made.parameters(), *energy.parameters()]
    x, optimizer = torch.randn(BATCH, 2), torch.optim.Adam(parameters, LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        log_p, log_q, *_ = aem(x)
        (-(log_p + log_q).mean()).backward()
        optimizer.step()

    return step


def milliseconds(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Processor time of each, taking turns."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(1e3 * (time.process_time() - start))
    return times


def speed(args: argparse.Namespace) -> None:
    steps = {
        "pyro_ext": our_step(),
        "pyro_ext, gradient of all draws": our_step(num_gradient_samples=None),
    }
    if args.reference:
        steps["authors' code"] = reference_step(args.reference)
    times = milliseconds(steps, args.rounds)
    last = list(times.values())[-1]
    rows = [
        {
            "training step": name,
            "ms": f"{statistics.median(each):.0f}",
            f"ratio to {list(times)[-1]}": f"{median_ratio(each, last):.2f}",
        }
        for name, each in times.items()
    ]
    how = f"{threads_in_words(1)}, 2 features, batches of {BATCH}, 20 importance samples"
    write_table("aem_speed", rows, how, PACKAGES)


def median_ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def sizes(args: argparse.Namespace) -> None:
    steps = {
        (features, number): our_step(features, num_importance_samples=number)
        for features in (2, 8, 21)
        for number in (5, 20, 100)
        if features * number <= 420
    }
    times = milliseconds({str(key): step for key, step in steps.items()}, args.rounds)
    rows = [
        {
            "features": f"{features}",
            "importance samples": f"{number}",
            "training step, ms": f"{statistics.median(times[str((features, number))]):.0f}",
        }
        for features, number in steps
    ]
    write_table("aem_sizes", rows, f"{threads_in_words(1)}, batches of {BATCH}", PACKAGES)


def evaluation(args: argparse.Namespace) -> None:
    rows = []
    aem, x = AutoregressiveEnergyMachine(8).eval(), torch.randn(16, 8)
    with torch.no_grad():
        aem().log_prob(x)  # the first call takes longer
    for number in (20, 1000, 20_000):

        def score(number: int = number) -> None:
            with torch.no_grad():
                aem().log_prob(x, num_importance_samples=number)

        start = time.process_time()
        bytes_ = growth(score, "cpu")
        seconds = time.process_time() - start
        rows.append(
            {
                "log_prob of 16 rows of 8 features": f"{number:,} importance samples",
                "s": f"{seconds:.2f}",
                "peak, MiB": f"{bytes_ / 2**20:.0f}",
            }
        )
    write_table("aem_evaluation", rows, threads_in_words(1), PACKAGES)


PARTS = {
    "speed": speed,
    "sizes": sizes,
    "evaluation": evaluation,
    "densities": densities,
    "starts": starts,
    "calibration": calibration,
    "patches": patches,
    "digits": digits,
    "vae": vae,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=("all", *PARTS), default="all")
    parser.add_argument("--reference", help="folder `pytorch` of the authors' code")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--densities", nargs="+", choices=DENSITIES, default=list(DENSITIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="processor time of a run")
    parser.add_argument("--steps", type=int, default=10**6, help="at most")
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    torch.set_num_threads(1)
    for part, run in PARTS.items():
        if args.part in ("all", part):
            run(args)


if __name__ == "__main__":
    main()
