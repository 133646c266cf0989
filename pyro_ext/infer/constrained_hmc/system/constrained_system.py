r"""The constrained Hamiltonian system: constraint, potential, and their derivatives.

The target density on the manifold :math:`\{u : c(u) = 0\}`, with respect to its surface measure,
is

.. math:: \pi(u) \propto p(u) \, |J(u) J(u)^\top|^{-1/2}, \qquad J = \partial c / \partial u

(Graham and Storkey 2017, eq. 4). Everything here has a leading chain axis and knows no Pyro.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import vjp, vmap

from ..jacobian.forward import forward_product
from ..jacobian.structure import DenseStructure, Jacobian, Structure

__all__ = [
    "ConstrainedSystem",
    "Point",
    "ScalarFunction",
    "System",
    "project_momentum",
    "total_energy",
]

ScalarFunction = Callable[[Tensor], Tensor]


class Point(NamedTuple):
    """A batch of positions with all that the dynamics need to know there."""

    position: Tensor  # (chains, dim)
    jacobian: Jacobian
    energy: Tensor  # (chains,) negative log target density
    gradient: Tensor  # (chains, dim) of ``energy``


class System(Protocol):
    """What the integrator asks of a system; arguments as in :class:`ConstrainedSystem`."""

    is_vectorized: bool

    def constraint(self, position: Tensor, scale: Tensor) -> Tensor:
        """Residuals of the constraint."""

    def correction(
        self, position: Tensor, scale: Tensor, jacobian: Jacobian
    ) -> tuple[Tensor, Tensor]:
        """Residuals of the constraint, and the shortest step by which they change so much."""

    def slopes(self, position: Tensor, scale: Tensor) -> Any:
        """Jacobian of the constraint, for a step from another one."""

    def jacobian(self, position: Tensor, scale: Tensor) -> Jacobian:
        """Factorised Jacobian of the constraint."""

    def point(self, position: Tensor, scale: Tensor) -> Point:
        """Energy and gradient."""


class ConstrainedSystem:
    r"""
    Batched functions of a constrained system.

    Positions are :math:`q = u / s` with a scale :math:`s` per input, which is the same as
    sampling :math:`u` with the diagonal mass matrix :math:`\mathrm{diag}(s)^{-2}`.

    :param constraint: maps one input ``(dim,)`` to the residuals ``(num_constraints,)``.
    :param potential: maps one input ``(dim,)`` to a scalar, :math:`-\log p(u)`.
    :param bool vectorized: whether the functions may be run under ``vmap``; otherwise they are
        run once per chain.
    :param bool forward: build dense Jacobians by forward-mode differentiation, one product per
        input, rather than by reverse mode, one per constraint.
    :param structure: how to compute and factorise Jacobians; by default as dense matrices.
    :param derivatives: what the structure computes Jacobians from, if it is there in a form that
        costs less than ``structure.derivatives(constraint)``.
    """

    def __init__(
        self,
        constraint: ScalarFunction,
        potential: ScalarFunction,
        *,
        vectorized: bool = True,
        forward: bool = True,
        structure: Structure[Any] | None = None,
        derivatives: ScalarFunction | None = None,
    ) -> None:
        self.is_vectorized = vectorized
        self.functions = (constraint, potential)
        self.structure: Structure[Any] = structure or DenseStructure(
            forward=forward and vectorized
        )
        batch = vmap if vectorized else _loop
        self._constraint: ScalarFunction = batch(constraint)
        self.has_recorded_derivatives = derivatives is not None
        derivatives = derivatives or self.structure.derivatives(constraint)
        self._derivatives: ScalarFunction = batch(derivatives)
        self._potential: ScalarFunction = batch(potential)
        product = _reverse_product if self.structure.mode == "reverse" else forward_product
        self._products = vmap(partial(product, constraint))

    def constraint(self, position: Tensor, scale: Tensor) -> Tensor:
        """
        Residuals of the constraint.

        :param Tensor position: shape ``(chains, dim)``.
        :param Tensor scale: shape ``(dim,)``.
        :returns: shape ``(chains, num_constraints)``.
        """
        return self._constraint(position * scale)

    def correction(
        self, position: Tensor, scale: Tensor, jacobian: Jacobian
    ) -> tuple[Tensor, Tensor]:
        """
        Residuals :math:`c`, and the shortest :math:`v` with :math:`Jv = c`.

        :param jacobian: factorised Jacobians at other points.
        """
        residual = self.constraint(position, scale)
        return residual, jacobian.minimum_norm(residual)

    def derivatives(self, inputs: Tensor) -> Tensor:
        """What :attr:`structure` reads Jacobians from, at ``(chains, dim)`` inputs ``u``."""
        return self._derivatives(inputs)

    def product(self, position: Tensor, vector: Tensor, scale: Tensor) -> Tensor:
        """
        :math:`Jv` by differentiation, whatever the structure; for vectorised systems.

        :param Tensor vector: shape ``(chains, dim)``.
        """
        return self._products(position * scale, vector * scale)

    def slopes(self, position: Tensor, scale: Tensor) -> Any:
        """Jacobian of the constraint, as :meth:`.Jacobian.newton_step` takes it."""
        return self.structure.slopes(self._derivatives(position * scale), scale)

    def jacobian_matrix(self, position: Tensor, scale: Tensor) -> Tensor:
        """Jacobian of the constraint, shape ``(chains, num_constraints, dim)``."""
        return self.structure.matrix(self._derivatives(position * scale), scale)

    def jacobian(self, position: Tensor, scale: Tensor) -> Jacobian:
        """Factorised Jacobian of the constraint."""
        jacobian: Jacobian = self.structure.factorize(self._derivatives(position * scale), scale)
        return jacobian

    def point(self, position: Tensor, scale: Tensor) -> Point:
        r"""
        Energy :math:`-\log\pi` and its gradient.

        The gradient of :math:`\frac12\log\det JJ^\top` is the contraction of
        :math:`(JJ^\top)^{-1}J` with the second derivatives of the constraint (Graham and Storkey
        2017, eq. 32): one reverse sweep through the computation of the Jacobian, without
        differentiating its factorisation.
        """
        inputs = position * scale
        derivatives, pullback = vjp(self._derivatives, inputs)[:2]
        jacobian = self.structure.factorize(derivatives, scale)
        (log_det_gradient,) = pullback(self.structure.cotangent(jacobian, scale))
        potential, potential_pullback = vjp(self._potential, inputs)[:2]
        (potential_gradient,) = potential_pullback(torch.ones_like(potential))
        return Point(
            position=position,
            jacobian=jacobian,
            energy=potential + jacobian.half_log_det_gram,
            gradient=(potential_gradient + log_det_gradient) * scale,
        )


def project_momentum(jacobian: Jacobian, momentum: Tensor) -> Tensor:
    r"""
    Orthogonal projection onto the cotangent space, :math:`p - J^\top(JJ^\top)^{-1}Jp`.

    :param Tensor momentum: shape ``(chains, dim)``.
    :returns: momenta with :math:`Jp = 0` (algorithm 1, line 29).
    """
    return momentum - jacobian.minimum_norm(jacobian.apply(momentum))


def total_energy(point: Point, momentum: Tensor) -> Tensor:
    """The Hamiltonian of eq. 6 with identity mass, shape ``(chains,)``."""
    return point.energy + 0.5 * momentum.square().sum(-1)


def _reverse_product(constraint: ScalarFunction, u: Tensor, vector: Tensor) -> Tensor:
    """By the transpose of the transpose, for operations without a forward derivative."""
    outputs, pullback = vjp(constraint, u)[:2]
    transposed = vjp(lambda cotangent: pullback(cotangent)[0], torch.zeros_like(outputs))[1]
    result: Tensor = transposed(vector)[0]
    return result


def _loop(function: ScalarFunction) -> ScalarFunction:
    """Like ``vmap`` over the first axis, for functions that cannot be vectorised."""

    def looped(inputs: Tensor) -> Tensor:
        return torch.stack([function(row) for row in inputs.unbind(0)])

    return looped
