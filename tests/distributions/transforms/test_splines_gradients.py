"""Gradients of splines against automatic differentiation of the formulas, and torch.func."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyro_ext.distributions.transforms import QuadraticSpline, RationalQuadraticSpline
from tests.distributions.reference_splines import (
    Spline,
    interval,
    reference_forward,
    reference_inverse,
)

FAMILIES: dict[str, Callable[..., Spline]] = {
    "rational-quadratic": RationalQuadraticSpline,
    "rational-quadratic in [0, 1]": partial(RationalQuadraticSpline, tails=False),
    "quadratic": QuadraticSpline,
    "quadratic in [0, 1]": partial(QuadraticSpline, tails=False),
}
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
directions = pytest.mark.parametrize("direction", ["forward", "inverse"])
REFERENCES = {"forward": reference_forward, "inverse": reference_inverse}


def _inputs(spline: Spline, *shape: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    low, high = interval(spline)
    beyond = 0.1 * (high - low) if spline.tails else 0.0
    x = torch.empty(shape).uniform_(low - beyond, high + beyond)
    parameters = scale * torch.randn(*shape, spline.num_parameters)
    return x.requires_grad_(), parameters.requires_grad_()


def _gradients(
    results: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor], **options: Any
) -> tuple[Tensor, ...]:
    """Of a sum with weights of both signs, the same in every call."""
    value, log_slope = results
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(value.shape, generator=generator) for _ in range(2)]
    total = (weights[0] * value + weights[1] * log_slope).sum()
    return torch.autograd.grad(total, inputs, **options)


def _assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """The error of any element, relative to the largest one."""
    assert ours.shape == theirs.shape
    if ours.numel():
        error = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1.0)
        assert error <= tolerance, f"relative error {error:.2g}"


@families
@directions
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    bins=st.integers(2, 12),
    scale=st.sampled_from([0.0, 0.1, 1.0, 3.0]),
    min_ratio=st.sampled_from([1e-4, 0.005, 0.3]),
    seed=st.integers(0, 1000),
)
def test_gradients_are_those_of_the_formulas(
    family: Callable[..., Spline],
    direction: str,
    shape: tuple[int, ...],
    bins: int,
    scale: float,
    min_ratio: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    spline = family(bins, min_ratio=min_ratio)
    inputs = _inputs(spline, *shape, scale=scale)
    expected = _gradients(REFERENCES[direction](spline, *inputs), inputs)
    # where slopes are extreme the two ways of rounding differ by what is lost in the values
    tolerance = 1e-10 if scale <= 1.0 else 1e-7
    found = _gradients(getattr(spline, direction)(*inputs), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        _assert_close(ours, theirs, tolerance)


@directions
@pytest.mark.parametrize("tails", [True, False], ids=["tails", "unit interval"])
@pytest.mark.parametrize("bins", [2, 3, 8, 32])
def test_the_closed_form_is_exact(direction: str, tails: bool, bins: int) -> None:
    """With ``create_graph`` the gradient is that of automatic differentiation."""
    spline = RationalQuadraticSpline(bins, tails=tails)
    inputs = _inputs(spline, 300)
    evaluate = getattr(spline, direction)
    closed_form = _gradients(evaluate(*inputs), inputs)
    differentiated = _gradients(evaluate(*inputs), inputs, create_graph=True)
    for ours, theirs in zip(closed_form, differentiated, strict=True):
        assert not ours.requires_grad
        assert theirs.requires_grad
        _assert_close(ours, theirs, 1e-12)


@directions
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 1e30], ids="scale {:g}".format)
def test_the_closed_form_in_single_precision(direction: str, scale: float) -> None:
    """As exact as automatic differentiation is, whose error is the yardstick."""
    spline = RationalQuadraticSpline(8)
    exact_inputs = _inputs(spline, 2000, scale=scale)
    inputs = tuple(each.detach().float().requires_grad_() for each in exact_inputs)
    exact_inputs = tuple(each.detach().double().requires_grad_() for each in inputs)
    evaluate = getattr(spline, direction)
    closed_form = _gradients(evaluate(*inputs), inputs)
    differentiated = _gradients(evaluate(*inputs), inputs, create_graph=True)
    exact = _gradients(evaluate(*exact_inputs), exact_inputs)
    for ours, theirs, truth in zip(closed_form, differentiated, exact, strict=True):
        assert ours.isfinite().all()
        scales = 1.0 + truth.abs()
        error, yardstick = ((each - truth).abs() / scales for each in (ours, theirs))
        assert error.quantile(0.99) <= 2.0 * yardstick.quantile(0.99) + 1e-6


@families
@directions
def test_derivatives_of_every_order_and_mode(
    family: Callable[..., Spline], direction: str
) -> None:
    spline = family(3)
    inputs = _inputs(spline, 4)
    evaluate = getattr(spline, direction)
    assert gradcheck(evaluate, inputs, check_forward_ad=True)
    assert gradgradcheck(evaluate, inputs)


@families
@directions
def test_batches_of_gradients(family: Callable[..., Spline], direction: str) -> None:
    """As ``torch.autograd.functional.jacobian(vectorize=True)`` takes them."""
    spline = family(3)
    x, parameters = _inputs(spline, 6)
    value, _ = getattr(spline, direction)(x, parameters)
    (batch,) = torch.autograd.grad(value, parameters, torch.eye(6), True, is_grads_batched=True)
    (summed,) = torch.autograd.grad(value.sum(), parameters)
    torch.testing.assert_close(batch.sum(0), summed)


@families
@directions
@pytest.mark.parametrize("which", [0, 1], ids=["to x", "to parameters"])
def test_gradients_to_one_input_alone(
    family: Callable[..., Spline], direction: str, which: int
) -> None:
    spline = family(4)
    inputs = _inputs(spline, 20)
    evaluate = getattr(spline, direction)
    expected = _gradients(evaluate(*inputs), inputs)[which]
    alone = [each.detach() for each in inputs]
    alone[which].requires_grad_()
    (found,) = _gradients(evaluate(*alone), (alone[which],))  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@families
@directions
@pytest.mark.parametrize("result", [0, 1], ids=["value", "log slope"])
def test_gradients_of_one_result_alone(
    family: Callable[..., Spline], direction: str, result: int
) -> None:
    spline = family(4)
    inputs = _inputs(spline, 20)
    found = torch.autograd.grad(getattr(spline, direction)(*inputs)[result].sum(), inputs)
    expected = torch.autograd.grad(
        REFERENCES[direction](spline, *inputs)[result].sum(), inputs, materialize_grads=True
    )
    for ours, theirs in zip(found, expected, strict=True):
        _assert_close(ours, theirs, 1e-10)


@families
@directions
@pytest.mark.parametrize("shared", [(), (3,), (1,), (4, 1)], ids=str)
def test_shared_parameters(
    family: Callable[..., Spline], direction: str, shared: tuple[int, ...]
) -> None:
    """One set of parameters for many inputs: the gradient is the sum over these."""
    spline = family(4)
    x, _ = _inputs(spline, 5, 4, 3)
    _, parameters = _inputs(spline, *shared)
    evaluate = getattr(spline, direction)
    found = _gradients(evaluate(x, parameters), (x, parameters))
    expanded = parameters.expand(5, 4, 3, -1)
    expected = _gradients(evaluate(x, expanded), (x, parameters))
    assert found[1].shape == parameters.shape
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@families
@directions
# of batches of batches, which vmap lays out its own way
@pytest.mark.filterwarnings(r"ignore:torch.searchsorted\(\).*non-contiguous:UserWarning")
def test_transforms_of_torch_func(family: Callable[..., Spline], direction: str) -> None:
    spline = family(3)
    x, parameters = (each.detach() for each in _inputs(spline, 6))
    evaluate, reference = getattr(spline, direction), partial(REFERENCES[direction], spline)

    def total(function: Callable[..., Any], at: Tensor, p: Tensor) -> Tensor:
        value, log_slope = function(at, p)
        return (value.square() + log_slope).sum()

    for derivative in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        for which in (0, 1):
            ours, theirs = (
                derivative(partial(total, f), argnums=which)(x, parameters)
                for f in (evaluate, reference)
            )
            _assert_close(ours, theirs, 1e-9)
    each_alone = torch.vmap(evaluate)(x, parameters)
    grads = torch.vmap(torch.func.grad(partial(total, evaluate), argnums=1))(x, parameters)
    for i in range(6):
        for all_at_once, alone in zip(each_alone, evaluate(x[i], parameters[i]), strict=True):
            torch.testing.assert_close(all_at_once[i], alone, rtol=1e-12, atol=1e-12)
        grad = torch.func.grad(partial(total, evaluate), argnums=1)(x[i], parameters[i])
        torch.testing.assert_close(grads[i], grad, rtol=1e-12, atol=1e-12)
    # one set of parameters for a batch, and the other way round
    for dims, arguments in {(0, None): (x, parameters[0]), (None, 0): (x[0], parameters)}.items():
        values, _ = torch.vmap(evaluate, in_dims=dims)(*arguments)
        expanded = evaluate(arguments[0].expand(6), arguments[1].expand(6, spline.num_parameters))
        torch.testing.assert_close(values, expanded[0], rtol=1e-12, atol=1e-12)


@families
def test_the_gradient_lets_lost_parameters_return(family: Callable[..., Spline]) -> None:
    """However large parameters are, the gradient falls no faster than their inverse square."""
    spline = family(4)
    x, _ = _inputs(spline, 200)
    x = x.detach().clamp(*interval(spline)) * 0.9
    sizes = []
    for scale in (1e2, 1e4):
        parameters = (scale * torch.randn(200, spline.num_parameters)).requires_grad_()
        value, _ = spline.forward(x, parameters)
        (gradient,) = torch.autograd.grad(value.sum(), parameters)
        sizes.append(gradient.abs().mean())
    assert sizes[1] > 0.1 * sizes[0] * 1e-4
