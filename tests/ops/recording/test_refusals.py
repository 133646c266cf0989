"""What cannot be recorded honestly is refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_ext.ops.recording import RecordingError, flatten, record

OUTSIDE = torch.zeros(3)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


def branch(u: Tensor) -> Tensor:
    return u if u[0] > 0 else -u


def caught(u: Tensor) -> Tensor:
    try:
        return u * u[0].item()
    except ValueError:
        return u


def caught_conversion(u: Tensor) -> Tensor:
    try:
        return u * float(u.detach().numpy()[0])
    except ValueError:
        return u


def in_place(u: Tensor) -> Tensor:
    return u.mul_(2)


def outside(u: Tensor) -> Tensor:
    OUTSIDE.add_(u)
    return OUTSIDE * 1


def blocked(u: Tensor) -> Tensor:
    with torch.no_grad():
        centre = u.mean()
    return u - centre


def counted() -> Callable[[Tensor], Tensor]:
    calls: list[int] = []

    def function(u: Tensor) -> Tensor:
        calls.append(1)
        return u * len(calls)

    return function


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "branch": (branch, "torch.where"),
    "item": (lambda u: u * u[0].item(), "into a number"),
    "item, caught": (caught, "into a number"),
    "float": (lambda u: u * float(u[0]), "into a number"),
    "range": (lambda u: u * sum(range(int(u[0].abs()))), "into a number"),
    "tolist": (lambda u: u * u.tolist()[0], "tolist"),
    "numpy": (lambda u: u * float(u.detach().numpy()[0]), "numpy"),
    "numpy, caught": (caught_conversion, "numpy"),
    "asarray": (lambda u: u * torch.as_tensor(np.asarray(u.detach())), "__array__"),
    "mask": (lambda u: u[u > 0], "shape depends on the values"),
    "empty mask": (lambda u: u[u > 1e9], "shape depends on the values"),
    "nonzero": (lambda u: u.nonzero().double(), "shape depends on the values"),
    "randn": (lambda u: u * torch.randn(3), "random numbers"),
    "bernoulli": (lambda u: u * torch.bernoulli(u.sigmoid()), "random numbers"),
    "dropout": (torch.nn.functional.dropout, "random numbers"),
    "random numbers of NumPy": (lambda u: u * np.random.rand(), "other values"),
    "a count of calls": (counted(), "other values"),
    "writing into the input": (in_place, "writes into its input"),
    "writing outside": (outside, "mutating"),
    "no_grad": (blocked, "no_grad"),
    "data": (lambda u: u * u.data, "derivatives"),
    "own derivative": (_Doubled.apply, "custom_function_call"),
    "a number beside tensors": (lambda u: (u, 1.0), "returns a float"),
    "an error": (lambda u: u * undefined, "NameError"),  # type: ignore[name-defined]  # noqa: F821
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_the_reason(function: Callable[[Tensor], Any], reason: str) -> None:
    with pytest.raises(RecordingError, match=reason):
        record(function, torch.randn(3))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["branch", "mask", "randn", "a count of calls"])
def test_flatten_refuses_too(name: str) -> None:
    function, reason = REFUSED[name]
    with pytest.raises(RecordingError, match=reason):
        flatten(lambda u, scale: function(u * scale), torch.randn(3), torch.ones(3))


@pytest.mark.parametrize("recorder", [record, flatten])
def test_examples_must_be_of_floating_point(recorder: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"floating point.*int64"):
        recorder(lambda u: u * 2, torch.arange(3))


def test_random_numbers_that_nothing_needs_are_allowed() -> None:
    def function(u: Tensor) -> Tensor:
        u * torch.randn(3)
        return u * 2

    assert record(function, torch.randn(3)).num_operations == 1


def test_numbers_that_do_not_depend_on_the_input_are_allowed() -> None:
    def function(u: Tensor) -> Tensor:
        scale = torch.tensor(3.0)
        return u * scale.item() if scale > 2 else u

    recorded = record(function, torch.randn(3))
    torch.testing.assert_close(recorded(torch.ones(3)), torch.full((3,), 3.0))


def test_derivatives_that_nobody_takes_are_not_checked() -> None:
    def function(u: Tensor) -> Tensor:
        return u * u.data

    with pytest.raises(RecordingError, match="derivatives"):
        record(function, torch.randn(3))
    recorded = record(function, torch.randn(3), differentiable=False)
    torch.testing.assert_close(recorded(torch.full((3,), 2.0)), torch.full((3,), 4.0))
