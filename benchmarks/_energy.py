"""What the benchmarks of energy machines share: sizes, training for a time, errors."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

from torch import Tensor, nn

from benchmarks._runs import output_path, standard_error
from pyro_ext.distributions import AutoregressiveEnergyMachine
from pyro_ext.training import Loss, fit_density

BATCH = 256
LOSS: Loss = AutoregressiveEnergyMachine.training_loss
# which learn more in a few minutes than the networks of the paper, made for some 20 hours
SMALL: dict[str, Any] = {
    "hidden_features": 64,
    "energy_hidden_features": 64,
    "energy_context": 32,
    "residual_blocks": 2,
    "num_importance_samples": 10,
    "num_gradient_samples": 3,
}


def fit_for(
    seconds: float,
    model: nn.Module,
    data: Tensor,
    *,
    batch: int,
    learning_rate: float,
    steps: int = 10**6,
    **settings: Any,
) -> dict[str, Any]:
    """Fit for as many steps as take about this processor time, or fewer."""
    trial, per_step = copy.deepcopy(model), math.inf
    trial_settings = {name: settings[name] for name in ("loss", "context") if name in settings}
    for number in (5, 40):  # the first calls take longer
        start = time.process_time()
        fit_density(
            trial, data, num_steps=number, batch_size=batch, progress=False, **trial_settings
        )
        per_step = (time.process_time() - start) / number
    start = time.process_time()
    result = fit_density(
        model,
        data,
        num_steps=max(10, min(steps, int(seconds / per_step))),
        batch_size=batch,
        learning_rate=learning_rate,
        progress=False,
        **settings,
    )
    return {
        "steps": len(result.losses),
        "best step": result.best_step,
        "seconds": time.process_time() - start,
        "skipped": result.num_skipped,
    }


def weights_path(name: str) -> str:
    """Where the weights of a trained machine are kept."""
    return output_path(f"aem_{name}.pt")


def count(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean of the differences, and its standard error."""
    return float((a - b).mean()), standard_error(a - b)


def with_error(mean: float, error: float, digits: int = 2) -> str:
    """A mean and its standard error."""
    return f"{mean:.{digits}f} ± {error:.{digits}f}"
