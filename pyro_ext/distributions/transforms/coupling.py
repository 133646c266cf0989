"""Coupling layers: one half of the features decides how the other is transformed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .bijection import Bijection
from .elementwise import ElementwiseMap

__all__ = ["Coupling"]


class Coupling(Bijection):
    r"""
    Transform one half of the features by functions that the other half chooses.

    .. math::
        z_i &= g_{\theta_i}(x_i), \\
        \theta_{1:d-1} &\text{ trainable}, \qquad \theta_{d:D} = \mathrm{NN}(x_{1:d-1}, c).

    Both directions take one pass of the network. The conditioning features are transformed too,
    each by a function of its own that depends on nothing else.

    :param ElementwiseMap elementwise_map: the family of g.
    :param nn.Module network: called with the conditioning features, shape ``(..., d - 1)``, and
        the context; returns shape ``(..., (D - d + 1) * num_parameters)``. None if the
        transformed features depend on nothing: then all parameters are trainable.
    :param int conditioning_features: how many features condition; the first ones.
    :param int transformed_features: how many follow them.

    Reference: Dinh et al. 2017; Durkan et al. 2019, eq. 9-11.
    """

    worth_compiling = ("to_noise", "to_data")

    def __init__(
        self,
        elementwise_map: ElementwiseMap,
        network: nn.Module | None,
        conditioning_features: int,
        transformed_features: int,
    ) -> None:
        super().__init__()
        self.elementwise_map = elementwise_map
        self.conditioning_features = conditioning_features
        self.transformed_features = transformed_features
        self.network = network
        of_their_own = conditioning_features + (transformed_features if network is None else 0)
        self.parameters_of_conditioning = nn.Parameter(
            torch.zeros(of_their_own, elementwise_map.num_parameters)
        )

    def extra_repr(self) -> str:
        """Show the family of functions when the module is printed."""
        return f"elementwise_map={self.elementwise_map}"

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_noise`."""
        parameters: Tensor = self.parameters_of_conditioning
        if self.network is not None:
            predicted = self._predict(x[..., : self.conditioning_features], context)
            own = parameters.expand(*predicted.shape[:-2], -1, -1)
            # All features in one call: its cost is mostly the number of operations.
            parameters = torch.cat([own, predicted], -2)
        z, log_slope = self.elementwise_map.forward(x, parameters)
        return z, log_slope.sum(-1)

    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_data`."""
        own = self.parameters_of_conditioning
        if self.network is None:
            x, log_slope = self.elementwise_map.inverse(z, own)
            return x, log_slope.sum(-1)
        z1, z2 = z.split([self.conditioning_features, self.transformed_features], -1)
        x1, log_slope1 = self.elementwise_map.inverse(z1, own)
        x2, log_slope2 = self.elementwise_map.inverse(z2, self._predict(x1, context))
        return torch.cat([x1, x2], -1), log_slope1.sum(-1) + log_slope2.sum(-1)

    def _predict(self, x1: Tensor, context: Tensor | None) -> Tensor:
        if self.network is None:
            raise TypeError("A coupling without a network has nothing to predict.")
        predicted: Tensor = self.network(x1, context)
        shape = (self.transformed_features, self.elementwise_map.num_parameters)
        return predicted.unflatten(-1, shape)
