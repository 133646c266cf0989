"""Models whose posteriors are known, and posteriors that are wrong in known ways."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
from torch import Tensor

__all__ = ["NUM_DRAWS", "SCALES", "gaussian_model", "gaussian_posterior", "sampler"]

NUM_DRAWS = 63
# relative standard deviation, and shift in true standard deviations
SCALES = {"right": (1.0, 0.0), "narrow": (0.5, 0.0), "wide": (2.0, 0.0), "high": (1.0, 0.7)}


def gaussian_model() -> None:
    """Standard normal parameters that are observed with noise of variance one."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1))


def gaussian_posterior(x: Tensor, scale: float = 1.0, shift: float = 0.0) -> dist.Normal:
    """The exact posterior, or one that is wider and shifted."""
    sd = 0.5**0.5
    return dist.Normal(0.5 * x + shift * sd, scale * sd).to_event(1)


def sampler(
    scale: float = 1.0, shift: float = 0.0
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Posterior draws as the diagnostics ask for them."""

    def draws(observation: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"z": gaussian_posterior(observation["x"], scale, shift).sample((NUM_DRAWS,))}

    return draws
