"""Coupling layers of splines whose conditioner has weights of its own in every row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ....distributions.transforms import RationalQuadraticSpline
from .affine import AffineMap
from .row_map import Chain, Reverse, RowMap

__all__ = ["SplineCoupling", "spline_flow"]


class SplineCoupling(RowMap):
    r"""
    A rational-quadratic spline for each feature, those of the second half given the first.

    The splines of the first half have parameters of their own, those of the second are what one
    hidden layer of tanh units, with its own weights in each row, makes of the first half. At the
    start all are the identity.

    :param int features: number of latents.
    :param int hidden_features: size of the hidden layer.
    :param RationalQuadraticSpline spline: bins and interval.

    Reference: Durkan, Bekasov, Murray and Papamakarios 2019, "Neural Spline Flows", eq. 9-11.
    """

    def __init__(
        self, features: int, hidden_features: int, spline: RationalQuadraticSpline
    ) -> None:
        self.first = (features + 1) // 2
        self.second = features - self.first
        self.hidden_features = hidden_features if self.second else 0
        self.spline = spline
        H, k = self.hidden_features, spline.num_parameters
        # of the first splines; weights and biases of the hidden layer, and of the output
        self._sizes = [self.first * k, self.first * H, H, H * self.second * k, self.second * k]
        super().__init__(features, sum(self._sizes))

    def initial(self, num_rows: int) -> Tensor:
        """The identity, with hidden units that are ready to tell inputs apart."""
        own, weight, bias, output, output_bias = (torch.zeros(size) for size in self._sizes)
        weight = torch.randn_like(weight) / math.sqrt(self.first)
        bias = torch.randn_like(bias)
        psi = torch.cat([own, weight, bias, output, output_bias])
        return psi.expand(num_rows, -1).clone()

    def to_latents(self, noise: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`RowMap.to_latents`."""
        parts = psi.split(self._sizes, -1)
        own = self._own(parts[0], noise)
        if self.second:
            # All features in one call: its cost is mostly the number of operations.
            own = torch.cat([own, self._predicted(noise[..., : self.first], parts)], -2)
        latents, log_slope = self.spline.forward(noise, own)
        return latents, log_slope.sum(-1)

    def to_noise(self, latents: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`RowMap.to_noise`."""
        parts = psi.split(self._sizes, -1)
        own = self._own(parts[0], latents)
        first, second = latents.split([self.first, self.second], -1)
        first, log_slope = self.spline.inverse(first, own)
        if not self.second:
            return first, log_slope.sum(-1)
        second, log_slope_2 = self.spline.inverse(second, self._predicted(first, parts))
        return torch.cat([first, second], -1), log_slope.sum(-1) + log_slope_2.sum(-1)

    def _own(self, parameters: Tensor, values: Tensor) -> Tensor:
        rows, draws = values.shape[:2]
        own = parameters.reshape(rows, 1, self.first, self.spline.num_parameters)
        return own.expand(-1, draws, -1, -1)

    def _predicted(self, first: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        _, weight, bias, output, output_bias = parts
        H = self.hidden_features
        weight = weight.unflatten(-1, (self.first, H))
        hidden = torch.baddbmm(bias[:, None], first, weight).tanh()
        output = output.unflatten(-1, (H, -1)) / math.sqrt(H)
        predicted = torch.baddbmm(output_bias[:, None], hidden, output)
        return predicted.unflatten(-1, (self.second, self.spline.num_parameters))


def spline_flow(
    features: int, num_layers: int, hidden_features: int, bins: int, bound: float
) -> RowMap:
    """
    Spline couplings, each followed by an affine map, with the features reversed in between.

    The last affine map makes every Gaussian a member; with those before it and the reversals each
    feature comes to depend on every other.

    :param int features: number of latents.
    :param int num_layers: number of couplings.
    :param int hidden_features: size of the hidden layer of a coupling.
    :param int bins: pieces of a spline.
    :param float bound: the splines act on ``[-bound, bound]``.
    """
    spline = RationalQuadraticSpline(bins, bound)
    maps: list[RowMap] = []
    for i in range(num_layers):
        if i > 0:
            maps.append(Reverse(features))
        maps.append(SplineCoupling(features, hidden_features, spline))
        maps.append(AffineMap(features))
    return Chain(maps)
