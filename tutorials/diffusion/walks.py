"""What draws are on their way from noise to data."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from pyro_ext.distributions import ScoreFlow

__all__ = ["walks"]


def walks(flow: ScoreFlow, noise: Tensor, num_steps: int, *, is_random: bool) -> Tensor:
    """
    Follow the probability-flow equation or the reverse diffusion, by Euler's steps.

    :param ScoreFlow flow: the flow.
    :param Tensor noise: standard normal, shape ``(n, features)``.
    :param int num_steps: steps of equal length on the natural scale of the diffusion.
    :param bool is_random: whether to follow the reverse diffusion.
    :returns: positions, in the units of standardised data, shape ``(num_steps + 1, n, features)``.
    """
    sde, score, rows = flow.sde, flow.score_of(None), torch.arange(len(noise))
    grid = sde.time(torch.linspace(1, 0, num_steps + 1))
    x, path = noise * sde.prior_std, [noise * sde.prior_std]
    with torch.no_grad():
        for t, earlier in pairwise(grid):
            length, variance = t - earlier, sde.diffusion(t).square()
            push = variance * score(x, t.expand(len(x)), rows)
            x = x - (sde.drift_rate(t) * x - (1.0 if is_random else 0.5) * push) * length
            if is_random:
                x = x + (variance * length).sqrt() * torch.randn_like(x)
            path.append(x)
    return torch.stack(path)
