"""What the benchmarks of score flows share: densities in the plane, training, finished runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pyro.distributions import TorchDistribution
from torch import Tensor

from benchmarks import _runs
from benchmarks._runs import standard_error as standard_error
from pyro_ext.datasets import Checkerboard, Rings, RotatedGrid, TwoSpirals
from pyro_ext.distributions import ScoreFlow
from pyro_ext.training import fit_density

PACKAGES = ["torch", "pyro-ppl", "torchdiffeq"]
BATCH, NUM_TRAIN, NUM_TEST = 256, 200_000, 2000
DENSITIES: dict[str, Callable[[], TorchDistribution]] = {
    "grid": RotatedGrid,
    "checkerboard": Checkerboard,
    "spirals": TwoSpirals,
    "rings": Rings,
}


def spent(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the processor time it took."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def kept(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a run, from its file or else by running."""
    return _runs.kept(f"diffusion_{name}", run)


def output_path(name: str) -> str:
    """Where a file of these benchmarks is kept."""
    return _runs.output_path(f"diffusion_{name}")


def trained(data: Tensor, steps: int, flow: ScoreFlow, learning_rate: float = 5e-3) -> ScoreFlow:
    """Train in place, by the likelihood weighting and importance sampling."""
    fit_density(
        flow,
        data,
        loss=ScoreFlow.training_loss,
        num_steps=steps,
        batch_size=BATCH,
        learning_rate=learning_rate,
        ema_decay=0.998,
        progress=False,
    )
    return flow.eval()
