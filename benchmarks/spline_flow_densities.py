"""Densities that spline flows learn: pyro_ext beside nflows, zuko and Pyro.

Claim: with the same architecture, batches and steps, the density comes at least as close to the
truth, in the plane where that is known, and predicts held-out images at least as well.

    python benchmarks/spline_flow_densities.py plane         # gap to four known densities
    python benchmarks/spline_flow_densities.py plane-large   # ours alone, trained for longer
    python benchmarks/spline_flow_densities.py images        # patches of photographs, and digits

All libraries go through the same loop: Adam, its step size falling to zero along half a cosine,
gradients shortened to norm 5, the same minibatches of standardised data in float32, one thread.
Log-densities are in nats, in the units of the data.

Every finished run is a line of ``benchmarks/output/spline_flow_<part>.jsonl``: started again with
the same settings, the script does what is missing. Delete the file to do it all again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from benchmarks._fit import Data, Fit, Training, fit, log_densities, standardized
from benchmarks._report import OUTPUT, progress, threads_in_words, write_table
from benchmarks.peers.spline_flows import OURS, BuiltFlow, Setting, build, count_parameters
from pyro_ext.datasets import (
    Checkerboard,
    Rings,
    RotatedGrid,
    TwoSpirals,
    digits,
    natural_image_patches,
)

NAME = "spline_flow"
PEERS = ["torch", "pyro-ppl", "nflows", "zuko"]
DENSITIES: dict[str, Callable[..., TorchDistribution]] = {
    "grid": RotatedGrid,
    "checkerboard": Checkerboard,
    "spirals": TwoSpirals,
    "rings": Rings,
}
NUM_TRAIN, NUM_TEST = 200_000, 20_000
# the 225 modes of the grid take longer to separate
LARGE_STEPS = {"grid": 12_000, "checkerboard": 5_000, "spirals": 5_000, "rings": 5_000}
FIGURE = os.path.join(os.path.dirname(OUTPUT), "..", "docs", "images", "spline_flow_plane.png")


# -- finished runs ------------------------------------------------------------------------------


class Runs:
    """The finished runs of a part, a line of JSON for each."""

    def __init__(self, part: str) -> None:
        os.makedirs(OUTPUT, exist_ok=True)
        self.path = os.path.join(OUTPUT, f"{NAME}_{part}.jsonl")
        self.rows: list[dict[str, Any]] = []
        if os.path.exists(self.path):
            with open(self.path) as file:
                # a line without an end was interrupted
                lines = [line for line in file if line.endswith("\n")]
            self.rows = [json.loads(line) for line in lines]
            with open(self.path, "w") as file:
                file.writelines(lines)

    def get(self, key: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result for these settings, from the file or else by running."""
        key = json.loads(json.dumps(key))
        for row in self.rows:
            if row["key"] == key:
                return row["result"]
        progress(", ".join(f"{name} {value}" for name, value in key.items()))
        row = {"key": key, "result": run()}
        progress(f"  {row['result']}")
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        return row["result"]


# -- the plane ----------------------------------------------------------------------------------


def plane_data(density: str, seed: int) -> tuple[Data, Tensor]:
    """Training and test points, and the true log-densities of the latter."""
    torch.manual_seed(100 + seed)
    scale = {"checkerboard": "side"}.get(density, "std")
    default = getattr(DENSITIES[density](), scale)
    truth = DENSITIES[density](**{scale: default.double()})
    train, test = truth.sample((NUM_TRAIN,)), truth.sample((NUM_TEST,))
    return standardized(train, test), truth.log_prob(test)


def plane_run(
    density: str, library: str, setting: Setting, training: Training, seed: int, keep: str = ""
) -> dict[str, Any]:
    """Train a flow and measure its gap; ``keep`` is a path for its weights."""
    data, true_log_densities = plane_data(density, seed)
    torch.manual_seed(seed)
    flow = build(library, setting)
    done = fit(flow, data, training, seed)
    gaps = true_log_densities - log_densities(flow, data.test) - data.offset
    if keep:
        state = {"flow": flow.module.state_dict(), "mean": data.mean, "std": data.std}
        torch.save(state, keep)
    return {
        "gap": float(gaps.mean()),
        "standard error": float(gaps.std()) / math.sqrt(len(gaps)),
        "parameters": count_parameters(flow.module),
        **done._asdict(),
    }


