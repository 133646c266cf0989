"""What tests of flow layers share: layers that are not at their start, and full Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["full_log_det", "randomize"]

Module = TypeVar("Module", bound=nn.Module)


def randomize(module: Module, scale: float = 0.3) -> Module:
    """Move every parameter away from where it starts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def full_log_det(function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """
    Logarithm of the determinant of the Jacobian, by automatic differentiation.

    :param function: from vectors to vectors and something else.
    :param Tensor x: shape ``(..., features)``.
    :returns: shape ``(...)``.
    """
    flat = x.reshape(-1, x.shape[-1])
    jacobian = torch.stack([torch.func.jacrev(lambda v: function(v)[0])(row) for row in flat])
    return torch.linalg.slogdet(jacobian)[1].reshape(x.shape[:-1])
