"""Compiled systems compute what uncompiled ones do."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ext.infer import MCMC, ConstrainedHMC
from pyro_ext.infer.constrained_hmc.assembly import Preferences, assemble, build_system
from pyro_ext.infer.constrained_hmc.model.constrained_model import ConstrainedModel
from pyro_ext.infer.constrained_hmc.system.compilation import RecordedSystem
from pyro_ext.infer.constrained_hmc.system.constrained_system import ConstrainedSystem
from pyro_ext.ops.recording import RecordedFunction
from tests.infer.constrained_hmc.block_problems import block_problem, structure_of

CHAINS = 3
WEIGHTS = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def model() -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=torch.tensor(0.5))
    pyro.deterministic("x", torch.stack([(scale * z).square().sum(), z.prod()]))


def network() -> None:
    """A network on one latent vector, with noise, and more outputs than are conditioned on."""
    first, second = WEIGHTS
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
    hidden = torch.nn.functional.linear(z, first, first[0]).tanh()
    image = hidden @ second
    pyro.deterministic("x", image[torch.arange(3) < 2] + 0.1 * noise * image[2].exp())


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


@pytest.mark.parametrize("program", [model, network])
def test_dense_models_run_as_recorded(program: Callable[[], None]) -> None:
    """Without Pyro, and with the values and derivatives of the model itself."""
    x = torch.tensor([2.0, 0.3], dtype=torch.float64)
    conditioned = ConstrainedModel(pyro.condition(program, {"x": x}), (), {})
    system = assemble(conditioned, Preferences(CHAINS, structure="dense")).system
    assert isinstance(system.functions[0], RecordedFunction)
    assert system.has_recorded_derivatives
    plain = ConstrainedSystem(conditioned.constraint, conditioned.potential)
    position, scale = torch.randn(CHAINS, 4), torch.rand(4) + 0.5
    for each in (system, RecordedSystem(system, CHAINS, compile=False)):
        point, expected = each.point(position, scale), plain.point(position, scale)
        torch.testing.assert_close(point.energy, expected.energy)
        torch.testing.assert_close(point.gradient, expected.gradient)
        torch.testing.assert_close(point.jacobian.dense(), expected.jacobian.dense())
        residual = each.constraint(position, scale)
        torch.testing.assert_close(residual, plain.constraint(position, scale))


def test_other_numbers_of_chains_run_uncompiled(system: ConstrainedSystem) -> None:
    compiled = RecordedSystem(system, CHAINS, compile=True)
    position, scale = torch.randn(CHAINS + 1, 4), torch.ones(4)
    with torch.no_grad():
        actual = compiled.constraint(position, scale)
    assert not compiled._recorded
    torch.testing.assert_close(actual, system.constraint(position, scale), rtol=0, atol=0)


@pytest.mark.parametrize("has_blocks", [False, True], ids=["dense", "blocks"])
def test_recorded_functions_are_those_of_the_system(has_blocks: bool) -> None:
    """Whatever they take and return: Jacobians are nests of tensors and of their structure."""
    problem = block_problem([(2, 1), (1, 0), (3, 2)], 2, 1, 7)
    structure = structure_of(problem) if has_blocks else None
    system = ConstrainedSystem(problem.constraint, problem.potential, structure=structure)
    recorded = RecordedSystem(system, CHAINS, compile=False)
    scale = torch.rand(problem.dim) + 0.5
    position, other = torch.randn(2, CHAINS, problem.dim)
    jacobian = recorded.jacobian(position, scale)
    for _ in range(2):  # once recording, once recorded
        for ours, theirs in zip(
            recorded.correction(other, scale, jacobian),
            system.correction(other, scale, system.jacobian(position, scale)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
        slopes = recorded.slopes(other, scale)
        expected = system.jacobian_matrix(other, scale)
        torch.testing.assert_close(jacobian.dense_slopes(slopes), expected)
        position, other = other, position
        jacobian = recorded.jacobian(position, scale)
    assert set(recorded._recorded) == {"jacobian", "correction", "slopes"}


def _residual(samples: dict[str, Tensor]) -> Tensor:
    z, scale = samples["z"], samples["scale"].unsqueeze(-1)
    x = torch.stack([(scale * z).square().sum(-1), z.prod(-1)], -1)
    return x - torch.tensor([2.0, 0.3])
