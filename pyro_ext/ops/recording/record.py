"""Record functions of tensors, to run them without their Python code and in few operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map, tree_unflatten

from .batching import BatchedProgram
from .picks import joint_picks
from .program import Program, RecordingError, graph_module, trace

__all__ = ["RecordedFunction", "flatten", "record"]

_NEARBY = 0.03  # relative distance of the second input at which a recording is checked


class RecordedFunction:
    """
    A function of tensors as a fixed sequence of tensor operations.

    It can be differentiated in every way, batched with :func:`torch.func.vmap`, traced, compiled
    and pickled like any other function of tensors.

    :param module: the operations; returns a tuple of tensors. It may be compiled.
    :param template: what the function returns, with the position of a tensor in its place.
    :param int num_recorded: operations that the function ran when it was recorded.
    :param int num_operations: operations that are left.
    """

    def __init__(
        self,
        module: Callable[..., tuple[Tensor, ...]],
        template: Any,
        num_recorded: int,
        num_operations: int,
    ) -> None:
        self.module = module
        self.template = template
        self.num_recorded = num_recorded
        self.num_operations = num_operations

    def __call__(self, *inputs: Tensor) -> Any:
        """
        Run the operations.

        :param Tensor inputs: of the shapes and dtypes of the examples.
        :returns: what the recorded function returned.
        """
        outputs = self.module(*inputs)
        return tree_map(outputs.__getitem__, self.template)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_operations} operations, "
            f"recorded from {self.num_recorded})"
        )


def record(
    function: Callable[[Tensor], Any], example: Tensor, *, differentiable: bool = True
) -> RecordedFunction:
    r"""
    Record a function and run operations that are alike, and do not need each other, as one.

    A loop over time of which each step starts from data rather than from the step before it,

    .. math:: c_t = f(u_t, y_{t-1}) - y_t, \qquad t = 1, \dots, T,

    becomes the operations of one step, each on all :math:`T` steps. What does not depend on the
    input is computed here, once; views, ``cat``, ``stack`` and writing into slices are resolved
    here and cost little later. A loop that is truly sequential stays one.

    All that the function reads from elsewhere is a constant at the value that it has now.

    :param function: maps one tensor to a tensor or a nest of tensors. It must run the same
        operations for every input.
    :param Tensor example: a typical input, of floating point. No element should be zero: the
        check moves each by a few percent of its size.
    :param bool differentiable: whether to check the derivative; false if none will be taken.
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
    RecordedFunction(2 operations, recorded from 301)
    """
    program, structure = trace(function, _checked(example))
    programs = [joint_picks(program)]
    batched = BatchedProgram(program)
    programs.append(joint_picks(trace(batched, example)[0]))
    if batched.has_groups and 2 * len(programs[1].operations) > len(program.operations):
        alone = BatchedProgram(program, fewest=len(program.operations) + 1)
        programs.append(joint_picks(trace(alone, example)[0]))
    shortest = min(programs, key=lambda p: len(p.operations))
    recorded = _recorded(shortest, structure, len(program.operations))
    both = torch.stack([example.detach(), _nearby(example)])
    _compare(vmap(recorded), lambda x: _stacked([function(row) for row in x]), both)
    if differentiable:
        _compare(_derivative(recorded), _derivative(function), example.detach())
    return recorded


def flatten(function: Callable[..., Any], *examples: Tensor) -> RecordedFunction:
    """
    Record a function as it is, with all that happens inside it spelled out.

    What ``vmap`` and the transforms of :mod:`torch.func` do in each call, working out which
    operations to run, is done here, once: for small tensors that is most of the time. The result
    is for the shapes of the examples. Compiling its ``module`` takes no further tracing.

    :param function: maps tensors to a tensor or a nest of tensors. It must run the same
        operations for all inputs of these shapes.
    :param Tensor examples: typical inputs, of floating point.
    :returns: the recorded function. It is meant to be run: its own derivative is not checked.
    :raises RecordingError: as :func:`record` does, except for what concerns the derivative.
    :raises ValueError: if an example is not of floating point.

    >>> jacobian = torch.func.vmap(torch.func.jacrev(torch.sin))
    >>> flat = flatten(jacobian, torch.randn(5, 3))
    >>> flat(torch.zeros(5, 3)).shape
    torch.Size([5, 3, 3])
    """
    program, structure = trace(function, *map(_checked, examples))
    recorded = _recorded(joint_picks(program), structure, len(program.operations))
    for inputs in ([x.detach() for x in examples], [_nearby(x) for x in examples]):
        _compare(recorded, function, *inputs)
    return recorded


def _recorded(program: Program, structure: TreeSpec, num_recorded: int) -> RecordedFunction:
    module = graph_module(program)
    template = tree_unflatten(list(range(structure.num_leaves)), structure)
    return RecordedFunction(module, template, num_recorded, len(program.operations))


def _checked(example: Tensor) -> Tensor:
    if not example.is_floating_point():
        raise ValueError(f"Examples must be of floating point; one has dtype {example.dtype}.")
    return example.detach()


def _nearby(example: Tensor) -> Tensor:
    generator = torch.Generator(example.device).manual_seed(0)
    noise = torch.randn(
        example.shape, generator=generator, dtype=example.dtype, device=example.device
    )
    return example.detach() * (1 + _NEARBY * noise)


def _stacked(rows: list[Any]) -> list[Tensor]:
    return [torch.stack(column) for column in zip(*map(tree_leaves, rows), strict=True)]


def _derivative(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """Derivative of a weighted sum of all outputs of floating point."""

    def weighted_sum(x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for output in tree_leaves(function(x)):
            if output.is_floating_point():
                weights = torch.linspace(1.0, 2.0, output.numel(), device=output.device)
                total = total + (weights.to(output).reshape(output.shape) * output).sum()
        return total

    return grad(weighted_sum)


def _compare(recorded: Callable[..., Any], function: Callable[..., Any], *inputs: Tensor) -> None:
    """Run both, and refuse a recording that gives something else."""
    try:
        actual, expected = tree_leaves(recorded(*inputs)), tree_leaves(function(*inputs))
    except Exception as error:
        raise RecordingError(
            f"The recorded function cannot be checked: {type(error).__name__}: {error}"
        ) from error
    for value, reference in zip(actual, expected, strict=True):
        if not _is_close(value.detach(), reference.detach()):
            raise RecordingError(
                "The recorded function gives other values, or derivatives, than the function "
                "itself, which must run the same operations every time, depend on nothing that "
                "changes and be differentiated by their rules."
            )


def _is_close(value: Tensor, reference: Tensor) -> bool:
    if value.dtype != reference.dtype or value.shape != reference.shape:
        return False
    if not reference.is_floating_point() or not reference.numel():
        return torch.equal(value, reference)
    tolerance = torch.finfo(reference.dtype).eps ** 0.5
    scale = float(reference.nan_to_num(0.0, 0.0, 0.0).abs().amax())
    return torch.allclose(value, reference, tolerance, tolerance * scale, equal_nan=True)
