"""Run a Pyro program once for all particles, and note what it sampled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ...ops.sampling import draw
from ...poutine.sites import is_subsample

__all__ = ["PARTICLES", "RecordedSite", "Recorder", "run", "site_log_prob", "total"]

PARTICLES = "_apg_particles"


class RecordedSite(NamedTuple):
    """What a program did at one sample site."""

    fn: Any
    value: Tensor
    mask: Any
    scale: Any
    is_observed: bool
    frames: tuple[Any, ...]


class Recorder(Messenger):
    """
    Handler that decides the values of latent sites, and keeps every site and parameter.

    Latent sites have the given values; others are drawn, and *detached*: the gradients of the
    wake-phase are those of densities, never of samples (Wu et al. 2020, section 2.1).

    :param values: values of latent sites by name.
    :param particles: the plate of the particles, around all that the program does. It is a frame
        that is added to every site, as entering a ``pyro.plate`` costs more than many a site.
    """

    def __init__(
        self, values: Mapping[str, Tensor], particles: CondIndepStackFrame | None = None
    ) -> None:
        super().__init__()
        self.values = values
        self.particles = particles
        self.sites: dict[str, RecordedSite] = {}
        self.parameters: dict[str, Tensor] = {}
        self.subsampled: dict[str, tuple[int, int]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            return
        if self.particles is not None:
            msg["cond_indep_stack"] = (self.particles, *msg["cond_indep_stack"])
            BroadcastMessenger._pyro_sample(msg)
        if msg["is_observed"] or msg["value"] is not None:
            return
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
        else:
            with torch.no_grad():
                msg["value"] = draw(msg["fn"])
        msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            size, num_chosen = msg["fn"].size, len(msg["value"])
            if num_chosen < size:
                self.subsampled[msg["name"]] = (num_chosen, size)
            return
        self.sites[msg["name"]] = RecordedSite(
            msg["fn"],
            msg["value"],
            msg["mask"],
            msg["scale"],
            msg["is_observed"],
            tuple(frame for frame in msg["cond_indep_stack"] if frame.vectorized),
        )

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor) and value.requires_grad:
            # a constrained parameter knows the leaf that an optimizer is to change
            leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
            self.parameters[msg["name"]] = leaf


def run(
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    values: Mapping[str, Tensor],
    num_particles: int | None,
    plate_nesting: int,
) -> Recorder:
    """
    Run a program once, with the particles as the leftmost of its plates.

    :param program: a Pyro program.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    :param values: values of latent sites by name, ``(particles, ...)``.
    :param num_particles: number of particles; without any if ``None``.
    :param int plate_nesting: number of batch dimensions that are the program's own.
    :raises ValueError: if a plate is empty.
    """
    frame = None
    validation: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if num_particles is not None:
        frame = CondIndepStackFrame(PARTICLES, -plate_nesting - 1, num_particles, 0)
        validation = pyro.validation_enabled(False)
    recorder = Recorder(values, frame)
    try:
        with validation, recorder:
            program(*args, **kwargs)
    except ZeroDivisionError as error:
        if "size cannot be zero" not in str(error):
            raise
        raise ValueError("A plate of the program is empty: there are no data.") from error
    return recorder


def site_log_prob(site: RecordedSite, value: Tensor, mask: Any = None) -> Tensor:
    """
    Log-density of a value at a site, with its scale and all masks.

    :param RecordedSite site: the site.
    :param Tensor value: of the shape of the site's value.
    :param mask: a further mask.
    :returns: shape ``(particles, *batch, ...)``, a dimension for every plate.
    """
    log_prob = scale_and_mask(site.fn.log_prob(value), site.scale, site.mask)
    return log_prob if mask is None else scale_and_mask(log_prob, 1.0, mask)


def total(log_prob: Tensor, num_leading: int, kept: int | None = None) -> Tensor:
    """
    Sum over the plates inside of a data set.

    :param Tensor log_prob: shape ``(particles, *batch, ...)``.
    :param int num_leading: how many dimensions the particles and the data sets have.
    :param kept: the dimension of a plate to keep, counted from the right.
    :returns: shape ``(particles, *batch)``, and the kept one behind.
    """
    keep = None if kept is None else log_prob.dim() + kept
    dims = [dim for dim in range(num_leading, log_prob.dim()) if dim != keep]
    return log_prob.sum(dims) if dims else log_prob
