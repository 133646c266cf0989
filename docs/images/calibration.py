"""Make the picture of the page on calibration: ``python docs/images/calibration.py``."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
from PIL import Image
from torch import Tensor

from pyro_ext.diagnostics import (
    RankCalibration,
    highest_density_coverage,
    plot_coverage,
    plot_ranks,
    simulation_based_calibration,
)

NUM_SIMULATIONS = 300
NUM_DRAWS = 99
# standard deviation relative to the right one, and shift in its units
POSTERIORS = {
    "right": (1.0, 0.0),
    "too narrow": (0.7, 0.0),
    "too wide": (1.4, 0.0),
    "too high": (1.0, 0.4),
}


def model() -> None:
    """A number, seen with noise."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0))


def calibrate(scale: float, shift: float) -> RankCalibration:
    def posterior(x: Tensor) -> dist.Normal:
        return dist.Normal(0.5 * x + shift * 0.5**0.5, scale * 0.5**0.5)

    return simulation_based_calibration(
        model,
        lambda observation: {"z": posterior(observation["x"]).sample((NUM_DRAWS,))},
        observed="x",
        num_simulations=NUM_SIMULATIONS,
        batch_size=NUM_SIMULATIONS,
        quantities={"density": lambda z, x: posterior(x["x"]).log_prob(z["z"])},
        disable_progbar=True,
    )


def main() -> None:
    pyro.set_rng_seed(1)
    results = {title: calibrate(*settings) for title, settings in POSTERIORS.items()}
    merged = results["right"]._replace(
        ranks={title: result.ranks["z"] for title, result in results.items()}
    )
    coverage = {
        title: highest_density_coverage(result, "density") for title, result in results.items()
    }
    join([lambda: plot_ranks(merged), lambda: plot_coverage(coverage)])


def join(plots: list[Callable[[], Any]]) -> None:
    """Pictures below each other, in one file."""
    images = []
    for plot in plots:
        buffer = io.BytesIO()
        plot().savefig(buffer, format="png")
        images.append(Image.open(buffer).convert("RGB"))
    width = max(image.width for image in images)
    canvas = Image.new("RGB", (width, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height
    canvas.save(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
