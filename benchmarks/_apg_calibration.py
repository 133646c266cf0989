"""Ranks of the truth among draws for the mixture: what sweeps, and one population, can do."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from torch import Tensor

from benchmarks._report import progress, write_table
from pyro_ext.diagnostics import RankCalibration, calibration_of_ranks, rank_statistics
from pyro_ext.infer import APG
from pyro_ext.ops.resampling import multinomial, take_particles

NUM_DRAWS = 31
NUM_PARTICLES = 10
SWEEPS = (5, 10, 31)

Latents = dict[str, Tensor]


def quantities(model: ModuleType, x: Tensor, latents: Latents) -> dict[str, Tensor]:
    """Numbers that do not change when clusters change their names, ``(..., data_sets)``."""
    mean, precision = latents["cluster"].unbind(-1)
    sizes = model.one_hot(latents["assignment"]).sum(-2)
    return {
        "log joint density": model.log_joint(x, latents),
        "sum of means, across": mean.sum(-2)[..., 0],
        "sum of means, up": mean.sum(-2)[..., 1],
        "sum of log precisions": precision.log().sum((-1, -2)),
        "largest cluster": sizes.amax(-1),
    }


def draws(sampler: APG, x: Tensor, is_one_population: bool, last: int) -> Iterator[Latents]:
    """Draws after every sweep, ``(draws, data_sets, ...)``."""
    if is_one_population:
        for particles in sampler.sweeps(x, num_particles=NUM_DRAWS, num_sweeps=last):
            ancestors = multinomial(particles.log_weights, NUM_DRAWS)
            yield _take(particles.latents, ancestors)
        return
    copies = x.repeat(NUM_DRAWS, 1, 1)
    for particles in sampler.sweeps(copies, num_particles=NUM_PARTICLES, num_sweeps=last):
        ancestors = multinomial(particles.log_weights, 1)
        taken = _take(particles.latents, ancestors)
        yield {k: v[0].unflatten(0, (NUM_DRAWS, len(x))) for k, v in taken.items()}


def _take(latents: Latents, ancestors: Tensor) -> Latents:
    # sites outside of the plate of the points have a dimension of size one there
    values = take_particles(ancestors, *latents.values())
    return dict(zip(latents, values, strict=True))


def calibration(
    model: ModuleType, samplers: dict[str, APG], num_sets: int, sweeps: tuple[int, ...] = SWEEPS
) -> list[dict[str, str]]:
    """
    Rank the truth among draws of every sampler.

    :param model: the mixture.
    :param samplers: by name.
    :param int num_sets: number of data sets.
    :param sweeps: after how many.
    :returns: rows of a table.
    """
    rows = []
    x, latents = model.simulate(num_sets)
    truth = quantities(model, x, latents)
    for name, sampler in samplers.items():
        for is_one in (True, False):
            who = f"{NUM_DRAWS} of one population" if is_one else "each of its own population"
            progress(f"{name}, {who}")
            for number, drawn in enumerate(draws(sampler, x, is_one, max(sweeps)), 1):
                if number in sweeps:
                    ranks = _ranks(truth, quantities(model, x, drawn))
                    rows.append({"updates": name, "draws": who, **_row(number, ranks)})
    return rows


def _ranks(truth: dict[str, Tensor], drawn: dict[str, Tensor]) -> RankCalibration:
    ranks = {name: rank_statistics(value, drawn[name]) for name, value in truth.items()}
    return calibration_of_ranks(ranks, NUM_DRAWS)


def _row(number: int, result: RankCalibration) -> dict[str, str]:
    return {
        "sweeps K": str(number),
        "p-value": f"{result.p_value:.2g}",
        "mean rank of the log joint": f"{result.location['log joint density']:.2f}",
        "largest spread": f"{max(result.spread.values(), key=float):.2f}",
    }


def write(model: ModuleType, samplers: dict[str, Any], num_sets: int) -> None:
    """Write the table."""
    rows = calibration(model, samplers, num_sets)
    how = (
        f"ranks of the truth among {NUM_DRAWS} draws, on {num_sets} data sets of 60 points; all "
        f"draws from one population of {NUM_DRAWS} particles, or each from a population of "
        f"{NUM_PARTICLES} of its own; p-value of uniform ranks of five quantities that do not "
        "depend on names of clusters; calibrated draws have a mean rank of 0.5, and a spread of 1"
    )
    write_table("apg_calibration", rows, how, ["torch", "pyro-ppl"])
