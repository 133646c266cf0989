"""Energy machines in the plane: densities, starts, and how well normalisers are estimated."""

from __future__ import annotations

import argparse
import functools
import io
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from benchmarks._energy import (
    BATCH,
    LOSS,
    SMALL,
    difference,
    fit_for,
    weights_path,
    with_error,
)
from benchmarks._report import OUTPUT, progress, threads_in_words, write_table
from benchmarks._runs import kept
from pyro_ext.datasets import Checkerboard, RotatedGrid, TwoSpirals
from pyro_ext.distributions import AutoregressiveEnergyMachine, NeuralSplineFlow
from pyro_ext.distributions.energy.normalizers import estimate, quadrature
from pyro_ext.training import fit_density

PACKAGES = ["torch", "pyro-ppl", "scikit-image"]
NUM_TRAIN, NUM_TEST = 200_000, 2000
NUM_CALIBRATED = 500
CELLS, NUM_DRAWN = 150, 50_000
IMAGES = os.path.join(os.path.dirname(OUTPUT), "..", "docs", "images")
SAMPLES = (10, 30, 100, 300, 1000, 3000)
START_SEEDS, START_STEPS = 10, 400
LARGEST_OPTIMISM = 0.2  # nats, above which the monitor warns


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


def machine(density: str) -> AutoregressiveEnergyMachine:
    """The machine for a density, untrained."""
    settings: dict[str, Any] = dict(SMALL)
    if density == "checkerboard":  # as in the paper
        settings["proposal"] = torch.distributions.Uniform(-4.0, 4.0)
    if density == "astronaut":  # a pixel is 1/35 of a standard deviation wide
        settings["frequencies"] = 7
    return AutoregressiveEnergyMachine(2, **settings)


def spline_flow() -> NeuralSplineFlow:
    """The flow beside it, untrained."""
    return NeuralSplineFlow(2, transforms=4, bins=32)


# -- densities ------------------------------------------------------------------------------------


