"""What an effective draw costs: in processor time, and in gradients of the energy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import arviz
from torch import Tensor

from pyro_ext import MCMC

__all__ = ["Counted", "Run", "counted_run", "smallest_ess"]


class Counted:
    """
    A model that counts its runs.

    :param model: a Pyro model.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.runs = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return self.model(*args, **kwargs)


class Run(NamedTuple):
    """
    Draws of one run, and what they took.

    ``mcmc``
        the run.
    ``z``
        latent vectors, shape ``(num_chains, num_draws, latent_size)``.
    ``seconds_in_all``
        processor time, set-up and warm-up included.
    ``seconds``
        processor time after warm-up.
    ``gradients``
        of the energy, after warm-up, of all chains: one per integrator step.
    """

    mcmc: MCMC
    z: Tensor
    seconds_in_all: float
    seconds: float
    gradients: int


def counted_run(
    make_kernel: Callable[..., Any],
    model: Callable[..., Any],
    num_samples: int,
    warmup_steps: int,
    num_chains: int = 1,
) -> Run:
    """
    Draw from the posterior of a latent vector ``z``, and count.

    :param make_kernel: from a model to an MCMC kernel. One that does not say how many steps it
        took runs the model once for each.
    :param model: a Pyro model.
    :param int num_samples: draws of each chain.
    :param int warmup_steps: draws before, at least one.
    :param int num_chains: number of chains.
    """
    counted, marks = Counted(model), []

    def note(kernel: Any, samples: Any, stage: str, i: int) -> None:
        marks.append((time.process_time(), counted.runs))

    start = time.process_time()
    options = {"hook_fn": note, "disable_progbar": True, "num_chains": num_chains}
    mcmc = MCMC(make_kernel(counted), num_samples, warmup_steps, chain_method=None, **options)
    mcmc.run()
    (begun, runs_begun), (ended, runs_ended) = marks[warmup_steps - 1], marks[-1]
    steps = mcmc.diagnostics().get("num_steps")
    return Run(
        mcmc=mcmc,
        z=mcmc.get_samples(group_by_chain=True)["z"],
        seconds_in_all=ended - start,
        seconds=ended - begun,
        gradients=int(sum(map(sum, steps.values()))) if steps else runs_ended - runs_begun,
    )


def smallest_ess(z: Tensor) -> float:
    """
    Effective sample size of the worst latent: of location, tails and spread.

    :param Tensor z: shape ``(num_chains, num_draws, latent_size)``, with at least four draws.
    """
    return min(
        float(arviz.ess(z[..., i].numpy(), method=method))
        for i in range(z.shape[-1])
        for method in ("bulk", "tail", "sd")
    )
