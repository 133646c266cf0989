"""Record the functions of a system for one number of chains, and compile them to native code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ....ops.compilation import validation_kept
from ....ops.recording import RecordingError, flatten
from ..jacobian.structure import Jacobian
from .constrained_system import ConstrainedSystem, Point

__all__ = ["RecordedSystem"]

BatchedFunction = Callable[..., Any]


class RecordedSystem:
    """
    A constrained system whose functions are lists of tensor operations for one number of chains.

    Recording sees through Pyro's handlers, ``vmap`` and differentiation, so that only tensor
    operations are left. Other batch sizes run as they are. A function is recorded when it is
    first called.

    :param system: the system to record.
    :param int num_chains: the batch size to record for.
    :param bool compile: also compile the operations to native code.
    """

    def __init__(self, system: ConstrainedSystem, num_chains: int, *, compile: bool) -> None:
        self.is_vectorized = system.is_vectorized
        self._system = system
        self._num_chains = num_chains
        self._is_compiled = compile
        self._recorded: dict[str, BatchedFunction] = {}

    def constraint(self, position: Tensor, scale: Tensor) -> Tensor:
        """See :meth:`ConstrainedSystem.constraint`."""
        value: Tensor = self._call("constraint", position, scale)
        return value

    def correction(
        self, position: Tensor, scale: Tensor, jacobian: Jacobian
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`ConstrainedSystem.correction`."""
        value: tuple[Tensor, Tensor] = self._call("correction", position, scale, jacobian)
        return value

    def slopes(self, position: Tensor, scale: Tensor) -> Any:
        """See :meth:`ConstrainedSystem.slopes`."""
        return self._call("slopes", position, scale)

    def jacobian(self, position: Tensor, scale: Tensor) -> Jacobian:
        """See :meth:`ConstrainedSystem.jacobian`."""
        value: Jacobian = self._call("jacobian", position, scale)
        return value

    def point(self, position: Tensor, scale: Tensor) -> Point:
        """See :meth:`ConstrainedSystem.point`."""
        value: Point = self._call("point", position, scale)
        return value

    def product(self, position: Tensor, vector: Tensor, scale: Tensor) -> Tensor:
        """See :meth:`ConstrainedSystem.product`."""
        value: Tensor = self._call("product", position, vector, scale)
        return value

    def _call(self, name: str, *arguments: Any) -> Any:
        function = getattr(self._system, name)
        if len(arguments[0]) != self._num_chains:
            return function(*arguments)
        if name not in self._recorded:
            # products are for checks, too few to be worth the compiler's time
            is_compiled = self._is_compiled and name != "product"
            self._recorded[name] = _record(function, arguments, compile=is_compiled)
        return self._recorded[name](*arguments)


def _record(
    function: BatchedFunction, arguments: tuple[Any, ...], *, compile: bool
) -> BatchedFunction:
    # what is no tensor is the same in every call
    leaves, taken = _Template.of(arguments)
    _, given = _Template.of(function(*arguments))

    def tensors(*inputs: Tensor) -> list[Tensor]:
        return _Template.of(function(*taken.filled(inputs)))[0]

    run: Callable[..., list[Tensor]] = tensors
    try:
        run = flatten(tensors, *leaves)
    except RecordingError:
        run = make_fx(tensors)(*leaves) if compile else tensors
    if compile:
        with validation_kept():
            run = torch.compile(run, dynamic=False)
            run(*leaves)

    def call(*arguments: Any) -> Any:
        return given.filled(run(*_tensors(arguments)))

    return call


class _Template(NamedTuple):
    """A nest with tensors taken out."""

    leaves: list[Any]
    places: list[int]
    spec: TreeSpec

    @staticmethod
    def of(nest: Any) -> tuple[list[Tensor], _Template]:
        """The tensors, and what is left."""
        leaves, spec = tree_flatten(nest)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        return [leaves[i] for i in places], _Template(leaves, places, spec)

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """The nest with other tensors."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.spec)


def _tensors(nest: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor)]
