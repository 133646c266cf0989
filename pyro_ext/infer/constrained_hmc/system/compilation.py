"""Record the functions of a system for one number of chains, and compile them to native code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

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

    def _call(self, name: str, *arguments: Tensor) -> Any:
        function = getattr(self._system, name)
        if len(arguments[0]) != self._num_chains:
            return function(*arguments)
        if name not in self._recorded:
            # products are for checks, too few to be worth the compiler's time
            is_compiled = self._is_compiled and name != "product"
            self._recorded[name] = _record(function, arguments, compile=is_compiled)
        return self._recorded[name](*arguments)


def _record(
    function: BatchedFunction, examples: tuple[Tensor, ...], *, compile: bool
) -> BatchedFunction:
    leaves, spec = tree_flatten(function(*examples))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def tensors(*arguments: Tensor) -> list[Tensor]:
        parts = tree_flatten(function(*arguments))[0]
        return [parts[i] for i in places]

    run: Callable[..., list[Tensor]] = tensors
    try:
        run = flatten(tensors, *examples)
    except RecordingError:
        run = make_fx(tensors)(*examples) if compile else tensors
    if compile:
        with validation_kept():
            run = torch.compile(run, dynamic=False)
            run(*examples)

    def call(*arguments: Tensor) -> Any:
        results = list(leaves)  # what is no tensor is the same at every position
        for place, value in zip(places, run(*arguments), strict=True):
            results[place] = value
        return tree_unflatten(results, spec)

    return call
