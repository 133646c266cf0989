"""Whether the elements of a local plate are as independent as they are said to be."""

from __future__ import annotations

import torch
from torch import Tensor

from .exact_block import ExactBlock
from .recording import site_log_prob
from .structure import Block, Programs
from .sweep import evaluate, initialize, propose

__all__ = ["check_local_blocks"]


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
