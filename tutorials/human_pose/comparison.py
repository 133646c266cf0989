"""How far the posterior mean of the joints is from the truth, against the time it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ext import MCMC, deterministic_values

__all__ = ["TimedJoints", "running_error", "timed_run"]


class TimedJoints(NamedTuple):
    """
    Draws of one run, and when they were there.

    ``joints``
        shape ``(num_chains, num_draws, num_joints, 3)``.
    ``seconds``
        processor time since the start, set-up and warm-up included, shape ``(num_draws,)``.
    ``mcmc``
        the run.
    """

    joints: Tensor
    seconds: Tensor
    mcmc: MCMC


def timed_run(
    kernel: Any, model: Callable[..., Any], num_samples: int, warmup_steps: int, num_chains: int
) -> TimedJoints:
    """
    Run a kernel on a model with a deterministic site ``joints``.

    :param kernel: an MCMC kernel.
    :param model: has the kernel's latent sites.
    :param int num_samples: draws of each chain.
    :param int warmup_steps: draws before.
    :param int num_chains: number of chains.
    """
    seconds: list[float] = []
    start = time.process_time()

    def note(kernel: Any, samples: Any, stage: str, i: int) -> None:
        if not stage.startswith("Warmup"):
            seconds.append(time.process_time() - start)

    options = {"hook_fn": note, "disable_progbar": True}
    mcmc = MCMC(kernel, num_samples, warmup_steps, num_chains=num_chains, **options)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)
    joints = deterministic_values(model, draws)["joints"]
    return TimedJoints(joints, torch.tensor(seconds[:num_samples]), mcmc)


def running_error(joints: Tensor, truth: Tensor) -> Tensor:
    """
    Root mean square distance of the mean over the draws so far, of all chains, from the truth.

    :param Tensor joints: shape ``(num_chains, num_draws, num_joints, 3)``.
    :param Tensor truth: shape ``(num_joints, 3)``.
    :returns: metres, shape ``(num_draws,)``.
    """
    number = torch.arange(1, joints.shape[1] + 1).reshape(-1, 1, 1)
    means = joints.mean(0).cumsum(0) / number
    return (means - truth).square().sum(-1).mean(-1).sqrt()
