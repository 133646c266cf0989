"""Layers of a flow as native code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops.compilation import validation_kept

__all__ = ["CompiledLayers", "can_compile"]


class CompiledLayers:
    """
    Calls layers as native code, the same code for all layers of a kind and size.

    A layer is compiled by :func:`torch.compile` when the first one of its kind is called, and
    again for another number of rows, or when gradients are needed and were not before.
    """

    def __init__(self) -> None:
        self._functions: dict[Any, Callable[..., tuple[Tensor, Tensor]]] = {}

    def call(
        self, layer: Any, direction: str, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """
        Call a method of a layer.

        :param layer: the layer.
        :param str direction: name of the method.
        :param Tensor x: its first argument.
        :param Tensor context: its second argument.
        """
        function = getattr(type(layer), direction)
        return self._run((type(layer), direction), function, layer, x, context)

    def pair_to_noise(
        self, first: Any, second: Any, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """
        Call ``to_noise`` of two layers, one after the other.

        :param first: the layer next to the data.
        :param second: the one after it.
        :param Tensor x: data.
        :param Tensor context: what both depend on.
        """
        kind = (type(first), type(second))
        return self._run(kind, _pair_to_noise, first, second, x, context)

    def _run(
        self, kind: Any, function: Callable[..., tuple[Tensor, Tensor]], *args: Any
    ) -> tuple[Tensor, Tensor]:
        with validation_kept():
            if kind not in self._functions:
                self._functions[kind] = torch.compile(function)
            return self._functions[kind](*args)

    def __reduce__(self) -> tuple[type[CompiledLayers], tuple[()]]:
        """Copies and pickles compile for themselves."""
        return CompiledLayers, ()


def _pair_to_noise(
    first: Any, second: Any, x: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, log_det = first.to_noise(x, context)
    z, log_det_of_second = second.to_noise(x, context)
    return z, log_det + log_det_of_second


def can_compile() -> bool:
    """Whether the compiler may be called here: not from code that it or a transform traces."""
    # torch has no public name for the second question
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