def plane(args: argparse.Namespace) -> None:
    runs = Runs("plane")
    training = Training(args.steps or 2_000, 512, 1e-3)
    rows = []
    for density in args.densities:
        for kind in args.kinds:
            for library in args.libraries:
                if kind == "AR" and (density != "grid" or library == "zuko"):
                    continue  # at two features, zuko's autoregressive flow is its coupling flow
                setting = Setting(2, 4, 64, 2, 32, coupling=kind == "C")
                results = [
                    runs.get(
                        {
                            "density": density,
                            "library": library,
                            **setting._asdict(),
                            "steps": training.steps,
                            "seed": seed,
                        },
                        partial(plane_run, density, library, setting, training, seed),
                    )
                    for seed in args.seeds
                ]
                rows.append(plane_row(density, library, kind, args.seeds, results))
    write_table(f"{NAME}_plane", rows, f"{threads_in_words(1)}, {training.steps} steps", PEERS)


def plane_row(
    density: str, library: str, kind: str, seeds: Sequence[int], results: list[dict[str, Any]]
) -> dict[str, str]:
    row = {
        "density": density,
        "flow": f"RQ-NSF ({kind})",
        "library": library,
        "parameters": f"{results[0]['parameters']:,}",
    }
    for seed, result in zip(seeds, results, strict=True):
        row[f"gap, seed {seed}"] = f"{result['gap']:.3f}"
    row["mean gap"] = f"{statistics.mean(result['gap'] for result in results):.3f}"
    row["standard error"] = f"{max(result['standard error'] for result in results):.3f}"
    row["CPU s"] = f"{statistics.mean(result['cpu_seconds'] for result in results):.0f}"
    row["skipped steps"] = f"{sum(result['skipped'] for result in results)}"
    return row


# -- the plane, as in the paper -----------------------------------------------------------------


def plane_large(args: argparse.Namespace) -> None:
    """Two coupling layers of 128 bins, figure 2 of the paper; affine ones as in its figure 4."""
    runs = Runs("plane_large")
    rows = []
    for density in args.densities:
        steps = args.steps or LARGE_STEPS[density]
        training = Training(steps, args.batch, 1e-3, cpu_seconds=600.0)
        for spline in ("rational_quadratic", "affine"):
            setting = Setting(2, 2, args.hidden, 2, 128, spline=spline)
            key = {
                "density": density,
                **setting._asdict(),
                "steps": steps,
                "batch": training.batch,
            }
            limited, path = training._replace(steps=steps), weights_path(density, setting)
            run = partial(plane_run, density, OURS, setting, limited, 0, path)
            result = runs.get(key, run)
            steps = result["steps"]  # time may have ended it; the affine flow gets no more
            rows.append(
                {
                    "density": density,
                    "flow": "RQ-NSF (C)" if spline == "rational_quadratic" else "affine coupling",
                    "parameters": f"{result['parameters']:,}",
                    "steps": f"{result['steps']:,}",
                    "gap": f"{result['gap']:.3f}",
                    "standard error": f"{result['standard error']:.3f}",
                    "CPU s": f"{result['cpu_seconds']:.0f}",
                }
            )
    how = f"{threads_in_words(1)}, {args.hidden} hidden units, batches of {args.batch}"
    write_table(f"{NAME}_plane_large", rows, how, ["torch", "pyro-ppl"])
    draw_plane(args.densities, args.hidden)


def weights_path(density: str, setting: Setting) -> str:
    return os.path.join(OUTPUT, f"{NAME}_plane_{density}_{setting.spline}_{setting.hidden}.pt")


