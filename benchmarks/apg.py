"""Amortized population Gibbs: what it reaches on the mixtures of the paper, and what it costs.

    python benchmarks/apg.py mixture      # table 1a of the paper, and kinds of resampling
    python benchmarks/apg.py calibration  # ranks of the truth among draws for the mixture
    python benchmarks/apg.py rings        # table 1b, and data sets of other sizes
    python benchmarks/apg.py tracking     # figure 4: error against sweeps, digits and frames
    python benchmarks/apg.py speed        # beside the same algorithm for this one model, no Pyro
    python benchmarks/apg.py scaling      # against particles, sweeps, points and data sets

Claims: learned block updates are nearly the exact ones, so that sweeps bring the particles to the
posterior where encoders alone fail (``mixture``, ``rings``, with the weights that ship with the
tutorials). Generality costs nothing: a training iteration of
``pyro_ext.infer.APG`` on a Pyro model is no slower than the same algorithm written out for this
model in plain PyTorch (``benchmarks/peers/apg_plain.py``), and the cost is at most linear in the
number of particles, sweeps, points and data sets, and memory does not grow with the sweeps.

The problems are those of Wu et al. 2020, sections 5.1 and 5.2, in single precision. ``speed`` and
``scaling`` use the mixture: 20 data sets of 60 points, 10 particles, 10 sweeps. Times are
processor time of one thread, median and fastest of some iterations, in turns with the peer.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pyro
import torch
from torch import Tensor

from benchmarks import _apg_calibration
from benchmarks._apg_tracking import tracking
from benchmarks._memory import growth
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
        row, memory = {"varied": letter}, []
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
            memory.append(f"{growth(partial(step, x), 'cpu') / 1e6:.1f}")
        rows.append(row | {"memory, MB": ", ".join(memory)})
    how = (
        "processor time of one iteration on one thread (and relative to the first), from L = 10, "
        "K = 5, N = 60, B = 20, and by how much the memory in use grows in one"
    )
    write_table(f"{NAME}_scaling", rows, how, PACKAGES)


def per_seed(values: list[float], digits: int) -> str:
    """The figures of all seeds."""
    return ", ".join(f"{value:.{digits}f}" for value in values)


def mixture(num_sets: int) -> None:
    """Table 1a: encoders alone, and sweeps; a figure for each seed of training."""
    x, latents = MODEL.simulate(num_sets)
    truth = MODEL.log_joint(x, latents)
    rows = []
    for name in BASELINES.ENCODERS:
        sampler = BASELINES.make_sampler(BASELINES.load(name))
        rows += _mixture_rows(f"wake-sleep, {name}", [sampler], x, truth, [1])
    proposals = [TRAIN.load(MODEL.Proposals(), seed) for seed in SEEDS]
    learned = [TRAIN.make_sampler(each) for each in proposals]
    divergences = [METRICS.block_divergences(each, x, latents) for each in proposals]
    of_blocks = _mixture_rows("blocks", learned, x, truth, [5, 10, 15, 31])
    for row in of_blocks:
        row["KL {mu, tau}, median"] = per_seed([d.median().item() for d, _ in divergences], 4)
        row["KL {c}, a point"] = per_seed([d.mean().item() for _, d in divergences], 4)
    exact = TRAIN.make_sampler(TRAIN.load(MODEL.ExactProposals()))
    rows += of_blocks + _mixture_rows("exact updates", [exact], x, truth, [31])
    how = (
        f"{num_sets} data sets of 60 points, L = 10, trained with K = 5; log joint: weighted "
        "average, minus that of the truth"
    )
    write_table(f"{NAME}_mixture", rows, how, PACKAGES)
    _resampling(proposals[0], x, truth)


def _mixture_rows(
    name: str, samplers: list[APG], x: Tensor, truth: Tensor, sweeps: list[int]
) -> list[dict[str, str]]:
    """Log joint density and effective fractions of the particles, one figure for each seed."""
    progress(name)
    histories = [sampler.sample(x, num_sweeps=max(sweeps)).history for sampler in samplers]
    rows = []
    for number in sweeps:
        joints = [(h.log_joint[number - 1] - truth).mean().item() for h in histories]
        row = {"sampler": name if number == 1 else f"{name}, K = {number}"}
        row["log joint"] = per_seed(joints, 1)
        if number == 1:
            of_parts = [[h.ess["encoder"]] for h in histories]
        else:
            of_parts = [
                [
                    METRICS.ess_of_a_sweep(sampler, x, number),
                    *(h.ess[block][number - 2] for block in ("cluster", "assignment")),
                    h.local_ess["assignment"][number - 2],
                ]
                for sampler, h in zip(samplers, histories, strict=True)
            ]
        for place, part in enumerate(PARTS):
            values = [parts[place].mean().item() for parts in of_parts if place < len(parts)]
            row[f"ESS / L, {part}"] = per_seed(values, 3) or NOTHING
        rows.append({**row, "KL {mu, tau}, median": NOTHING, "KL {c}, a point": NOTHING})
    return rows


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


def calibration(num_sets: int) -> None:
    """Of learned and of exact updates, which have the same encoder."""
    parts = {
        "learned": TRAIN.load(MODEL.Proposals()),
        "exact": TRAIN.load(MODEL.ExactProposals()),
    }
    samplers = {name: TRAIN.make_sampler(proposals) for name, proposals in parts.items()}
    _apg_calibration.write(MODEL, samplers, num_sets)


def rings(num_sets: int) -> None:
    """Table 1b: the decoder is learned, too; data sets of 200 points, and of other sizes."""
    model, train = load_siblings("apg_rings", "model", "train")
    data = {n: model.simulate(num_sets, n) for n in (60, 200, 400, 600)}
    truth = {n: model.log_joint(*pair) for n, pair in data.items()}
    rows = []
    for name, sweeps in (
        *((name, [1]) for name in train.baselines.ENCODERS),
        (train.SAMPLER, [1, 4, 10, 20, 40]),
    ):
        parts = train.load(name)
        sampler = train.make_sampler(parts["rings"], parts["proposals"])
        histories = {}
        for num_points, (x, _) in data.items():
            progress(f"{name}, N = {num_points}")
            histories[num_points] = sampler.sample(
                x, num_particles=10, num_sweeps=max(sweeps)
            ).history
        for number in sweeps:
            is_block = name == train.SAMPLER
            row = {"sampler": f"blocks, K = {number}" if is_block else f"wake-sleep, {name}"}
            for num_points, history in histories.items():
                gap = history.log_joint[number - 1] - truth[num_points]
                row[f"N = {num_points}"] = f"{gap.mean():.0f} ({gap.median():.0f})"
            ess = histories[200].ess
            columns = {"all": "encoder", "{mu}": "centre", "{c, a}": "assignment,angle"}
            for part, block in columns.items():
                shown = (block == "encoder") == (number == 1)
                value = ess[block][0 if number == 1 else number - 2] if shown else None
                row[f"ESS / L, {part}"] = NOTHING if value is None else f"{value.mean():.3f}"
            rows.append(row)
    how = (
        f"log joint minus that of the truth, mean (median) of {num_sets} data sets of N points "
        "each, L = 10, trained on data sets of 60 points with K = 4; ESS for N = 200"
    )
    write_table(f"{NAME}_rings", rows, how, PACKAGES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = {
        "mixture": mixture,
        "calibration": calibration,
        "rings": rings,
        "tracking": tracking,
        "speed": speed,
        "scaling": scaling,
    }
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
