"""Simulations as tensors: collected over rounds, checked, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .sites import Structure

__all__ = ["Simulations", "join", "make_simulations"]


class Simulations(NamedTuple):
    """
    Latents with what the simulator made of them.

    A tuple of tensors and dictionaries of tensors: ``torch.save(simulations._asdict(), path)``
    stores it, and ``Simulations(**torch.load(path))`` brings it back.
    """

    latents: dict[str, Tensor]
    """Values of the latent sites in the model's own coordinates, shape ``(runs, ...)``."""
    observations: dict[str, Tensor]
    """Values of the observed sites, shape ``(runs, ...)``."""
    is_valid: Tensor
    """False where the simulator failed, shape ``(runs,)``."""
    round: Tensor
    """0 for draws from the prior, r for draws from the r-th proposal, shape ``(runs,)``."""

    @property
    def num_failed(self) -> int:
        """How many runs failed."""
        return int((~self.is_valid).sum())


def make_simulations(
    latents: Mapping[str, Tensor],
    observations: Mapping[str, Tensor],
    structure: Structure,
    round_index: int,
) -> Simulations:
    """
    Check arrays of simulations, and find those that failed.

    :param latents: values of the latent sites, shape ``(runs, ...)``.
    :param observations: values of the observed sites, not finite where a run failed.
    :param Structure structure: the sites.
    :param int round_index: 0 for draws from the prior.
    :raises ValueError: if a site is missing or has a wrong shape, or latents are not finite.
    """
    shapes = {site.name: site.shape for site in structure.latents}
    values = _checked("latents", latents, shapes, structure)
    num = len(next(iter(values.values())))
    for name, value in values.items():
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"Latent site {name!r} has values that are not finite. Leave those rows out: a "
                "run that failed is told by its observations."
            )
    shapes = {site.name: site.shape for site in structure.observed}
    observed = _checked("observations", observations, shapes, structure)
    lengths = {name: len(value) for name, value in (values | observed).items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The sites have different numbers of runs: {lengths}.")
    is_valid = torch.ones(num, dtype=torch.bool, device=structure.device)
    for value in observed.values():
        is_valid &= value.reshape(num, -1).isfinite().all(1)
    return Simulations(
        values, observed, is_valid, torch.full_like(is_valid, round_index, dtype=torch.long)
    )


def join(first: Simulations | None, second: Simulations) -> Simulations:
    """All simulations of two sets."""
    if first is None:
        return second
    return Simulations(
        {name: torch.cat([value, second.latents[name]]) for name, value in first.latents.items()},
        {n: torch.cat([v, second.observations[n]]) for n, v in first.observations.items()},
        torch.cat([first.is_valid, second.is_valid]),
        torch.cat([first.round, second.round]),
    )


def _checked(
    argument: str,
    values: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    structure: Structure,
) -> dict[str, Tensor]:
    if values.keys() != shapes.keys():
        raise ValueError(
            f"{argument} has the sites {sorted(values)}; the estimator's are {sorted(shapes)}."
        )
    result: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        value = torch.as_tensor(values[name]).to(structure.device, structure.dtype)
        if value.dim() == 0 or value.shape[1:] != shape:
            raise ValueError(
                f"Site {name!r} has shape {tuple(value.shape)} in {argument}; expected was, with "
                f"runs first, {('runs', *shape)}."
            )
        result[name] = value.detach()
    return result
