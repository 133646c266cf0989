"""Record a function of one tensor once, to run what it repeats as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import vjp, vmap
from torch.utils._pytree import tree_leaves

from .batching import batched
from .picks import joint_picks
from .program import Program, RecordingError, graph_module, trace

__all__ = ["RecordedFunction", "RecordingError", "record"]

_NEARBY = 0.03  # relative distance of the second input at which a recording is checked


class RecordedFunction:
    """
    A function of one tensor as a fixed sequence of tensor operations.

    It can be differentiated in every way, batched with :func:`torch.func.vmap`, traced, compiled
    and pickled like any other function of tensors.

    :param fx.GraphModule module: the operations.
    :param int num_recorded: operations that the function ran when it was recorded.
    :param int num_operations: operations that are left.
    """

    def __init__(self, module: fx.GraphModule, num_recorded: int, num_operations: int) -> None:
        self.module = module
        self.num_recorded = num_recorded
        self.num_operations = num_operations

    def __call__(self, x: Tensor) -> Any:
        """
        Run the operations.

        :param Tensor x: an input with the shape and dtype of the example.
        :returns: what the recorded function returned.
        """
        return self.module.forward(x)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_operations} operations, "
            f"recorded from {self.num_recorded})"
        )


def record(function: Callable[[Tensor], Any], example: Tensor) -> RecordedFunction:
    r"""
    Record a function and run operations that are alike, and do not need each other, as one.

    A loop over time of which each step starts from data rather than from the step before it,

    .. math:: c_t = f(u_t, y_{t-1}) - y_t, \qquad t = 1, \dots, T,

    becomes the operations of one step, each on all :math:`T` steps. What does not depend on the
    input is computed here, once; views, ``cat``, ``stack`` and writing into slices are resolved
    here and cost nothing later. A loop that is truly sequential stays one.

    All that the function reads from elsewhere is a constant at the value that it has now.

    :param function: maps one tensor to a tensor or a nest of tensors. It must run the same
        operations for every input.
    :param Tensor example: a typical input, of floating point. No element should be zero: the
        check moves it by a few percent of its size.
    :returns: the recorded function.
    :raises RecordingError: if the function draws random numbers, turns a tensor that depends on
        the input into a number (a Python branch, ``.item()``, NumPy), writes into its input, has
        derivatives of its own (:class:`torch.autograd.Function`) or blocks them with
        ``torch.no_grad``; or if the recorded function fails the check that it gives the
        function's values at the example and at an input nearby, under ``vmap``, and its
        derivative at the example.
    :raises ValueError: if the example is not of floating point.

    >>> def steps(u):
    ...     return torch.stack([(u[t] * (0.1 * t)).exp() for t in range(100)])
    >>> record(steps, torch.randn(100))
    RecordedFunction(2 operations, recorded from 300)
    """
    if not example.is_floating_point():
        raise ValueError(f"The example must be of floating point; its dtype is {example.dtype}.")
    example = example.detach()
    program, structure = trace(function, example)
    shortest = min(_shortened(program, example), key=lambda p: len(p.operations))
    module = graph_module(shortest, structure)
    recorded = RecordedFunction(module, len(program.operations), len(shortest.operations))
    _check(recorded, function, example)
    return recorded


def _shortened(program: Program, example: Tensor) -> list[Program]:
    """The program in groups and, where groups save little, without."""
    programs = [joint_picks(program), _regrouped(program, example)]
    if 2 * len(programs[1].operations) > len(program.operations):
        programs.append(_regrouped(program, example, fewest=len(program.operations) + 1))
    return programs


def _regrouped(program: Program, example: Tensor, **settings: int) -> Program:
    return joint_picks(trace(batched(program, **settings), example)[0])


def _check(recorded: RecordedFunction, function: Callable[[Tensor], Any], example: Tensor) -> None:
    """Compare values at two inputs and the derivative at one."""
    generator = torch.Generator(example.device).manual_seed(0)
    noise = torch.randn(
        example.shape, generator=generator, dtype=example.dtype, device=example.device
    )
    inputs = torch.stack([example, example * (1 + _NEARBY * noise)])
    try:
        rows = [tree_leaves(function(x)) for x in inputs]
        expected = [torch.stack(column).detach() for column in zip(*rows, strict=True)]
        actual = tree_leaves(vmap(recorded)(inputs))
        gradients = [_gradient(f, example, expected) for f in (recorded, function)]
    except Exception as error:
        raise RecordingError(
            f"The recorded function cannot be checked: {type(error).__name__}: {error}"
        ) from error
    for i, (value, reference) in enumerate(zip(actual, expected, strict=True)):
        _compare(value, reference, f"output {i}")
    _compare(gradients[0], gradients[1], "the derivative")


def _gradient(function: Callable[[Tensor], Any], x: Tensor, outputs: list[Tensor]) -> Tensor:
    """Derivative of a weighted sum of all outputs of floating point."""

    def floating(x: Tensor) -> list[Tensor]:
        return [out for out in tree_leaves(function(x)) if out.is_floating_point()]

    weights = [
        torch.linspace(1.0, 2.0, out[0].numel(), dtype=out.dtype, device=out.device).view_as(
            out[0]
        )
        for out in outputs
        if out.is_floating_point()
    ]
    if not weights:
        return torch.zeros_like(x)
    pullback: Callable[[list[Tensor]], tuple[Tensor]] = vjp(floating, x)[1]
    return pullback(weights)[0]


def _compare(value: Tensor, reference: Tensor, what: str) -> None:
    if value.dtype != reference.dtype or value.shape != reference.shape:
        raise RecordingError(
            f"The recorded function gives {what} as {value.dtype} of shape {tuple(value.shape)}, "
            f"the function itself as {reference.dtype} of shape {tuple(reference.shape)}."
        )
    if not reference.is_floating_point():
        is_close = torch.equal(value, reference)
    else:
        tolerance = torch.finfo(reference.dtype).eps ** 0.5
        size = reference.nan_to_num(0.0, 0.0, 0.0).abs().amax() if reference.numel() else 0.0
        is_close = torch.allclose(
            value, reference, rtol=tolerance, atol=float(tolerance * size), equal_nan=True
        )
    if not is_close:
        raise RecordingError(
            f"The recorded function differs from the function itself in {what}: the function "
            "does not run the same operations every time, or depends on what is not a tensor."
        )
