"""Forward-mode derivatives in the precision of the input.

The tangent of a scalar times a Python number is float64 in PyTorch (2.13), whatever the scalar is.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.func import jacfwd, jvp

__all__ = ["forward_jacobian", "forward_product"]


def forward_product(constraint: Callable[[Tensor], Tensor], u: Tensor, vector: Tensor) -> Tensor:
    """:math:`Jv` at one input, shape ``(num_constraints,)``."""
    product: Tensor = jvp(constraint, (u,), (vector,))[1]
    return product.to(u.dtype)


def forward_jacobian(constraint: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function from one input to the Jacobian there, ``(num_constraints, dim)``."""
    jacobian = jacfwd(constraint)

    def converted(u: Tensor) -> Tensor:
        matrix: Tensor = jacobian(u)
        return matrix.to(u.dtype)

    return converted
