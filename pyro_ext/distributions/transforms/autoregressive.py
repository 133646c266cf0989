"""Autoregressive layers: every feature is transformed by what the ones before it decide."""

from __future__ import annotations

import torch
from torch import Tensor

from ...nn import ResMADE
from .bijection import Bijection
from .elementwise import ElementwiseMap

__all__ = ["Autoregressive"]


class Autoregressive(Bijection):
    r"""
    :math:`z_i = g_{\theta_i}(x_i)` with :math:`\theta_i = \mathrm{NN}(x_{1:i-1}, c)`.

    From data to noise all features are transformed at once. From noise to data they are found
    one after the other, but every unit of the network is evaluated only once (see
    :meth:`~pyro_ext.nn.ResMADE.step`), so that this costs about one pass of the network too.

    :param ElementwiseMap elementwise_map: the family of g.
    :param ResMADE network: predicts the parameters, ``num_parameters`` for each feature.

    Reference: Papamakarios et al. 2017, "Masked Autoregressive Flow"; Durkan et al. 2019.
    """

    # The other direction is a loop over the features, which takes minutes to compile.
    worth_compiling = ("to_noise",)

    def __init__(self, elementwise_map: ElementwiseMap, network: ResMADE) -> None:
        super().__init__()
        self.elementwise_map = elementwise_map
        self.network = network

    def extra_repr(self) -> str:
        """Show the family of functions when the module is printed."""
        return f"elementwise_map={self.elementwise_map}"

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_noise`."""
        z, log_slope = self.elementwise_map.forward(x, self.network(x, context))
        return z, log_slope.sum(-1)

    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_data`."""
        state = self.network.start(z.shape[:-1], context)
        x: list[Tensor] = []
        log_det = z.new_zeros(z.shape[:-1])
        for z_i in z.unbind(-1):
            parameters, state = self.network.step(state, x[-1] if x else None)
            x_i, log_slope = self.elementwise_map.inverse(z_i, parameters)
            x.append(x_i)
            log_det = log_det + log_slope
        return torch.stack(x, -1), log_det
