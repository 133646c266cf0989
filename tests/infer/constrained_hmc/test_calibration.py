"""Simulation-based calibration (Talts et al. 2018, arXiv:1804.06788) on a nonlinear model."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext import MCMC, ConstrainedHMC
from pyro_ext.diagnostics import calibration_of_ranks, rank_statistics
from pyro_ext.diagnostics.simulation import simulate
from pyro_ext.infer.constrained_hmc.assembly import default_tolerances
from pyro_ext.infer.constrained_hmc.dynamics.integrator import IntegratorSettings
from pyro_ext.infer.constrained_hmc.dynamics.projection import quasi_newton
from pyro_ext.infer.constrained_hmc.dynamics.transitions import hmc_transition
from pyro_ext.infer.constrained_hmc.jacobian.structure import DenseJacobian
from pyro_ext.infer.constrained_hmc.model.constrained_model import ConstrainedModel
from pyro_ext.infer.constrained_hmc.system.constrained_system import ConstrainedSystem, Point

NUM_REPLICATIONS = 2000
NUM_RANKS = 16
STEP_SIZE, NUM_STEPS = 0.3, 5

QUANTITIES = {
    "theta": lambda u: u[..., 0],
    "first noise": lambda u: u[..., 1],
    "square of theta": lambda u: u[..., 0].square(),
    "log density": lambda u: -u.square().sum(-1),
}


def model() -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    first = theta + 0.3 * theta**2 + 0.8 * noise[..., 0]
    second = (0.5 * theta).exp() * (1.0 + 0.5 * noise[..., 1]) + 0.2 * first.sin()
    pyro.deterministic("y", torch.stack([first, second], -1), event_dim=1)


class Replications:
    """Chains of one model that are conditioned each on data of its own."""

    def __init__(self, system: ConstrainedSystem, y: Tensor) -> None:
        self._system = system
        self._y = y
        self.slopes = system.slopes

    def constraint(self, position: Tensor, scale: Tensor) -> Tensor:
        return self._system.constraint(position, scale) - self._y

    def correction(
        self, position: Tensor, scale: Tensor, jacobian: DenseJacobian
    ) -> tuple[Tensor, Tensor]:
        residual = self.constraint(position, scale)
        return residual, jacobian.minimum_norm(residual)

    def jacobian(self, position: Tensor, scale: Tensor) -> DenseJacobian:
        return self._system.jacobian(position, scale)

    def point(self, position: Tensor, scale: Tensor) -> Point:
        return self._system.point(position, scale)


@pytest.mark.slow
def test_ranks_of_prior_draws_are_uniform() -> None:
    """
    A prior draw is a posterior draw given the data it generates.

    In a reversible chain that visits it at a random time, its rank among the states of the chain
    is uniform, however strongly they are correlated (Besag and Clifford 1989, doi:
    10.1093/biomet/76.4.633): the chain is run to both sides of the prior draw.
    """
    generator = ConstrainedModel(pyro.condition(model, {"y": torch.zeros(2)}), (), {})
    system = ConstrainedSystem(generator.constraint, generator.potential)
    truth, scale = torch.randn(NUM_REPLICATIONS, generator.dim), torch.ones(generator.dim)
    replications = Replications(system, system.constraint(truth, scale))
    settings = IntegratorSettings(quasi_newton, None, default_tolerances(generator, None, 30), 1)
    num_before = torch.randint(NUM_RANKS, (NUM_REPLICATIONS,))
    tie_break = torch.rand(NUM_REPLICATIONS)
    ranks = {name: torch.zeros_like(num_before) for name in QUANTITIES}
    for length in (num_before, NUM_RANKS - 1 - num_before):
        point, residual = replications.point(truth, scale), torch.zeros(NUM_REPLICATIONS)
        for i in range(NUM_RANKS - 1):
            point, info, _ = hmc_transition(
                replications, scale, settings, point, residual, STEP_SIZE, NUM_STEPS
            )
            residual = info.constraint_residual
            for name, quantity in QUANTITIES.items():
                value, true_value = quantity(point.position), quantity(truth)
                is_tied = (point.position == truth).all(-1)
                is_below = torch.where(
                    is_tied, torch.rand_like(value) < tie_break, value < true_value
                )
                ranks[name] += is_below & (i < length)
    result = calibration_of_ranks(ranks, NUM_RANKS - 1, num_bins=NUM_RANKS)
    assert result.p_value > 0.01, result.summary()


@pytest.mark.slow
def test_the_engine_is_calibrated() -> None:
    """As its users run it, on 100 data sets of which each has a block of the Jacobian."""

    def many() -> None:
        with pyro.plate("data sets", 100):
            model()

    truth = simulate(many, ["y"])
    kernel = ConstrainedHMC(
        pyro.condition(many, truth.observation),
        step_size=0.25,
        num_steps=6,
        adapt_step_size=False,
    )
    mcmc = MCMC(kernel, 40, 15, num_chains=4, disable_progbar=True)
    mcmc.run()
    assert "100 local blocks" in mcmc.diagnostics()["structure"]["chain 0"]
    draws = {
        name: values[:, ::4].flatten(0, 1)
        for name, values in mcmc.get_samples(group_by_chain=True).items()
    }
    result = calibration_of_ranks(
        {name: rank_statistics(truth.latents[name], values) for name, values in draws.items()}, 40
    )
    assert set(result.ranks) == {"theta", "noise"}
    assert result.p_value > 0.01, result.summary()
