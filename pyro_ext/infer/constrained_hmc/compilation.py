"""Record a batched function as one graph and compile it to native code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from .structure import DenseJacobian
from .system import ConstrainedSystem, Point

__all__ = ["CompiledSystem"]

BatchedFunction = Callable[[Tensor, Tensor], Any]


class CompiledSystem:
    """
    A constrained system whose functions run as native code for one number of chains.

    Recording sees through Pyro's handlers, ``vmap`` and differentiation, so that only tensor
    operations are left; other batch sizes run uncompiled. A function is compiled when it is first
    called.

    :param system: the system to compile.
    :param int num_chains: the batch size to compile for.
    """

    def __init__(self, system: ConstrainedSystem, num_chains: int) -> None:
        self.is_vectorized = system.is_vectorized
        self._system = system
        self._num_chains = num_chains
        self._compiled: dict[str, BatchedFunction] = {}

    def constraint(self, position: Tensor, scale: Tensor) -> Tensor:
        """See :meth:`ConstrainedSystem.constraint`."""
        value: Tensor = self._call("constraint", position, scale)
        return value

    def jacobian_matrix(self, position: Tensor, scale: Tensor) -> Tensor:
        """See :meth:`ConstrainedSystem.jacobian_matrix`."""
        value: Tensor = self._call("jacobian_matrix", position, scale)
        return value

    def jacobian(self, position: Tensor, scale: Tensor) -> DenseJacobian:
        """See :meth:`ConstrainedSystem.jacobian`."""
        value: DenseJacobian = self._call("jacobian", position, scale)
        return value

    def point(self, position: Tensor, scale: Tensor) -> Point:
        """See :meth:`ConstrainedSystem.point`."""
        value: Point = self._call("point", position, scale)
        return value

    def _call(self, name: str, position: Tensor, scale: Tensor) -> Any:
        function = getattr(self._system, name)
        if len(position) != self._num_chains:
            return function(position, scale)
        if name not in self._compiled:
            self._compiled[name] = _compile(function, position, scale)
        return self._compiled[name](position, scale)


def _compile(function: BatchedFunction, position: Tensor, scale: Tensor) -> BatchedFunction:
    spec = tree_flatten(function(position, scale))[1]

    def flat(position: Tensor, scale: Tensor) -> list[Tensor]:
        return tree_flatten(function(position, scale))[0]

    graph = make_fx(flat)(position, scale)
    compiled = torch.compile(graph, dynamic=False)
    with _validation_kept():
        compiled(position, scale)

    def call(position: Tensor, scale: Tensor) -> Any:
        return tree_unflatten(list(compiled(position, scale)), spec)

    return call


@contextmanager
def _validation_kept() -> Iterator[None]:
    """``torch.compile`` switches the validation of distributions off; switch it back."""
    is_enabled = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(is_enabled)
