"""Increasing functions of one variable whose parameters a network may predict."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

__all__ = ["ElementwiseMap"]


class ElementwiseMap(ABC):
    """
    A family of increasing functions of one variable, applied to every element of a tensor.

    The object holds the settings of the family (bins, bound); what a member of it is comes as a
    tensor of unconstrained parameters with every call. Any real parameters are valid, and zeros
    give the identity, so that a network whose last layer is small starts near it.
    """

    num_parameters: int
    """Unconstrained numbers that describe one function."""

    @abstractmethod
    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """
        Evaluate the function and the logarithm of its slope.

        :param Tensor x: any shape.
        :param Tensor parameters: shape ``x.shape + (num_parameters,)``, or broadcastable to it.
        :returns: the values and the log slopes at ``x``, both of the shape of ``x``.
        """

    @abstractmethod
    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """
        Evaluate the inverse function and the logarithm of its slope.

        :param Tensor y: any shape.
        :param Tensor parameters: shape ``y.shape + (num_parameters,)``, or broadcastable to it.
        :returns: the values and the log slopes at ``y``, both of the shape of ``y``.
        """
