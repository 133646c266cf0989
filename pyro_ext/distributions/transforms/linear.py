"""An invertible linear map, parameterised by its LU decomposition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bijection import Bijection
from .knots import working_dtype
from .permutation import Permutation, random_cycle

__all__ = ["LULinear"]


class LULinear(Bijection):
    r"""
    :math:`z = L U P x + b`, with a fixed permutation :math:`P` and a determinant for free.

    :math:`L` is lower triangular with a unit diagonal, :math:`U` upper triangular with a positive
    one, so that :math:`\log|\det| = \sum_i \log U_{ii}`. At the start :math:`L U` is the identity.

    In evaluation mode without gradients the inverse matrix is kept, and computed again when the
    parameters have other values.

    :param int features: number of features.
    :param Tensor permutation: indices, shape ``(features,)``; a random cycle by default, see
        :func:`~pyro_ext.distributions.transforms.random_cycle`.
    :raises ValueError: if the permutation is none.

    Reference: Oliva et al. 2018, "Transformation Autoregressive Networks"; Kingma and Dhariwal
    2018, "Glow"; Durkan et al. 2019, section 2.3.

    >>> layer = LULinear(3)
    >>> x = torch.randn(5, 3)
    >>> z, log_det = layer.to_noise(x)
    >>> torch.testing.assert_close(layer.to_data(z)[0], x)
    """

    is_compiled_with_next = True

    def __init__(self, features: int, permutation: Tensor | None = None) -> None:
        super().__init__()
        if permutation is None:
            permutation = random_cycle(features)
        self.permutation = Permutation(permutation)
        self.lower_and_upper = nn.Parameter(torch.zeros(features, features))
        self.log_diagonal = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self._kept_inverse: tuple[Tensor, Tensor, Tensor] | None = None

    def extra_repr(self) -> str:
        """Show the size when the module is printed."""
        return f"features={self.bias.numel()}"

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_noise`."""
        below, upper = self._factors()
        weight = torch.addmm(upper, below, upper)  # (I + below) upper
        # Permuting the columns of the matrix costs less than permuting the data.
        weight = weight.index_select(-1, self.permutation.inverse_permutation)
        return F.linear(x, weight, self.bias), self.log_diagonal.sum().expand(x.shape[:-1])

    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_data`."""
        x = F.linear(z - self.bias, self._inverse_matrix())
        return x, -self.log_diagonal.sum().expand(z.shape[:-1])

    def _factors(self) -> tuple[Tensor, Tensor]:
        """The lower factor without its unit diagonal, and the upper one."""
        diagonal = self.log_diagonal.exp()
        identity = torch.eye(len(diagonal), dtype=diagonal.dtype, device=diagonal.device)
        upper = torch.addcmul(self.lower_and_upper.triu(1), identity, diagonal)
        return self.lower_and_upper.tril(-1), upper

    def _inverse_matrix(self) -> Tensor:
        may_keep = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        parameters = (self.lower_and_upper, self.log_diagonal)
        # Functional transforms put other tensors in the place of parameters: nothing to keep.
        if not may_keep or not all(isinstance(p, nn.Parameter) for p in parameters):
            return self._compute_inverse()
        if self._kept_inverse is not None:
            # Compared by value: version counters do not see changes made through `.data`.
            *seen, inverse = self._kept_inverse
            if all(_are_same(a, b) for a, b in zip(parameters, seen, strict=True)):
                return inverse
        inverse = self._compute_inverse()
        self._kept_inverse = (
            self.lower_and_upper.detach().clone(),
            self.log_diagonal.detach().clone(),
            inverse,
        )
        return inverse

    def _compute_inverse(self) -> Tensor:
        # No triangular systems in half precision.
        below, upper = (factor.to(working_dtype(factor)) for factor in self._factors())
        identity = torch.eye(self.bias.numel(), dtype=upper.dtype, device=upper.device)
        half = torch.linalg.solve_triangular(
            below + identity, identity, upper=False, unitriangular=True
        )
        inverse = torch.linalg.solve_triangular(upper, half, upper=True).to(self.bias.dtype)
        return inverse.index_select(-2, self.permutation.inverse_permutation)


def _are_same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
