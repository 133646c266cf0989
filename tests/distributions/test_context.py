"""Contexts of densities: their scale, their dtype, and what is said of those that do not fit."""

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_ext import AutoregressiveEnergyMachine, NeuralSplineFlow, ScoreFlow, fit_density
from pyro_ext.distributions import KernelDensityAEM
from pyro_ext.distributions.context import ContextScale
from pyro_ext.distributions.diffusion import OdeSettings

SMALL_MACHINE = {"hidden_features": 16, "energy_hidden_features": 16, "residual_blocks": 1}


def _coupling(**settings: Any) -> NeuralSplineFlow:
    return NeuralSplineFlow(2, 3, transforms=2, hidden_features=8, **settings)


def _machine() -> AutoregressiveEnergyMachine:
    return AutoregressiveEnergyMachine(2, 3, **SMALL_MACHINE)


def _diffusion() -> ScoreFlow:
    ode = OdeSettings(solver="rk4", num_steps=5)
    return ScoreFlow(2, hidden_features=8, residual_blocks=1, context_features=3, ode=ode)


MAKERS = {"spline flow": _coupling, "energy machine": _machine, "score flow": _diffusion}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS.keys())
def module(request: pytest.FixtureRequest) -> nn.Module:
    made: nn.Module = request.param()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


@torch.no_grad()
def _log_prob(module: nn.Module, context: Tensor, x: Tensor) -> Tensor:
    settings = {"exact": True} if isinstance(module, AutoregressiveEnergyMachine) else {}
    log_prob: Tensor = module(context).log_prob(x, **settings)
    return log_prob


def _draws(module: Any, context: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    modules = [module]
    if isinstance(module, AutoregressiveEnergyMachine):
        modules.append(KernelDensityAEM(module, num_nodes=20))
    with torch.no_grad():
        return [each(context).sample() for each in modules]


def test_the_unit_of_a_context_does_not_matter(module: Any) -> None:
    context, x = torch.randn(8, 3), torch.randn(8, 2)
    unit, zero = torch.tensor([1e-6, 5.0, 1e6]), torch.tensor([0.0, 2000.0, -3e6])
    weights = {k: v for k, v in module.state_dict().items() if not k.startswith("context_scale")}
    module.initialize(x, context)
    expected, draws = _log_prob(module, context, x), _draws(module, context)
    module.load_state_dict(weights, strict=False)
    module.initialize(x, context * unit + zero)
    context = context * unit + zero
    torch.testing.assert_close(_log_prob(module, context, x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(_draws(module, context), draws, rtol=0, atol=1e-5)
    assert (_log_prob(module, context.roll(1, 0), x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_contexts_of_lower_precision(module: nn.Module, dtype: torch.dtype) -> None:
    context, x = torch.tensor([[1, 0, 2], [0, 1, 3]]), torch.randn(2, 2)
    expected = _log_prob(module, context.to(x), x)
    torch.testing.assert_close(_log_prob(module, context.to(dtype), x), expected)


def test_contexts_of_higher_precision_are_refused(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"context is of torch.float64.*torch.float32"):
        module.float()(torch.randn(5, 3, dtype=torch.float64))


def test_contexts_that_are_no_tensors_are_refused(module: nn.Module) -> None:
    with pytest.raises(TypeError, match="context is a ndarray: give a tensor"):
        module(torch.randn(5, 3).numpy())


def test_contexts_that_are_not_finite_tell_no_scale(module: Any) -> None:
    context = torch.randn(5, 3)
    context[1, 2] = torch.nan
    with pytest.raises(ValueError, match="1 of the numbers in the context are not finite"):
        module.initialize(torch.randn(5, 2), context)


def test_values_of_higher_precision_are_refused(module: nn.Module) -> None:
    context, x = torch.randn(5, 3).float(), torch.randn(5, 2)
    with pytest.raises(TypeError, match=r"value is of torch.float64.*torch.float32"):
        module.float()(context).log_prob(x)


def test_the_scale_is_saved_and_does_not_change_what_is_unconditional() -> None:
    scale = ContextScale(2, torch.zeros(()))
    scale.initialize(torch.tensor([[0.1, 1.0], [0.1, 3.0], [0.1, 5.0]]))
    other = ContextScale(2, torch.zeros(()))
    assert scale.is_initialized
    assert not other.is_initialized
    other.load_state_dict(scale.state_dict())
    torch.testing.assert_close(other.scale, torch.tensor([1.0, (8 / 3) ** 0.5]))
    assert not ContextScale(0, torch.zeros(())).state_dict()


def test_a_function_that_makes_the_base_reads_the_context_itself() -> None:
    seen = []

    def base(context: Tensor) -> dist.TorchDistribution:
        seen.append(context)
        return dist.Normal(context[..., :2], 1.0).to_event(1)

    flow, context = _coupling(base=base), 2000.0 + torch.randn(50, 3)
    flow.initialize(torch.randn(50, 2), context)
    flow(context)
    assert seen[0] is context


def test_a_second_fit_goes_on_where_the_first_one_ended(module: Any) -> None:
    x, context = torch.randn(300, 2) + 5.0, torch.randn(300, 3) + 7.0
    module.initialize(x, context)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    settings: dict[str, Any] = {"num_steps": 1, "learning_rate": 1e-30, "progress": False}
    loss = getattr(module, "training_loss", None)
    if loss is not None:
        settings["loss"] = lambda flow, x, context: flow.training_loss(x, context)
    fit_density(module, x[:100], context=context[:100], **settings)
    for name, value in module.state_dict().items():
        if name != "training_steps":
            torch.testing.assert_close(value, before[name])
