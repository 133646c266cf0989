"""Autoregressive energy machines: speed, memory, and densities in the plane.

Claims: a training step takes at most 0.7 of the time of the authors' code; log-densities from
20,000 importance samples need bounded memory; the machine is better than its own proposal where
that is too smooth, its estimates agree with quadrature, and no run diverges.

    python benchmarks/aem.py speed       # training step; --reference PATH times the authors' code
    python benchmarks/aem.py sizes       # against features and importance samples
    python benchmarks/aem.py evaluation  # 20,000 importance samples: time and memory
    python benchmarks/aem.py densities   # four densities, beside a spline flow of the same time
    python benchmarks/aem.py starts      # ten seeds, with and without warm-up

PATH: folder ``pytorch`` of a clone of github.com/conormdurkan/autoregressive-energy-machines.
The network sizes of the first parts are those of its experiments in the plane (Nash and Durkan
2019, table 3), those of the others smaller.
Times are processor time with one thread, which other programs on the machine spoil least; the
programs take turns, and figures are medians. Densities are means over test points, in nats, and
of quadrature but where they say otherwise. Finished runs are kept in ``benchmarks/output``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from benchmarks._memory import growth
from benchmarks._report import OUTPUT, progress, threads_in_words, write_table
from pyro_ext.datasets import Checkerboard, RotatedGrid, TwoSpirals
from pyro_ext.distributions import AutoregressiveEnergyMachine, NeuralSplineFlow
from pyro_ext.training import Loss, fit_density

PACKAGES = ["torch", "pyro-ppl"]
BATCH, LEARNING_RATE = 256, 5e-4
NUM_TRAIN, NUM_TEST = 200_000, 1000
LOSS: Loss = AutoregressiveEnergyMachine.training_loss
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
    for number in (20, 1000, 20_000):

        def score(number: int = number) -> None:
            with torch.no_grad():
                aem().log_prob(x, num_importance_samples=number)

        bytes_ = growth(score, "cpu")
        rows.append(
            {
                "log_prob of 16 rows of 8 features": f"{number:,} importance samples",
                "s": f"{milliseconds({'': score}, 1)[''][0] / 1e3:.2f}",
                "peak, MiB": f"{bytes_ / 2**20:.0f}",
            }
        )
    write_table("aem_evaluation", rows, threads_in_words(1), PACKAGES)


# -- densities ------------------------------------------------------------------------------------


class Picture(TorchDistribution):
    """
    Grey levels of scikit-image's picture of an astronaut as a density on a square.

    Constant on every pixel, so that the density of a point is known.
    """

    support = torch.distributions.constraints.real_vector
    arg_constraints = {}  # noqa: RUF012

    def __init__(self, side: int = 128) -> None:
        from skimage.color import rgb2gray
        from skimage.data import astronaut
        from skimage.transform import resize

        grey = torch.from_numpy(resize(rgb2gray(astronaut()), (side, side), anti_aliasing=True))
        self.mass = (grey.flip(0).T / grey.sum()).float()  # first axis is x, second y upwards
        self.side = side
        super().__init__(torch.Size(), torch.Size([2]), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        pixel = torch.multinomial(self.mass.flatten(), shape.numel(), replacement=True)
        corner = torch.stack([pixel // self.side, pixel % self.side], -1)
        points = (corner + torch.rand(corner.shape)) / self.side
        return points.reshape(*shape, 2)

    def log_prob(self, value: Tensor) -> Tensor:
        i, j = (value * self.side).long().clamp(0, self.side - 1).unbind(-1)
        inside = ((value >= 0) & (value <= 1)).all(-1)
        log_density = self.mass[i, j].log() + 2 * math.log(self.side)
        return torch.where(inside, log_density, -math.inf)


DENSITIES: dict[str, Callable[[], TorchDistribution]] = {
    "diamond": RotatedGrid,
    "checkerboard": Checkerboard,
    "spirals": TwoSpirals,
    "astronaut": Picture,
}
# which learn more in a few minutes than the networks of the paper, made for some 20 hours
SMALL: dict[str, Any] = {
    "hidden_features": 64,
    "energy_hidden_features": 64,
    "energy_context": 32,
    "residual_blocks": 2,
}


def machine(density: str, settings: dict[str, Any]) -> AutoregressiveEnergyMachine:
    if density == "checkerboard":  # as in the paper
        settings = {"proposal": torch.distributions.Uniform(-4.0, 4.0), **settings}
    return AutoregressiveEnergyMachine(2, **SMALL, **settings)


def train(
    model: nn.Module, data: Tensor, seconds: float, steps: int, loss: Loss | None, batch: int
) -> dict[str, Any]:
    """Fit for a number of steps that takes about this processor time, if that is fewer."""
    trial = copy.deepcopy(model)
    for number in (5, 40):  # the first calls take longer
        start = time.process_time()
        fit_density(trial, data, num_steps=number, batch_size=batch, loss=loss, progress=False)
        per_step = (time.process_time() - start) / number
    steps = max(10, min(steps, int(seconds / per_step)))
    start = time.process_time()
    result = fit_density(
        model,
        data,
        num_steps=steps,
        batch_size=batch,
        learning_rate=3e-3 if loss else 1e-3,
        loss=loss,
        progress=False,
    )
    spent = time.process_time() - start
    return {"steps": steps, "seconds": spent, "skipped": result.num_skipped}


def density_run(density: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train a machine, and a spline flow for the same time; means over test points."""
    torch.manual_seed(seed)
    truth = DENSITIES[density]()
    data, test = truth.sample((NUM_TRAIN,)), truth.sample((NUM_TEST,))
    aem = machine(density, {"warmup_steps": args.warmup})
    done = train(aem, data, args.seconds, args.steps, LOSS, BATCH)
    aem.eval()
    with torch.no_grad():
        values = {
            "truth": truth.log_prob(test),
            "proposal": aem().proposal_log_prob(test),
            "AEM": aem().log_prob(test, exact=True),
            "AEM, 1,000 samples": aem().log_prob(test, num_importance_samples=1000),
        }
    torch.manual_seed(seed)
    flow = NeuralSplineFlow(2, transforms=4, bins=32)
    flow_done = train(flow, data, done["seconds"], 10**6, None, 512)
    flow.eval()
    with torch.no_grad():
        values["RQ-NSF (C)"] = flow().log_prob(test)
    torch.save(aem.state_dict(), os.path.join(OUTPUT, f"aem_{density}_{seed}.pt"))
    return {
        **{name: float(each.mean()) for name, each in values.items()},
        "standard error": float((values["truth"] - values["AEM"]).std()) / math.sqrt(NUM_TEST),
        "checks": aem.diagnostics(),
        **done,
        "flow seconds": flow_done["seconds"],
    }


