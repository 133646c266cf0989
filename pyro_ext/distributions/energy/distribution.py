"""The distribution that a call of an autoregressive energy machine returns."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["EnergyMachineDistribution", "Machine"]


class Machine(Protocol):
    """What a distribution needs of its module; rows have shape ``(n, features)``."""

    features: int

    @property
    def support(self) -> constraints.Constraint:
        """Where the data lie."""

    def log_density(
        self,
        rows: Tensor,
        context: Tensor | None,
        *,
        num_importance_samples: int | None = None,
        exact: bool | None = None,
    ) -> Tensor:
        """Log-densities of rows."""

    def proposal_log_density(self, rows: Tensor, context: Tensor | None) -> Tensor:
        """Log-densities of rows under the proposal."""

    def draw(
        self,
        num_rows: int,
        context: Tensor | None,
        *,
        num_proposals: int | None = None,
        exact: bool | None = None,
    ) -> Tensor:
        """Rows that are drawn."""


class EnergyMachineDistribution(TorchDistribution):
    """
    The density of an autoregressive energy machine, given a context if it has one.

    A light object made by the call of the module, which keeps the trainable parameters.

    :param Machine machine: the module, an :class:`AutoregressiveEnergyMachine`.
    :param Tensor context: shape ``batch_shape + (context_features,)``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        machine: Machine,
        context: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.machine, self.context = machine, context
        batch_shape = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch_shape, torch.Size([machine.features]), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Where the data lie."""
        return self.machine.support

    def expand(
        self,
        batch_shape: torch.Size | list[int] | tuple[int, ...],
        _instance: EnergyMachineDistribution | None = None,
    ) -> EnergyMachineDistribution:
        """Expand to a larger batch; draws of all its elements are independent."""
        new = self._get_checked_instance(EnergyMachineDistribution, _instance)
        new.machine, new.context = self.machine, self.context
        super(EnergyMachineDistribution, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def log_prob(
        self,
        value: Tensor,
        *,
        num_importance_samples: int | None = None,
        exact: bool | None = None,
    ) -> Tensor:
        r"""
        Log-density: an estimate from draws of the proposal, or by quadrature.

        From S draws, Nash and Durkan 2019, eq. 9, which is too large by about
        :math:`\tfrac12 \sum_d \operatorname{var}(\hat Z_d / Z_d)` on average, and random. In
        training mode, where gradients are on, the datum takes the place of one of the draws;
        then it is bounded, and too small instead of too large.

        :param Tensor value: shape broadcastable to ``batch_shape + (features,)``.
        :param num_importance_samples: S; by default what the module was made with, or what
            :meth:`~pyro_ext.distributions.AutoregressiveEnergyMachine.evaluation` says.
        :param exact: by quadrature, to a relative error of 1e-4 of every conditional at most.
        :returns: shape ``sample_shape + batch_shape``.
        :raises ValueError: if validation is on and the value is not in the support.
        :raises TypeError: if the value is of higher precision than the parameters.
        """
        if self._validate_args and value.numel():
            self._validate_sample(value)
        shape, rows, context = self._rows(value)
        log_prob = self.machine.log_density(
            rows, context, num_importance_samples=num_importance_samples, exact=exact
        )
        return log_prob.reshape(shape)

    def proposal_log_prob(self, value: Tensor) -> Tensor:
        """
        Log-density of the proposal, which is exact.

        :param Tensor value: shape broadcastable to ``batch_shape + (features,)``.
        :returns: shape ``sample_shape + batch_shape``.
        """
        shape, rows, context = self._rows(value)
        return self.machine.proposal_log_density(rows, context).reshape(shape)

    def sample(
        self,
        sample_shape: torch.Size | list[int] | tuple[int, ...] = (),
        *,
        num_proposals: int | None = None,
        exact: bool | None = None,
    ) -> Tensor:
        """
        Draw, feature by feature.

        :param sample_shape: shape of the draws.
        :param num_proposals: draws of the proposal to choose each number from, 100 by default; of
            one, the results are draws of the proposal.
        :param exact: invert the distribution function on a fine grid instead.
        :returns: shape ``sample_shape + batch_shape + (features,)``.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        num_rows = shape[:-1].numel()
        context = None
        if self.context is not None:
            context = self.context.expand(*shape[:-1], -1).reshape(
                num_rows, self.context.shape[-1]
            )
        x = self.machine.draw(num_rows, context, num_proposals=num_proposals, exact=exact)
        return x.reshape(shape)

    def _rows(self, value: Tensor) -> tuple[torch.Size, Tensor, Tensor | None]:
        """The shape of the result, and the values and contexts as rows."""
        if not value.is_floating_point():
            raise TypeError(
                f"The value is of {value.dtype}: an energy machine is a density of real numbers; "
                "dequantise integers first, for example by `x + torch.rand(x.shape)`."
            )
        batch_shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        rows = value.expand(batch_shape + self.event_shape).reshape(-1, self.machine.features)
        context = self.context
        if context is not None:
            context = context.expand(*batch_shape, -1).reshape(len(rows), context.shape[-1])
        return batch_shape, rows, context
