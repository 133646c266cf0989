"""How well videos are reconstructed and digits are tracked, sweep by sweep."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from canvas import RANGE
from model import stack_where
from torch import Tensor

__all__ = ["Sweeps", "best_order", "follow", "tracking_error"]


class Sweeps(NamedTuple):
    """Figures after every sweep, the draw from the encoder first: ``(sweeps, videos)``."""

    squared_error: Tensor
    """Between the video and its reconstruction, averaged over pixels and particles."""
    clean_squared_error: Tensor
    """The same for the video before its pixels were drawn, which has no noise."""
    log_joint: Tensor
    """Of a particle, on average."""
    distance: Tensor
    """Between a digit and where it is in truth, in pixels: :func:`tracking_error`."""
    distance_of_frames: Tensor
    """The same with digits named anew in every frame: are they found, whoever they are?"""
    latents: dict[str, Tensor]
    """Of the particle of largest weight, after the last sweep, ``(videos, ...)``."""


@torch.no_grad()
def follow(sampler: Any, tracker: Any, videos: Any, num_sweeps: int, **settings: Any) -> Sweeps:
    """
    Run a sampler on videos, and compare with them after every sweep.

    :param sampler: an :class:`~pyro_ext.infer.APG`.
    :param tracker: its model.
    :param videos: some videos of :func:`videos.simulate`.
    :param int num_sweeps: number of sweeps.
    :param settings: ``num_particles``.
    """
    rows: list[tuple[Tensor, ...]] = []
    num_frames, num_digits = videos.where.shape[1:3]
    for particles in sampler.sweeps(videos.frames, num_sweeps=num_sweeps, **settings):
        weights = torch.softmax(particles.log_weights, 0)
        where = stack_where(particles.latents, num_frames, num_digits)
        errors = [torch.zeros_like(weights) for _ in range(2)]
        for t in range(num_frames):  # one by one, as all frames of all particles would not fit
            seen = tracker.reconstruct(particles.latents["what"], where[:, :, t, None])[:, :, 0]
            for error, target in zip(errors, (videos.frames, videos.clean), strict=True):
                error += (seen - target[:, t]).square().mean((-1, -2)) / num_frames
        rows.append(
            (
                *((weights * error).sum(0) for error in errors),
                (weights * particles.log_joint).sum(0),
                (weights * tracking_error(where, videos.where)).sum(0),
                (weights * _error_of_frames(where, videos.where)).sum(0),
            )
        )
    best = particles.log_weights.argmax(0)
    videos_of = torch.arange(len(videos.frames))
    latents = {name: value[best, videos_of] for name, value in particles.latents.items()}
    return Sweeps(*(torch.stack(column) for column in zip(*rows, strict=True)), latents)


def best_order(where: Tensor, truth: Tensor) -> Tensor:
    """
    The true digit that every inferred one is, by the one assignment that fits to all frames best.

    :param Tensor where: positions, shape ``(..., frames, digits, 2)``.
    :param Tensor truth: of a shape that broadcasts.
    :returns: numbers of true digits, ``(..., digits)``.
    """
    distance = _distances(where, truth)
    orders = _orders(distance)
    return orders[_means(distance, orders).argmin(-1)]


def tracking_error(where: Tensor, truth: Tensor) -> Tensor:
    """
    Mean distance in pixels between positions and those in truth, digits assigned as they fit best.

    :param Tensor where: positions, shape ``(..., frames, digits, 2)``.
    :param Tensor truth: of a shape that broadcasts.
    """
    distance = _distances(where, truth)
    return _means(distance, _orders(distance)).amin(-1)


def _error_of_frames(where: Tensor, truth: Tensor) -> Tensor:
    return tracking_error(where.unsqueeze(-3), truth.unsqueeze(-3)).mean(-1)


def _distances(where: Tensor, truth: Tensor) -> Tensor:
    """Averaged over frames, ``(..., digits, true digits)``."""
    difference = where.unsqueeze(-2) - truth.unsqueeze(-3)
    return difference.norm(dim=-1).mean(-3) * 0.5 * RANGE


def _orders(distance: Tensor) -> Tensor:
    return torch.tensor(list(itertools.permutations(range(distance.shape[-1]))))


def _means(distance: Tensor, orders: Tensor) -> Tensor:
    """Of the distances under every order, ``(..., orders)``."""
    return distance[..., torch.arange(distance.shape[-1]), orders].mean(-1)
