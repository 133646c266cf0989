"""Whether densities depend on no more than they are said to depend on."""

from __future__ import annotations

import torch
from torch import Tensor

from .exact_block import ExactBlock
from .recording import site_log_prob
from .structure import Block, Programs
from .sweep import Particles, evaluate, evaluate_update, initialize, propose

__all__ = ["check_factors", "check_local_blocks"]


@torch.no_grad()
def check_local_blocks(programs: Programs) -> None:
    """
    Change every other element of each local block, and see which densities change with them.

    :param Programs programs: the programs and their arguments.
    :raises ValueError: if a density of other elements does, or one outside of the plate.
    """
    blocks = [block for block in programs.structure.blocks if block.local_plate is not None]
    blocks = [block for block in blocks if not isinstance(block.kernel, ExactBlock)]
    if not blocks:
        return
    particles = initialize(programs, 2).particles
    for block in blocks:
        draft = propose(programs, block, particles)
        dim = programs.structure.local_dims[str(block.local_plate)]
        mixed = dict(particles.latents)
        for name, value in draft.values.items():
            event_dim = draft.forward.sites[name].fn.event_dim
            mixed[name] = _every_other(value, mixed[name], dim - event_dim)
        _compare(programs, block, particles.latents, mixed, dim)


def _every_other(new: Tensor, old: Tensor, dim: int) -> Tensor:
    """New values of the even elements, old ones of the odd."""
    is_even = torch.arange(old.shape[dim], device=old.device) % 2 == 0
    return torch.where(is_even.reshape([-1] + [1] * (-dim - 1)), new, old)


def _compare(
    programs: Programs, block: Block, old: dict[str, Tensor], new: dict[str, Tensor], dim: int
) -> None:
    before, after = evaluate(programs, old), evaluate(programs, new)
    for name, site in before.sites.items():
        first = site_log_prob(site, site.value)
        second = site_log_prob(after.sites[name], after.sites[name].value)
        is_inside = any(frame.name == block.local_plate for frame in site.frames)
        if is_inside:
            odd = torch.arange(1, first.shape[dim], 2, device=first.device)
            first, second = first.index_select(dim, odd), second.index_select(dim, odd)
        same = (first == second) | (first.isnan() & second.isnan())
        if not bool(same.all()):
            where = "at other elements of it" if is_inside else "which is outside of it"
            raise ValueError(
                f"Block {list(block.sites)} is in the local plate {block.local_plate!r}, but the "
                f"density of {name!r} depends on it {where}. The elements of a local plate are "
                "independent given all else: take the plate out of local_plates."
            )


@torch.no_grad()
def check_factors(programs: Programs) -> None:
    """
    Update every block that has factors, and compare their density with that of the whole model.

    :param Programs programs: the programs and their arguments.
    :raises ValueError: if factors lack a site of their block, have one that the model does not
        have, or change by another amount than the model does.
    """
    blocks = [block for block in programs.structure.blocks if block.factors is not None]
    blocks = [block for block in blocks if not isinstance(block.kernel, ExactBlock)]
    if not blocks:
        return
    particles = first = initialize(programs, 2).particles
    for block in blocks:
        _check_sites_of_factors(programs, block, particles)
        particles = _updated(programs, block, particles)
    if _agree(programs, particles):
        return
    for block in blocks:  # whose fault was it?
        if not _agree(programs, _updated(programs, block, first)):
            raise ValueError(
                f"The factors of block {list(block.sites)} change by another amount than the "
                "density of the model does when the block is updated. They need every site whose "
                "density depends on the block, observed ones too, exactly as in the model."
            )


def _updated(programs: Programs, block: Block, particles: Particles) -> Particles:
    latents = {**particles.latents, **propose(programs, block, particles).values}
    log_joint = evaluate_update(programs, block, particles, latents).log_joint
    return particles._replace(latents=latents, log_joint=log_joint)


def _agree(programs: Programs, particles: Particles) -> bool:
    """Whether the density of the particles is that of the model, up to rounding."""
    density = evaluate(programs, particles.latents)
    difference = (particles.log_joint - density.log_joint).abs()
    # in comparison with the sum of the absolute terms, which may cancel in the density itself
    size = sum(
        (site_log_prob(site, site.value).abs().sum() for site in density.sites.values()),
        torch.zeros_like(density.log_joint).sum(),
    )
    tolerance = torch.finfo(density.log_joint.dtype).eps ** 0.75 * size
    return bool((difference.isnan() | (difference <= tolerance)).all())


def _check_sites_of_factors(programs: Programs, block: Block, particles: Particles) -> None:
    sites = evaluate(programs, particles.latents, block.factors).sites
    missing = sorted(set(block.sites) - set(sites))
    if missing:
        raise ValueError(
            f"The factors of block {list(block.sites)} have no site {missing}. The density of the "
            "block itself is one of them."
        )
    unknown = [name for name, site in sites.items() if not site.is_observed]
    unknown = sorted(set(unknown) - set(programs.structure.sites))
    if unknown:
        raise ValueError(
            f"The factors of block {list(block.sites)} sample {unknown}, no latent site of the "
            f"model. Its latent sites are {sorted(programs.structure.sites)}."
        )
