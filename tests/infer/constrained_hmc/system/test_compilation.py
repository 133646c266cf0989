"""Compiled systems compute what uncompiled ones do."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ext.infer import MCMC, ConstrainedHMC
from pyro_ext.infer.constrained_hmc.assembly import build_system
from pyro_ext.infer.constrained_hmc.model.constrained_model import ConstrainedModel
from pyro_ext.infer.constrained_hmc.system.compilation import RecordedSystem
from pyro_ext.infer.constrained_hmc.system.constrained_system import ConstrainedSystem

CHAINS = 3


def model() -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=torch.tensor(0.5))
    pyro.deterministic("x", torch.stack([(scale * z).square().sum(), z.prod()]))


CONDITIONED = pyro.condition(model, {"x": torch.tensor([2.0, 0.3], dtype=torch.float64)})


@pytest.fixture
def system() -> ConstrainedSystem:
    return build_system(ConstrainedModel(CONDITIONED, (), {}), CHAINS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
def test_a_compiled_run_is_right_and_keeps_the_validation_of_distributions(
    system: ConstrainedSystem,
) -> None:
    is_enabled = Distribution._validate_args
    kernel = ConstrainedHMC(CONDITIONED, compile=True)
    mcmc = MCMC(kernel, 20, 20, num_chains=CHAINS, disable_progbar=True)
    mcmc.run()
    assert Distribution._validate_args is is_enabled
    assert float(_residual(mcmc.get_samples()).abs().max()) < 1e-8

    compiled = kernel._system
    position, scale = torch.randn(CHAINS, 4), torch.rand(4) + 0.5
    with torch.no_grad():
        expected, actual = system.point(position, scale), compiled.point(position, scale)
        constraint = compiled.constraint(position, scale)
    torch.testing.assert_close(constraint, system.constraint(position, scale))
    torch.testing.assert_close(actual.energy, expected.energy)
    torch.testing.assert_close(actual.gradient, expected.gradient)
    torch.testing.assert_close(actual.jacobian.dual, expected.jacobian.dual)
    torch.compiler.reset()


def test_other_numbers_of_chains_run_uncompiled(system: ConstrainedSystem) -> None:
    compiled = RecordedSystem(system, CHAINS, compile=True)
    position, scale = torch.randn(CHAINS + 1, 4), torch.ones(4)
    with torch.no_grad():
        actual = compiled.constraint(position, scale)
    assert not compiled._recorded
    torch.testing.assert_close(actual, system.constraint(position, scale), rtol=0, atol=0)


def _residual(samples: dict[str, Tensor]) -> Tensor:
    z, scale = samples["z"], samples["scale"].unsqueeze(-1)
    x = torch.stack([(scale * z).square().sum(-1), z.prod(-1)], -1)
    return x - torch.tensor([2.0, 0.3])
