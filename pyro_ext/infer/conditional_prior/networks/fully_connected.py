"""A fully connected network from noise to latents, for few dimensions."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from .row_map import RowMap

__all__ = ["FullyConnectedMap"]

_MOST_FEATURES = 10


class FullyConnectedMap(RowMap):
    r"""
    :math:`z = \epsilon + \mathrm{NN}(\epsilon)` with hidden layers of tanh units.

    The Jacobian is carried forward through the layers, one column for each feature, and its
    determinant computed for every draw, which is why the number of features is limited. Nothing
    makes this map one-to-one: where it folds over, the objective of theorem 2 is not a bound, and
    the density of given latents is unknown. :meth:`folds` finds out.

    :param int features: number of latents d, at most 10.
    :param int hidden_features: units of a hidden layer.
    :param int num_layers: hidden layers.
    :raises ValueError: if there are too many features.

    Reference: Wu, Domke and Sanner 2022, section 3.4.
    """

    is_invertible = False

    def __init__(self, features: int, hidden_features: int, num_layers: int) -> None:
        if features > _MOST_FEATURES:
            raise ValueError(
                f"flow='fcn' computes a determinant of {features} x {features} for every draw; "
                f"it is meant for at most {_MOST_FEATURES} latents of a row. Use 'gvi', 'planar' "
                "or 'spline'."
            )
        sizes = [features, *[hidden_features] * num_layers, features]
        self._shapes = list(pairwise(sizes))
        super().__init__(features, sum(a * b + b for a, b in self._shapes))

    def initial(self, num_rows: int) -> Tensor:
        """Near the identity."""
        parts: list[Tensor] = []
        for i, (a, b) in enumerate(self._shapes):
            is_last = i == len(self._shapes) - 1
            scale = 0.01 if is_last else 1.0
            parts += [scale * torch.randn(a * b) / math.sqrt(a), (1 - is_last) * torch.randn(b)]
        return torch.cat(parts).expand(num_rows, -1).clone()

    def to_latents(self, noise: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`RowMap.to_latents`."""
        latents, jacobian = self._with_jacobian(noise, psi)
        return latents, torch.linalg.slogdet(jacobian).logabsdet

    def folds(self, noise: Tensor, psi: Tensor) -> Tensor:
        """
        See :meth:`RowMap.folds`.

        Between draws whose determinants have opposite signs there is a place where the map turns
        back, by the continuity of the determinant, so that latents near it are reached twice.
        """
        sign = torch.linalg.slogdet(self._with_jacobian(noise, psi)[1]).sign
        return (sign > 0).any(-1) & (sign < 0).any(-1)

    def _with_jacobian(self, noise: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        d = self.features
        hidden, jacobian = noise, torch.eye(d, dtype=noise.dtype, device=noise.device)
        jacobian = jacobian.expand(*noise.shape[:-1], d, d)
        layers = self._layers(psi)
        for i, (weight, bias) in enumerate(layers):
            hidden = torch.baddbmm(bias[:, None], hidden, weight)
            # d of the inputs, as rows, to each of the units
            jacobian = jacobian @ weight[:, None]
            if i < len(layers) - 1:
                hidden = hidden.tanh()
                jacobian = jacobian * (1 - hidden.square()).unsqueeze(-2)
        identity = torch.eye(d, dtype=noise.dtype, device=noise.device)
        return noise + hidden, identity + jacobian

    def to_noise(self, latents: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """Not available.

        :raises NotImplementedError: always.
        """
        raise NotImplementedError(
            "flow='fcn' has no inverse, so that only its own draws can be scored. Use 'gvi', "
            "'planar' or 'spline' to score other values of the latents."
        )

    def _layers(self, psi: Tensor) -> list[tuple[Tensor, Tensor]]:
        sizes = [size for a, b in self._shapes for size in (a * b, b)]
        parts = psi.split(sizes, -1)
        return [
            (weight.unflatten(-1, shape), bias)
            for weight, bias, shape in zip(parts[::2], parts[1::2], self._shapes, strict=True)
        ]
