"""Energies that are known, and small machines, for the tests of energy machines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ext.distributions import AutoregressiveEnergyMachine
from pyro_ext.distributions.energy.conditionals import Conditionals
from pyro_ext.distributions.energy.proposals import DefensiveMixture, broad_log_prob

__all__ = [
    "SMALL",
    "FixedEnergy",
    "conditionals",
    "log_mixture",
    "log_normal",
    "machine",
    "mixture_cdf",
    "random_machine",
]

SMALL: dict[str, Any] = {
    "hidden_features": 16,
    "residual_blocks": 1,
    "energy_hidden_features": 16,
    "energy_context": 8,
    "mixture_components": 3,
    "frequencies": 1,
    "monitor_every": 0,
}


def log_normal(x: Tensor, loc: float = 0.0, scale: float = 1.0) -> Tensor:
    """Log-density of a normal distribution."""
    standardized = (x - loc) / scale
    return -0.5 * standardized.square() - math.log(scale * math.sqrt(2 * math.pi))


def log_mixture(x: Tensor) -> Tensor:
    """Log-density of a mixture with a narrow mode that proposals of unit scale nearly miss."""
    return torch.logaddexp(
        log_normal(x, -1.0, 0.5) + math.log(0.7), log_normal(x, 1.5, 0.02) + math.log(0.3)
    )


def mixture_cdf(x: Tensor) -> Tensor:
    """Its distribution function."""
    return 0.7 * torch.special.ndtr((x + 1) / 0.5) + 0.3 * torch.special.ndtr((x - 1.5) / 0.02)


class FixedEnergy(nn.Module):
    """
    An energy with which the density is a known one, up to a constant, beside the broad reference.

    :param log_density: logarithm of the density, elementwise.
    :param float constant: what is added to it.
    """

    def __init__(self, log_density: Callable[[Tensor], Tensor], constant: float = 0.0) -> None:
        super().__init__()
        self.log_density, self.constant = log_density, constant

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.log_density(x) - broad_log_prob(x) + self.constant


def machine(features: int = 2, context_features: int = 0, **settings: Any) -> Any:
    """A small machine, as it starts."""
    return AutoregressiveEnergyMachine(features, context_features, **{**SMALL, **settings})


def random_machine(
    features: int = 2, context_features: int = 0, amount: float = 0.4, **settings: Any
) -> Any:
    """A small machine away from its start, whose energies differ by some nats."""
    aem = machine(features, context_features, **settings)
    with torch.no_grad():
        for parameter in aem.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
        aem.energy.output.weight.mul_(0.5)
    return aem.eval()


def conditionals(number: int, log_density: Callable[[Tensor], Tensor]) -> Conditionals:
    """The same known density that many times, with the broad component as the reference."""
    proposal = DefensiveMixture(
        torch.tensor([0.1, 0.6, 0.3]).log().expand(number, 3),
        torch.tensor([-0.8, 1.2]).expand(number, 2),
        torch.tensor([0.8, 0.5]).expand(number, 2),
    )
    energy = FixedEnergy(log_density, constant=-3.0)
    return Conditionals(energy, torch.zeros(number, 1), proposal, has_broad_reference=True)