def draw_plane(densities: Sequence[str], hidden: int) -> None:
    """A row for each density: data, density and draws of the spline flow, affine density."""
    from matplotlib.figure import Figure

    columns = ["Training data", "RQ-NSF (C), density", "RQ-NSF (C), draws", "Affine, density"]
    figure = Figure(figsize=(8.0, 2.05 * len(densities)), layout="constrained")
    grid = figure.subplots(len(densities), len(columns), squeeze=False)
    for axes, density in zip(grid, densities, strict=True):
        torch.manual_seed(0)
        points = DENSITIES[density]().sample((NUM_TRAIN,))
        half = 1.1 * float(points.abs().quantile(0.9999))
        pictures = [histogram(points, half)]
        for spline in ("rational_quadratic", "affine"):
            setting = Setting(2, 2, hidden, 2, 128, spline=spline)
            flow, mean, std = load_plane_flow(density, setting)
            pictures.append(density_on_grid(flow, mean, std, half))
            if spline == "rational_quadratic":
                with torch.no_grad():
                    draws = torch.cat([flow.sample(20_000) for _ in range(10)])
                pictures.append(histogram(draws * std + mean, half))
        # the brightest colour is that of the data, so that all pictures compare
        brightest = float(pictures[0].flatten().quantile(0.999))
        for ax, picture in zip(axes, pictures, strict=True):
            ax.imshow(picture.T, origin="lower", vmin=0.0, vmax=brightest, cmap="inferno")
            ax.set(xticks=[], yticks=[])
        axes[0].set_ylabel(density.capitalize())
    for ax, title in zip(grid[0], columns, strict=True):
        ax.set_title(title, fontsize=10)
    os.makedirs(os.path.dirname(FIGURE), exist_ok=True)
    figure.savefig(FIGURE, dpi=140, pil_kwargs={"optimize": True})


def load_plane_flow(density: str, setting: Setting) -> tuple[BuiltFlow, Tensor, Tensor]:
    state = torch.load(weights_path(density, setting), weights_only=True)
    flow = build(OURS, setting)
    flow.module.load_state_dict(state["flow"])
    flow.module.eval()
    return flow, state["mean"].float(), state["std"].float()


def histogram(points: Tensor, half: float, cells: int = 200) -> Tensor:
    """Density of points on the square ``[-half, half]^2``, by counting."""
    counts = torch.histogramdd(points.cpu(), cells, range=[-half, half] * 2).hist
    return counts / len(points) / (2 * half / cells) ** 2


def density_on_grid(
    flow: BuiltFlow, mean: Tensor, std: Tensor, half: float, cells: int = 200
) -> Tensor:
    centres = half * (2 * torch.arange(cells) + 1 - cells) / cells
    points = (torch.cartesian_prod(centres, centres) - mean) / std
    return (log_densities(flow, points) - float(std.log().sum())).exp().reshape(cells, cells)


# -- images -------------------------------------------------------------------------------------


class Model(NamedTuple):
    library: str
    label: str
    coupling: bool
    spline: str = "rational_quadratic"


MODELS = (
    Model(OURS, "Glow, affine (C)", True, "affine"),
    Model(OURS, "Q-NSF (C)", True, "quadratic"),
    Model(OURS, "RQ-NSF (C)", True),
    Model("nflows", "RQ-NSF (C)", True),
    Model("zuko", "RQ-NSF (C)", True),
    Model("Pyro", "RQ spline coupling", True),
    Model(OURS, "MAF, affine (AR)", False, "affine"),
    Model(OURS, "RQ-NSF (AR)", False),
)


def patches_data() -> Data:
    split = natural_image_patches()
    return standardized(split.train.double(), split.test.double())


def digits_data() -> Data:
    """Dequantised; nats of the discrete image, as a grey level is 1/17 wide."""
    split = digits(flat=True)
    generator = torch.Generator().manual_seed(0)
    train, validation, test = (
        (x + torch.rand(x.shape, generator=generator, dtype=torch.float64)) / 17
        for x in (split.train, split.validation, split.test)
    )
    return standardized(train, test, validation, offset=-64 * math.log(17))


