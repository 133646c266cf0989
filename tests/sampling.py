"""Run the constrained sampler on small models, the way the statistical tests need it."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_ext import MCMC, ConstrainedHMC, ConstrainedNUTS

__all__ = ["LARGEST_RESIDUAL", "residuals", "sample"]

LARGEST_RESIDUAL = 1e-8


def sample(
    model: Callable[..., Any],
    data: dict[str, Tensor | float] | None = None,
    *args: Any,
    num_chains: int = 150,
    num_samples: int = 30,
    warmup_steps: int = 25,
    chain_method: str = "vectorized",
    kernel: type[ConstrainedHMC] | type[ConstrainedNUTS] = ConstrainedHMC,
    **settings: Any,
) -> dict[str, Tensor]:
    """
    Draws of every latent site, ``(chains, draws, ...)``, all of them on the manifold.

    Many short chains cost little more than one when they are vectorised.

    :param model: a Pyro model.
    :param data: values of deterministic sites to condition on; ``None`` if the model already is.
    :param args: the model's arguments.
    :param kernel: what to sample with.
    :param settings: for the kernel.
    """
    if data is not None:
        model = pyro.condition(model, {name: torch.as_tensor(v) for name, v in data.items()})
    mcmc = MCMC(
        kernel(model, **settings),
        num_samples,
        warmup_steps,
        num_chains=num_chains,
        chain_method=chain_method,
        disable_progbar=True,
    )
    mcmc.run(*args)
    assert residuals(mcmc).max() <= LARGEST_RESIDUAL
    return mcmc.get_samples(group_by_chain=True)


def residuals(mcmc: MCMC) -> Tensor:
    """Largest constraint residual of every draw, ``(chains, draws)``."""
    by_chain = mcmc.diagnostics()["constraint_residual"]
    return torch.stack(list(by_chain.values()))
