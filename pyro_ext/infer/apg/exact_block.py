"""The exact conditional of discrete sites, in the place of a learned proposal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import infer_discrete
from torch import Tensor

from .recording import PARTICLES, Recorder

__all__ = ["ExactBlock", "draw_exactly"]


class ExactBlock:
    r"""
    A block of discrete sites that is drawn from its exact conditional.

    Where all values of the sites can be enumerated, no proposal needs to be learned: they are
    drawn from :math:`p(z_b \mid x, z_{-b})` itself, by Pyro's sum-product over plates, jointly
    for all sites of the block. The incremental weight is then exactly 1. Give it to
    :class:`~pyro_ext.infer.APG` in the place of a kernel; learned and exact blocks mix freely.

    The model has to index by the discrete values in a way that also works when they are
    enumerated, as for Pyro's ``config_enumerate``: with one-hot products, or with
    ``pyro.ops.indexing.Vindex(means.unsqueeze(-3))[..., assignment, :]``.

    :param sites: names of the discrete sites, one or several.
    :raises ValueError: if there is no name.

    >>> from pyro_ext.infer import ExactBlock
    >>> ExactBlock("assignment")
    ExactBlock('assignment')
    """

    def __init__(self, *sites: str) -> None:
        if not sites or not all(isinstance(name, str) for name in sites):
            raise ValueError(
                f"ExactBlock needs the names of its sites, got {sites!r}: ExactBlock('c')."
            )
        self.sites = sites

    def __repr__(self) -> str:
        return f"ExactBlock({', '.join(map(repr, self.sites))})"


def draw_exactly(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sites: tuple[str, ...],
    rest: Mapping[str, Tensor],
    *,
    num_particles: int,
    plate_nesting: int,
) -> dict[str, Tensor]:
    """
    Draw discrete sites from their conditional, given all others.

    :param model: the model.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    :param sites: the sites to draw.
    :param rest: values of all other latent sites, ``(particles, ...)``.
    :param int num_particles: number of particles.
    :param int plate_nesting: number of batch dimensions that are the model's own.
    :returns: values by name.
    """

    def enumerate_block(site: Any) -> Any:
        return {"enumerate": "parallel"} if site["name"] in sites else {}

    def conditioned() -> None:
        with pyro.plate(PARTICLES, num_particles, dim=-plate_nesting - 1):
            poutine.condition(model, dict(rest))(*args, **kwargs)

    recorder = Recorder({})
    program = poutine.infer_config(conditioned, enumerate_block)
    with torch.no_grad(), pyro.validation_enabled(False), recorder:
        infer_discrete(program, first_available_dim=-plate_nesting - 2)()
    return {name: recorder.sites[name].value for name in sites}