def density_run(density: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train a machine, and a spline flow for the same time; means over test points."""
    torch.manual_seed(seed)
    truth = DENSITIES[density]()
    data, test = truth.sample((NUM_TRAIN,)), truth.sample((NUM_TEST,))
    aem = machine(density)
    done = fit_for(
        args.seconds,
        aem,
        data,
        batch=BATCH,
        learning_rate=3e-3,
        steps=args.steps,
        loss=LOSS,
    )
    aem.eval()
    torch.save(aem.state_dict(), weights_path(f"{density}_{seed}"))
    with torch.no_grad():
        values = {
            "truth": truth.log_prob(test),
            "AEM": aem().log_prob(test, exact=True),
            "AEM, 1,000 samples": aem().log_prob(test, num_importance_samples=1000),
            "proposal": aem().proposal_log_prob(test),
        }
    progress(", ".join(f"{name} {float(each.mean()):.3f}" for name, each in values.items()))
    torch.manual_seed(seed)
    flow = spline_flow()
    flow_done = fit_for(done["seconds"], flow, data, batch=512, learning_rate=1e-3)
    flow.eval()
    torch.save(panels(density, seed, aem, flow), weights_path(f"{density}_{seed}_panels"))
    torch.save(errors_of_normalizers(aem, test), weights_path(f"{density}_{seed}_errors"))
    with torch.no_grad():
        values["RQ-NSF (C)"] = flow().log_prob(test)
    return {
        "means": {name: float(each.mean()) for name, each in values.items()},
        "differences": {
            f"{a} - {b}": difference(values[a], values[b])
            for a, b in (
                ("truth", "AEM"),
                ("AEM", "proposal"),
                ("AEM", "RQ-NSF (C)"),
                ("AEM, 1,000 samples", "AEM"),
            )
        },
        "checks": aem.diagnostics(),
        **done,
        "flow seconds": flow_done["seconds"],
    }


def densities(args: argparse.Namespace) -> None:
    rows, gaps = [], []
    for density in args.densities:
        for seed in args.seeds:
            name = f"aem_densities_{density}_{seed}_{args.seconds:.0f}"
            run = kept(name, functools.partial(density_run, density, args, seed))
            which = {"density": density, "seed": f"{seed}"}
            rows.append(
                {
                    **which,
                    **{name: f"{value:.3f}" for name, value in run["means"].items()},
                    "steps": f"{run['steps']:,}",
                    "CPU s": f"{run['seconds']:.0f}",
                    "CPU s, flow": f"{run['flow seconds']:.0f}",
                }
            )
            differences = run["differences"].items()
            gaps.append(which | {name: with_error(*each, digits=4) for name, each in differences})
    how = f"{threads_in_words(1)}, {NUM_TEST:,} test points"
    write_table("aem_densities", rows, how, PACKAGES)
    write_table("aem_gaps", gaps, f"{how}, standard errors of pairs", PACKAGES)
    draw_plane(args.densities, args.seeds[0])


COLUMNS = ("Data", "Proposal", "Proposal, draws", "AEM", "AEM, draws", "RQ-NSF (C)")


@torch.no_grad()
def panels(density: str, seed: int, aem: AutoregressiveEnergyMachine, flow: nn.Module) -> Tensor:
    """Densities on the cells of a rectangle, shape ``(len(COLUMNS), CELLS, CELLS)``."""
    torch.manual_seed(seed)
    points = DENSITIES[density]().sample((NUM_TRAIN,))
    low, high = points.quantile(0.0005, 0), points.quantile(0.9995, 0)
    middles = [torch.linspace(*ends, 2 * CELLS + 1)[1::2] for ends in zip(low, high, strict=True)]
    cells = torch.cartesian_prod(*middles)
    pictures = [
        counted(points, low, high),
        aem().proposal_log_prob(cells).exp(),
        counted(aem().sample((NUM_DRAWN,), num_proposals=1), low, high),  # nothing to choose
        aem().log_prob(cells, exact=True).exp(),
        counted(aem().sample((NUM_DRAWN,)), low, high),
        flow().log_prob(cells).exp(),
    ]
    return torch.stack([picture.reshape(CELLS, CELLS) for picture in pictures])


def draw_plane(densities: Sequence[str], seed: int) -> None:
    """Nash and Durkan 2019, figure 4: a row for each density, all panels in the data's colours."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(9.6, 1.68 * len(densities)), layout="constrained")
    grid = figure.subplots(len(densities), len(COLUMNS), squeeze=False)
    for axes, density in zip(grid, densities, strict=True):
        pictures = torch.load(weights_path(f"{density}_{seed}_panels"), weights_only=True)
        brightest = float(pictures[0].flatten().quantile(0.995))
        for ax, picture in zip(axes, pictures, strict=True):
            ax.imshow(picture.T, origin="lower", vmin=0.0, vmax=brightest, cmap="inferno")
            ax.set(xticks=[], yticks=[])
        axes[0].set_ylabel(density.capitalize())
    for ax, title in zip(grid[0], COLUMNS, strict=True):
        ax.set_title(title, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, dpi=130)
    few_colors = Image.open(file).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few_colors.save(os.path.join(IMAGES, "aem_plane.png"), optimize=True)


def counted(points: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Density of points on a rectangle, by counting."""
    ends = [float(end) for pair in zip(low, high, strict=True) for end in pair]
    counts = torch.histogramdd(points, CELLS, range=ends).hist
    return counts / len(points) * CELLS**2 / (high - low).prod()


# -- starts ---------------------------------------------------------------------------------------


def start_run(warmup: int, steps: int, seed: int) -> dict[str, Any]:
    """A short run at a large step size on the diamond."""
    torch.manual_seed(seed)
    truth = RotatedGrid()
    data, test = truth.sample((50_000,)), truth.sample((200,))
    aem = AutoregressiveEnergyMachine(2, **SMALL, warmup_steps=warmup, monitor_every=100)
    result = fit_density(aem, data, num_steps=steps, learning_rate=5e-3, loss=LOSS, progress=False)
    aem.eval()
    with torch.no_grad():
        exact = aem().log_prob(test, exact=True)
        proposal = aem().proposal_log_prob(test)
        estimate_ = aem().log_prob(test, num_importance_samples=20)
    checks = aem.monitor.checks
    return {
        "exact": float(exact.mean()),
        "lowest": float(exact.min()),
        "proposal": float(proposal.mean()),
        "optimism": float((estimate_ - exact).mean()),
        "optimism while training": max(abs(check.optimism) for check in checks),
        "statuses": sorted({check.status for check in checks}),
        "skipped": result.num_skipped,
    }


def starts(args: argparse.Namespace) -> None:
    rows = []
    steps = min(args.steps, START_STEPS)
    for warmup in (0, 100):
        runs = [
            kept(
                f"aem_starts_{warmup}_{steps}_{seed}",
                functools.partial(start_run, warmup, steps, seed),
            )
            for seed in range(START_SEEDS)
        ]
        optimism = max(max(abs(run["optimism"]), run["optimism while training"]) for run in runs)
        diverged = sum(
            not math.isfinite(run["lowest"])
            or run["exact"] < run["proposal"]
            or abs(run["optimism"]) > LARGEST_OPTIMISM
            for run in runs
        )
        rows.append(
            {
                "warm-up steps": f"{warmup}",
                "runs": f"{len(runs)}",
                "diverged": f"{diverged}",
                "AEM, nats": in_words([run["exact"] for run in runs]),
                "above its proposal": in_words([run["exact"] - run["proposal"] for run in runs]),
                "lowest of a test point": f"{min(run['lowest'] for run in runs):.1f}",
                "largest error of the estimate": f"{optimism:.3f}",
                "monitor": ", ".join(sorted({name for run in runs for name in run["statuses"]})),
                "skipped steps": f"{sum(run['skipped'] for run in runs)}",
            }
        )
    how = f"{threads_in_words(1)}, {START_SEEDS} seeds, {steps} steps of size 0.005"
    write_table("aem_starts", rows, how, PACKAGES[:2])


def in_words(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


# -- calibration ----------------------------------------------------------------------------------


@torch.no_grad()
def errors_of_normalizers(aem: AutoregressiveEnergyMachine, test: Tensor) -> Tensor:
    """Relative errors of Z of conditionals after the first, shape ``(len(SAMPLES), n)``."""
    test = test[:NUM_CALIBRATED]
    z, _ = aem.standardize.to_noise(test)
    number = torch.arange(len(test))
    feature = torch.randint(1, aem.features, (len(test),))
    conditionals = aem._conditionals(z, None).select(number * aem.features + feature)
    exact = quadrature(conditionals, tolerance=3e-5, max_halvings=14)
    estimates = [estimate(conditionals, each).log_normalizer for each in SAMPLES]
    return torch.stack([(each - exact.value).expm1().abs() for each in estimates])


def calibration(args: argparse.Namespace) -> None:
    """Nash and Durkan 2019, figure 5: how errors of normalisers fall with the samples."""
    errors: dict[str, Tensor] = {}
    for density in args.densities:
        for seed in args.seeds:
            path = weights_path(f"{density}_{seed}_errors")
            if not os.path.exists(path):
                progress(f"{density}, seed {seed}: run `densities` first")
                continue
            name = density if len(args.seeds) == 1 else f"{density}, seed {seed}"
            errors[name] = torch.load(path, weights_only=True)
    if errors:
        how = f"{threads_in_words(1)}, {NUM_CALIBRATED} conditionals each"
        rows = [error_row(name, each) for name, each in errors.items()]
        write_table("aem_calibration", rows, how, PACKAGES)
        draw_calibration(errors)


def error_row(name: str, errors: Tensor) -> dict[str, str]:
    """Median and 95th percentile against the number of samples."""
    levels = torch.tensor([0.5, 0.95])
    columns = zip(SAMPLES, errors.quantile(levels, 1).T.tolist(), strict=True)
    texts = {f"{samples:,} samples": f"{a:.1e} ({b:.1e})" for samples, (a, b) in columns}
    return {"relative error of Z, median (95 %)": name, **texts}


def draw_calibration(errors: dict[str, Tensor]) -> None:
    """Medians, with whiskers from the 5th to the 95th percentile."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context("pyro_ext.figures"):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        ax = figure.subplots()
        for place, (name, each) in enumerate(errors.items()):
            low, middle, high = each.quantile(torch.tensor([0.05, 0.5, 0.95]), 1)
            x = torch.tensor(SAMPLES) * 1.08 ** (place - 0.5 * (len(errors) - 1))  # side by side
            whiskers = torch.stack([middle - low, high - middle])
            ax.errorbar(x, middle, whiskers, fmt="o-", ms=3, lw=1.0, capsize=2, label=name)
        start = float(torch.stack([each[0].median() for each in errors.values()]).mean())
        samples = torch.tensor(SAMPLES, dtype=torch.float)
        ax.plot(samples, start * SAMPLES[0] / samples, "k:", lw=1.0, label="one over samples")
        ax.set(
            xscale="log", yscale="log", xlabel="importance samples", ylabel="relative error of Z"
        )
        ax.legend()
        figure.savefig(os.path.join(IMAGES, "aem_calibration.png"), dpi=130)