def densities(args: argparse.Namespace) -> None:
    rows = []
    for density in args.densities:
        for seed in args.seeds:
            run = kept(
                f"aem_densities_{density}_{seed}_{args.seconds:.0f}",
                lambda density=density, seed=seed: density_run(density, args, seed),
            )
            names = ["truth", "proposal", "AEM", "AEM, 1,000 samples", "RQ-NSF (C)"]
            rows.append(
                {
                    "density": density,
                    "seed": f"{seed}",
                    **{name: f"{run[name]:.3f}" for name in names},
                    "standard error": f"{run['standard error']:.3f}",
                    "steps": f"{run['steps']:,}",
                    "CPU s": f"{run['seconds']:.0f}",
                    "CPU s, flow": f"{run['flow seconds']:.0f}",
                }
            )
    write_table("aem_densities", rows, threads_in_words(1), [*PACKAGES, "scikit-image"])


def kept(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result in a file of this name, or else by running."""
    os.makedirs(OUTPUT, exist_ok=True)
    path = os.path.join(OUTPUT, f"{name}.json")
    if not os.path.exists(path):
        progress(name)
        result = run()
        with open(path, "w") as file:
            json.dump(result, file)
    with open(path) as file:
        found: dict[str, Any] = json.load(file)
    return found


def starts(args: argparse.Namespace) -> None:
    """Short runs at a large step size, from different weights, on the diamond."""
    rows = []
    truth = RotatedGrid()
    for warmup in (0, 100):
        gaps, optimism, statuses, skipped = [], [], set(), 0
        for seed in range(10):
            torch.manual_seed(seed)
            data, test = truth.sample((50_000,)), truth.sample((100,))
            aem = AutoregressiveEnergyMachine(2, **SMALL, warmup_steps=warmup, monitor_every=100)
            steps = args.steps if args.steps < 10**6 else 400
            result = fit_density(
                aem, data, num_steps=steps, learning_rate=5e-3, loss=LOSS, progress=False
            )
            aem.eval()
            with torch.no_grad():
                exact = aem().log_prob(test, exact=True).mean()
                gaps.append(float(exact - aem().proposal_log_prob(test).mean()))
            checks = aem.monitor.checks
            optimism.append(max(abs(check.optimism) for check in checks))
            statuses |= {check.status for check in checks}
            skipped += result.num_skipped
        rows.append(
            {
                "warm-up steps": f"{warmup}",
                "AEM above its proposal, nats": f"{min(gaps):.3f} to {max(gaps):.3f}",
                "largest error of the estimate, nats": f"{max(optimism):.3f}",
                "monitor": ", ".join(sorted(statuses)),
                "skipped steps": f"{skipped}",
            }
        )
    write_table("aem_starts", rows, f"{threads_in_words(1)}, 10 seeds, {steps} steps", PACKAGES)


PARTS = {
    "speed": speed,
    "sizes": sizes,
    "evaluation": evaluation,
    "densities": densities,
    "starts": starts,
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
    parser.add_argument("--warmup", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    torch.set_num_threads(1)
    for part, run in PARTS.items():
        if args.part in ("all", part):
            run(args)


if __name__ == "__main__":
    main()
