"""A function of tensors as the list of operations that it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.func import functionalize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["Operation", "Program", "RecordingError", "Reference", "graph_module", "trace"]

aten = torch.ops.aten

# return what they are given, once nothing writes into tensors any more
_IDENTITIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
}
# read the shape of a tensor only
_SHAPE_ONLY = {
    aten.empty_like.default,
    aten.fill.Scalar,
    aten.full_like.default,
    aten.new_empty.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.ones_like.default,
    aten.zero.default,
    aten.zeros_like.default,
}
# what writing in place becomes has no derivative of its own; in terms of what has one
_WRITES: dict[Any, Callable[..., Tensor]] = {
    aten.copy.default: lambda target, source, *_: source.to(target).expand(target.shape),
    aten.fill.Tensor: lambda target, source: source.to(target).expand(target.shape),
}
# what composite operations do to the shape of their own results (a vector times a matrix, as in a
# linear layer, ends with the first), beyond the reach of functionalize
_VIEWS_IN_PLACE = {
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.unsqueeze_.default: aten.unsqueeze.default,
}
# what was a view at the example need not be one under another transform
_LAYOUT_FREE = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}


class RecordingError(ValueError):
    """The function is not a fixed sequence of tensor operations, so it cannot be recorded."""


class Reference(NamedTuple):
    """Stands for a tensor among the arguments of an operation."""

    number: int


class Operation(NamedTuple):
    """One call of an operation of torch."""

    target: OpOverload
    leaves: tuple[Any, ...]
    """Arguments, flattened; a tensor is a :class:`Reference`."""

    structure: TreeSpec
    """Of the positional and the keyword arguments."""

    results: tuple[int | None, ...]
    """Numbers of the tensors that it returns."""

    returns_one: bool
    """Whether it returns a tensor rather than a sequence."""

    def call(self, leaves: Sequence[Any]) -> Any:
        """Run the operation on other arguments."""
        args, kwargs = tree_unflatten(list(leaves), self.structure)
        return self.target(*args, **kwargs)

    def results_of(self, result: Any) -> Sequence[Any]:
        """What a call returned, as a sequence."""
        return (result,) if self.returns_one else result or ()

    def inputs(self) -> list[int]:
        """Numbers of the tensors among the arguments."""
        return [leaf.number for leaf in self.leaves if isinstance(leaf, Reference)]


class Program(NamedTuple):
    """Operations in the order in which they run. Tensors have numbers, inputs the first ones."""

    num_inputs: int
    operations: list[Operation]
    outputs: list[int]
    values: dict[int, Tensor]
    """Every tensor, at the examples."""

    def constants(self) -> dict[int, Tensor]:
        """The tensors that do not depend on the inputs."""
        computed = {number for op in self.operations for number in op.results}
        computed.update(range(self.num_inputs))
        return {number: v for number, v in self.values.items() if number not in computed}


def trace(function: Callable[..., Any], *examples: Tensor) -> tuple[Program, TreeSpec]:
    """
    Run a function at an example and note the operations that depend on its inputs.

    :param function: maps tensors to a tensor or a nest of tensors.
    :param Tensor examples: an input each.
    :returns: the program and the structure of the function's result.
    :raises RecordingError: if other inputs could take other operations than these.
    """
    tracer = _Tracer(examples)
    try:
        with torch.enable_grad(), _NoConversion(tracer), tracer:
            result = functionalize(function)(*examples)
    except RecordingError:
        raise
    except Exception as error:
        raise RecordingError(
            f"The function cannot be recorded: {type(error).__name__}: {error}"
        ) from error
    if tracer.refusal is not None:  # the function caught the error
        raise RecordingError(tracer.refusal)
    outputs, structure = tree_flatten(result)
    for output in outputs:
        if not isinstance(output, Tensor):
            raise RecordingError(
                f"The function returns a {type(output).__name__} beside tensors; a recorded "
                "function can return tensors only."
            )
    numbers = [tracer.number(output) for output in outputs]
    program = Program(len(examples), tracer.operations, numbers, tracer.values)
    return _without_repetitions(tracer.checked(_needed(program))), structure


class _Tracer(TorchDispatchMode):
    """Notes the operations that run on tensors which depend on the input."""

    def __init__(self, examples: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.values: dict[int, Tensor] = dict(enumerate(examples))
        self.refusal: str | None = None
        self._numbers = {id(example): i for i, example in enumerate(examples)}
        self._num_inputs = len(examples)
        self._kept = [*examples]  # a number belongs to an id as long as its tensor lives
        self._dependent = {*self.values}
        self._refused: dict[int, str] = {}  # results that must not be needed

    def number(self, tensor: Tensor) -> int:
        """Number of a tensor; one that is not known yet does not depend on the input."""
        if id(tensor) not in self._numbers:
            self._name(tensor, len(self.values))
        return self._numbers[id(tensor)]

    def checked(self, program: Program) -> Program:
        """Refuse a program that needs results which cannot be recorded."""
        for operation in program.operations:
            for result in operation.results:
                if result in self._refused:
                    raise RecordingError(self._refused[result])
        return program

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, structure = tree_flatten((args, kwargs))
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if not is_random and not self._depends(func, leaves):
            return func(*args, **kwargs)
        if func in _WRITES:
            with self:
                return _WRITES[func](*args, **kwargs)
        if torch.Tag.data_dependent_output in func.tags:
            self.refuse(
                f"The function turns a tensor that depends on its input into a number ({func}), "
                "as a Python branch on it or .item() does. Use torch.where for a branch."
            )
        if torch.Tag.dynamic_output_shape in func.tags and self._has_varying_shape(func, leaves):
            self.refuse(
                "The function makes a tensor whose shape depends on the values of its input "
                f"({func}), as indexing with a mask does. Use torch.where."
            )
        if func in _VIEWS_IN_PLACE and self._numbers[id(leaves[0])] >= self._num_inputs:
            return self._reshape(func, leaves, structure)
        if func._schema.is_mutable:
            self.refuse(
                f"The function writes into its input or into a tensor from outside ({func})."
            )
        result = func(*args, **kwargs)
        if func in _IDENTITIES:
            self._name(result, self._numbers[id(leaves[0])])
        else:
            self._note(func, leaves, structure, result, is_random)
        return result

    def _depends(self, func: Any, leaves: list[Any]) -> bool:
        numbers = (self._numbers.get(id(x)) for x in leaves if isinstance(x, Tensor))
        return func not in _SHAPE_ONLY and any(number in self._dependent for number in numbers)

    def _has_varying_shape(self, func: Any, leaves: list[Any]) -> bool:
        """Whether values of the input decide on the shape of the result."""
        if func is not aten.index.Tensor:
            return True
        tensors = [x for x in leaves[1:] if isinstance(x, Tensor)]
        masks = [x for x in tensors if x.dtype in (torch.bool, torch.uint8)]
        return any(self._numbers.get(id(mask)) in self._dependent for mask in masks)

    def _note(
        self, func: Any, leaves: list[Any], structure: TreeSpec, result: Any, is_random: bool
    ) -> None:
        references = tuple(
            Reference(self.number(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        )
        returns_one = isinstance(result, Tensor)
        if not (returns_one or result is None or isinstance(result, (tuple, list))):
            return  # a fact about shapes
        target = _LAYOUT_FREE.get(func, func)
        operation = Operation(target, references, structure, (), returns_one)
        results: list[int | None] = []
        for tensor in operation.results_of(result):
            if not isinstance(tensor, Tensor):
                results.append(None)
                continue
            number = len(self.values)
            self._name(tensor, number)
            self._dependent.add(number)
            results.append(number)
            if is_random:
                self._refused[number] = f"The function draws random numbers ({func})."
            elif not torch.is_grad_enabled() and tensor.is_floating_point():
                self._refused[number] = (
                    f"The function computes with torch.no_grad() ({func}), so that its "
                    "derivative is not that of its operations. Use .detach() instead."
                )
        self.operations.append(operation._replace(results=tuple(results)))

    def _reshape(self, func: Any, leaves: list[Any], structure: TreeSpec) -> Any:
        """Reshape a tensor in place, and note it as a view: from here on the tensor is that."""
        tensor = leaves[0]
        self.values[self._numbers[id(tensor)]] = tensor.view(tensor.shape)
        operation = _VIEWS_IN_PLACE[func]
        args, kwargs = tree_unflatten(leaves, structure)
        self._note(operation, leaves, structure, func(*args, **kwargs), is_random=False)
        return tensor

    def _name(self, tensor: Tensor, number: int) -> None:
        self.values.setdefault(number, tensor)
        self._kept.append(tensor)
        self._numbers[id(tensor)] = number

    def refuse(self, why: str) -> None:
        """Stop, and remember why in case the function catches the error."""
        self.refusal = why
        raise RecordingError(why)


class _NoConversion(TorchFunctionMode):
    """Refuses conversions to NumPy, which would read memory that a traced tensor has not got."""

    _CONVERSIONS = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.data_ptr})

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._CONVERSIONS and torch._C._functorch.is_functionaltensor(args[0]):
            self._tracer.refuse(
                f"The function takes a tensor out of torch (Tensor.{func.__name__}), so that "
                "what becomes of it cannot be recorded."
            )
        return func(*args, **(kwargs or {}))


def _needed(program: Program) -> Program:
    """Leave out the operations that no output needs."""
    needed = {*program.outputs, *range(program.num_inputs)}
    kept: set[int] = set()
    for i, operation in reversed([*enumerate(program.operations)]):
        if needed.intersection(operation.results):
            needed.update(operation.inputs())
            needed.update(number for number in operation.results if number is not None)
            kept.add(i)
    # what only checks its arguments is needed where these are computed anyway
    for i, operation in enumerate(program.operations):
        if not operation.results and needed.issuperset(operation.inputs()):
            kept.add(i)
    values = {number: value for number, value in program.values.items() if number in needed}
    operations = [program.operations[i] for i in sorted(kept)]
    return program._replace(operations=operations, values=values)


def _without_repetitions(program: Program) -> Program:
    """Run an operation once where it is run again on the same arguments."""
    same: dict[int, int] = {}
    seen: dict[Any, tuple[int | None, ...]] = {}
    operations = []
    for operation in program.operations:
        leaves = tuple(
            Reference(same.get(leaf.number, leaf.number)) if isinstance(leaf, Reference) else leaf
            for leaf in operation.leaves
        )
        key = (operation.target, str(operation.structure), *map(repr, leaves))
        earlier = seen.setdefault(key, operation.results)
        if earlier is operation.results:
            operations.append(operation._replace(leaves=leaves))
        for number, other in zip(operation.results, earlier, strict=True):
            if number is not None and other is not None:
                same[number] = other
    outputs = [same.get(number, number) for number in program.outputs]
    return _needed(program._replace(operations=operations, outputs=outputs))


def graph_module(program: Program) -> fx.GraphModule:
    """
    The program as generated Python code.

    :param Program program: the operations.
    :returns: a module that maps the inputs to the tuple of outputs.
    """
    root = torch.nn.Module()
    graph = fx.Graph()
    nodes: dict[int, Any] = {i: graph.placeholder(f"input_{i}") for i in range(program.num_inputs)}
    for number, value in program.constants().items():
        name = f"constant_{number}"
        root.register_buffer(name, value.detach())
        nodes[number] = graph.get_attr(name)
    used = {*program.outputs, *(n for op in program.operations for n in op.inputs())}
    for operation in program.operations:
        leaves = [nodes[x.number] if isinstance(x, Reference) else x for x in operation.leaves]
        args, kwargs = tree_unflatten(leaves, operation.structure)
        node = graph.call_function(operation.target, args, kwargs)
        for i, result in enumerate(operation.results):
            if result is not None and result in used:
                part = node if operation.returns_one else graph.call_function(getitem, (node, i))
                nodes[result] = part
    graph.output(tuple(nodes[number] for number in program.outputs))
    return fx.GraphModule(root, graph)
