"""How well every point fits to every cluster: one small network for all pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PairLogits"]

CHUNK = 1 << 17  # hidden units at a time: half a megabyte in single precision, which a cache holds


class PairLogits(nn.Module):
    r"""
    A network with one hidden layer on every pair of a point and a cluster.

    .. math:: \ell_{ni} = \sum_h a_h \tanh\left(A_h^\top x_n + B_h^\top z_i + b_h\right).

    As logits of the cluster of a point they propose assignments (Wu et al. 2020, appendix E),
    for any number of points and of clusters. A bias of the sum would be the same for all clusters.
    The hidden layer of all pairs is never kept: it is computed some rows at a time, and again in
    the backward pass, so that neither memory nor time go into large tensors.

    :param int point_features: number of features of a point.
    :param int cluster_features: number of features of a cluster.
    :param int hidden_features: number of hidden units.
    :raises ValueError: if a number is not positive.

    Reference: Wu et al. 2020, "Amortized Population Gibbs Samplers with Neural Sufficient
    Statistics", appendix E.

    >>> from pyro_ext.nn import PairLogits
    >>> logits = PairLogits(point_features=2, cluster_features=4)
    >>> points, clusters = torch.randn(5, 100, 2), torch.randn(10, 5, 3, 4)
    >>> logits(points, clusters).shape
    torch.Size([10, 5, 100, 3])
    """

    def __init__(
        self, point_features: int, cluster_features: int, hidden_features: int = 32
    ) -> None:
        super().__init__()
        numbers = {
            "point_features": point_features,
            "cluster_features": cluster_features,
            "hidden_features": hidden_features,
        }
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name}={number} must be positive.")
        self.of_point = nn.Linear(point_features, hidden_features, bias=False)
        self.of_cluster = nn.Linear(cluster_features, hidden_features)
        self.to_logit = nn.Linear(hidden_features, 1, bias=False)

    def forward(self, points: Tensor, clusters: Tensor) -> Tensor:
        """
        Evaluate all pairs.

        :param Tensor points: shape ``(..., points, point_features)``.
        :param Tensor clusters: shape ``(..., clusters, cluster_features)``, whose leading
            dimensions broadcast with those of the points.
        :returns: shape ``(..., points, clusters)``.
        """
        offset = self.of_cluster(clusters).unsqueeze(-3)
        slope = self.of_point.weight.T.unsqueeze(-2).expand(
            *offset.shape[:-3], -1, *offset.shape[-2:]
        )
        layers = torch.cat([slope, offset], -3)  # (..., point_features + 1, clusters, hidden)
        points = torch.cat([points, torch.ones_like(points[..., :1])], -1)
        leading = torch.broadcast_shapes(points.shape[:-2], layers.shape[:-3])
        rows = points.expand(*leading, -1, -1).reshape(-1, *points.shape[-2:])
        layers = layers.expand(*leading, -1, -1, -1).reshape(-1, *layers.shape[-3:])
        weights = self.to_logit.weight[0]
        # tanh(h) = 2 sigmoid(2 h) - 1, and a sigmoid costs a fraction of a tanh
        sums = _SumOfSigmoids.apply(rows, 2 * layers, weights)
        return (2 * sums - weights.sum()).reshape(*leading, *sums.shape[-2:])


class _SumOfSigmoids(torch.autograd.Function):
    """From ``(rows, points, features)`` and ``(rows, features, clusters, hidden)`` to sums."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, layers: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(points, layers, weights)
        sums = points.new_empty(*points.shape[:-1], layers.shape[-2])
        for chunk in _chunks(points, layers):
            hidden = _hidden(points[chunk], layers[chunk])
            sums[chunk] = (hidden @ weights).reshape(sums[chunk].shape)
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, output: Tensor) -> Any:
        points, layers, weights = ctx.saved_tensors
        of_layers, of_weights = torch.empty_like(layers), torch.zeros_like(weights)
        of_points = torch.empty_like(points) if ctx.needs_input_grad[0] else None
        for chunk in _chunks(points, layers):
            hidden = _hidden(points[chunk], layers[chunk])
            outer = output[chunk].reshape(-1, 1)
            of_weights += hidden.T @ outer[:, 0]
            slope = torch.addcmul(hidden, hidden, hidden, value=-1)  # sigmoid' = s - s^2
            slope = slope.mul_(weights).mul_(outer).reshape(*output[chunk].shape[:-1], -1)
            own = layers[chunk].flatten(-2)
            of_layers[chunk] = (points[chunk].mT @ slope).reshape(layers[chunk].shape)
            if of_points is not None:
                of_points[chunk] = slope @ own.mT
        return of_points, of_layers, of_weights


def _hidden(points: Tensor, layers: Tensor) -> Tensor:
    """Units of all pairs of some rows, one pair in each row of the result."""
    return (points @ layers.flatten(-2)).sigmoid_().reshape(-1, layers.shape[-1])


def _chunks(points: Tensor, layers: Tensor) -> Iterator[slice]:
    units = points.shape[-2] * layers.shape[-2] * layers.shape[-1]
    size = max(1, CHUNK // max(1, units))
    for start in range(0, len(points), size):
        yield slice(start, start + size)