IMAGES = {
    "patches": (patches_data, 128, Training(2_000, 256, 1e-3)),
    "digits": (digits_data, 64, Training(2_000, 128, 5e-4)),
}


def image_run(data: Data, model: Model, setting: Setting, training: Training) -> dict[str, Any]:
    torch.manual_seed(0)
    flow = build(model.library, setting)
    done = fit(flow, data, training, 0)
    return {
        **mean_and_error(log_densities(flow, data.test) + data.offset),
        "parameters": count_parameters(flow.module),
        **done._asdict(),
    }


def mean_and_error(values: Tensor) -> dict[str, float]:
    return {
        "log-likelihood": float(values.mean()),
        "standard error": float(values.std()) / math.sqrt(len(values)),
    }


def gaussian_run(data: Data) -> dict[str, Any]:
    """A full-covariance Gaussian, below which no flow should fall."""
    x = data.train.double()
    covariance = x.T.cov() + 1e-6 * torch.eye(x.shape[1])
    gaussian = torch.distributions.MultivariateNormal(x.mean(0), covariance)
    size = x.shape[1]
    return {
        **mean_and_error(gaussian.log_prob(data.test.double()) + data.offset),
        "parameters": size + size * (size + 1) // 2,
        **Fit(0, 0, 0.0, 0)._asdict(),
    }


def images(args: argparse.Namespace) -> None:
    runs = Runs("images")
    for name, (load, hidden, training) in IMAGES.items():
        training = training._replace(steps=args.steps or training.steps)
        data = load()
        gaussian = runs.get({"data": name, "model": "Gaussian"}, partial(gaussian_run, data))
        rows = [image_row("-", "Gaussian, full covariance", gaussian)]
        for model in MODELS:
            if model.library not in args.image_libraries:
                continue
            setting = Setting(
                data.train.shape[1], 5, hidden, 1, coupling=model.coupling, spline=model.spline
            )
            key = {
                "data": name,
                "library": model.library,
                **setting._asdict(),
                "steps": training.steps,
            }
            result = runs.get(key, partial(image_run, data, model, setting, training))
            rows.append(image_row(model.library, model.label, result))
        how = f"{threads_in_words(1)}, at most {training.steps} steps"
        write_table(f"{NAME}_{name}", rows, how, [*PEERS, "scikit-learn"])


def image_row(library: str, label: str, result: dict[str, Any]) -> dict[str, str]:
    return {
        "library": library,
        "model": label,
        "parameters": f"{result['parameters']:,}",
        "test log-likelihood, nats": f"{result['log-likelihood']:.1f}",
        "standard error": f"{result['standard error']:.1f}",
        "weights of step": f"{result['best_step']}",
        "skipped steps": f"{result['skipped']}",
        "CPU s": f"{result['cpu_seconds']:.0f}",
    }


PARTS = {"plane": plane, "plane-large": plane_large, "images": images}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=("all", *PARTS), default="all")
    parser.add_argument("--libraries", nargs="+", help="default: all of the part")
    parser.add_argument("--densities", nargs="+", choices=DENSITIES, default=list(DENSITIES))
    parser.add_argument("--kinds", nargs="+", choices=("C", "AR"), default=["C", "AR"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="plane")
    parser.add_argument("--steps", type=int, help="default: 2,000; plane-large: 5,000 to 12,000")
    parser.add_argument("--hidden", type=int, default=128, help="hidden units, plane-large")
    parser.add_argument("--batch", type=int, default=512, help="plane-large")
    args = parser.parse_args()
    args.image_libraries = args.libraries or [OURS, "nflows", "zuko", "Pyro"]
    args.libraries = args.libraries or ["nflows", OURS, "zuko"]
    warnings.simplefilter("ignore")  # of the peers, about functions that torch will remove
    torch.set_num_threads(1)
    for part, run in PARTS.items():
        if args.part in ("all", part):
            run(args)


if __name__ == "__main__":
    main()
