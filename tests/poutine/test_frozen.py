"""Frozen models learn nothing, and are afterwards as they were."""

import threading
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_pre_hooks

from pyro_ext.poutine import condition_on, frozen

pytestmark = pytest.mark.usefixtures("param_store")


def _decoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def _model(decoder: nn.Module, *, register: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        if register:
            pyro.module("decoder", decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    return model


class _Method(nn.Module):
    """A model that is a method, with a parameter outside of its networks."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = _decoder()
        self.shift = nn.Parameter(torch.zeros(3))

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = self.decoder(z) + self.shift
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


class _Pyro(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = _decoder()
        self.scale = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = self.decoder(z) + self.shift
            pyro.sample("x", dist.Normal(loc, self.scale).to_event(1), obs=x)


def _cases() -> dict[str, Callable[[], tuple[Callable[[Tensor], None], nn.Module]]]:
    def closure(register: bool) -> tuple[Callable[[Tensor], None], nn.Module]:
        decoder = _decoder()
        return _model(decoder, register=register), decoder

    def method() -> tuple[Callable[[Tensor], None], nn.Module]:
        module = _Method()
        return module.model, module

    def pyro_module() -> tuple[Callable[[Tensor], None], nn.Module]:
        module = _Pyro()
        return module, module

    return {
        "closure": lambda: closure(False),
        "pyro.module": lambda: closure(True),
        "method": method,
        "PyroModule": pyro_module,
    }


CASES = _cases()


@pytest.mark.parametrize("case", CASES)
def test_nothing_learned_is_changed_by_training(case: str) -> None:
    model, module = CASES[case]()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    conditioned = condition_on(frozen(model), mask={"x": torch.tensor([True, False, True])})
    guide = AutoNormal(conditioned)
    svi = SVI(conditioned, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    x = torch.randn(5, 3)
    start = {}
    for _ in range(3):
        svi.step(x)
        start = start or {n: p.detach().clone() for n, p in guide.named_parameters()}
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(p.grad is None for p in module.parameters())
    # ... while the guide did learn, and the module is as it was
    assert any((p != start[n]).any() for n, p in guide.named_parameters())
    assert all(p.requires_grad for p in module.parameters())
    assert all(part.training for part in module.modules())
    assert not _global_forward_pre_hooks


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_not_seen_from_outside(case: str) -> None:
    model, _ = CASES[case]()
    trace = poutine.trace(frozen(model)).get_trace(torch.randn(4, 3))
    assert trace.param_nodes == []
    assert not trace.log_prob_sum().requires_grad
    stored = {n for n in pyro.get_param_store() if not n.startswith("scale")}
    assert not stored


@pytest.mark.parametrize("case", CASES)
def test_rows_do_not_influence_each_other(case: str) -> None:
    model, module = CASES[case]()
    x, z = torch.randn(5, 3), torch.randn(5, 2)

    def log_prob(rows: slice) -> Tensor:
        conditioned = poutine.condition(frozen(model), {"z": z[rows]})
        trace = poutine.trace(conditioned).get_trace(x[rows])
        trace.compute_log_prob()
        return trace.nodes["x"]["log_prob"]

    torch.testing.assert_close(log_prob(slice(None))[:2], log_prob(slice(2)))
    module.eval()
    torch.testing.assert_close(log_prob(slice(2)), log_prob(slice(2)))


def test_values_of_the_store_are_used_and_kept() -> None:
    def model() -> Tensor:
        return pyro.param("w", torch.tensor(2.0), constraint=dist.constraints.positive)

    model()
    with torch.no_grad():
        pyro.param("w").unconstrained().fill_(0.0)
    value = frozen(model)()
    assert float(value) == 1.0
    assert not value.requires_grad
    assert pyro.param("w").requires_grad


def test_a_parameter_that_does_not_exist_yet() -> None:
    value = frozen(lambda: pyro.param("new", lambda: torch.tensor([1.0, 2.0])))()
    assert value.tolist() == [1.0, 2.0]
    assert not value.requires_grad


def test_gradients_reach_the_latents() -> None:
    decoder = _decoder()
    z = torch.randn(5, 2, requires_grad=True)
    conditioned = poutine.condition(frozen(_model(decoder, register=False)), {"z": z})
    log_prob = poutine.trace(conditioned).get_trace(torch.randn(5, 3)).log_prob_sum()
    log_prob.backward()
    assert z.grad is not None
    assert (z.grad != 0).all()
    assert all(p.grad is None for p in decoder.parameters())


def test_state_is_put_back_after_an_error() -> None:
    decoder = _decoder()

    def model() -> None:
        decoder(torch.zeros(5, 2))
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        frozen(model)()
    assert decoder.training
    assert all(p.requires_grad for p in decoder.parameters())
    assert not _global_forward_pre_hooks


def test_what_was_frozen_or_in_evaluation_before_stays_so() -> None:
    decoder = _decoder()
    first, last = decoder[0], decoder[3]
    first.requires_grad_(False)
    last.eval()
    frozen(_model(decoder, register=False))(torch.randn(4, 3))
    assert not any(p.requires_grad for p in first.parameters())
    assert not last.training
    assert decoder[1].training


def test_frozen_in_frozen() -> None:
    decoder = _decoder()
    model = frozen(condition_on(frozen(_model(decoder, register=True)), mask={"x": True}))
    trace = poutine.trace(model).get_trace(torch.randn(4, 3))
    assert not trace.log_prob_sum().requires_grad
    assert decoder.training
    assert all(p.requires_grad for p in decoder.parameters())


def test_other_threads_train_on() -> None:
    decoder, other = _decoder(), nn.Linear(2, 2)
    seen: list[Any] = []

    def train() -> None:
        other(torch.zeros(1, 2, dtype=torch.float64)).sum().backward()
        seen.append(other.training and other.weight.grad is not None)

    def model(x: Tensor) -> None:
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        _model(decoder, register=False)(x)

    frozen(model)(torch.randn(4, 3))
    assert seen == [True]
