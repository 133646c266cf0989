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
        offset = self.of_cluster(clusters).unsqueeze(-2)
        slope = self.of_point.weight.T.expand(*offset.shape[:-2], -1, -1)
        layers = torch.cat([slope, offset], -2)  # (..., clusters, point_features + 1, hidden)
        points = torch.cat([points, torch.ones_like(points[..., :1])], -1).unsqueeze(-3)
        leading = torch.broadcast_shapes(points.shape[:-2], layers.shape[:-2])
        points = points.expand(*leading, -1, -1).flatten(0, -3)
        layers = layers.expand(*leading, -1, -1).flatten(0, -3)
        weights = self.to_logit.weight[0]
        # tanh(h) = 2 sigmoid(2 h) - 1, and a sigmoid costs a fraction of a tanh
        sums = _SumOfSigmoids.apply(points, 2 * layers, weights)
        return (2 * sums - weights.sum()).reshape(*leading, points.shape[-2]).mT


class _SumOfSigmoids(torch.autograd.Function):
    """Sums over units, ``(clusters, points)``, of one layer for the points of each cluster.

    From the points, ``(clusters, points, features)``, the layers, ``(clusters, features,
    hidden)``, and the weights of the sum, ``(hidden,)``. Hidden units are written to the same
    piece of memory again and again: new memory for each chunk costs more than their computation.
    """

    @staticmethod
    def forward(ctx: Any, points: Tensor, layers: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(points, layers, weights)
        sums = points.new_empty(points.shape[:-1])
        size, hidden = _workspace(points, layers)
        for chunk in _chunks(points, size):
            units = _hidden(points[chunk], layers[chunk], hidden)
            torch.matmul(units, weights, out=sums[chunk])
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, output: Tensor) -> Any:
        points, layers, weights = ctx.saved_tensors
        weighted = points * output.unsqueeze(-1)
        of_layers, of_weights = torch.empty_like(layers), torch.zeros_like(weights)
        of_points = torch.empty_like(points) if ctx.needs_input_grad[0] else None
        size, hidden = _workspace(points, layers)
        slopes = torch.empty_like(hidden)
        for chunk in _chunks(points, size):
            units = _hidden(points[chunk], layers[chunk], hidden)
            of_weights += output[chunk].reshape(-1) @ units.flatten(0, 1)
            # sigmoid' = s - s^2
            slope = torch.addcmul(units, units, units, value=-1, out=slopes[: len(units)])
            torch.bmm(weighted[chunk].mT, slope, out=of_layers[chunk])
            if of_points is not None:
                torch.bmm(slope, (weights * layers[chunk]).mT, out=of_points[chunk])
        if of_points is not None:
            of_points *= output.unsqueeze(-1)
        return of_points, of_layers * weights, of_weights


def _workspace(points: Tensor, layers: Tensor) -> tuple[int, Tensor]:
    """How many clusters at a time, and where their hidden units go."""
    num_points, num_units = points.shape[-2], layers.shape[-1]
    size = max(1, CHUNK // max(1, num_points * num_units))
    return size, points.new_empty(min(size, len(points)), num_points, num_units)


def _hidden(points: Tensor, layers: Tensor, out: Tensor) -> Tensor:
    return torch.bmm(points, layers, out=out[: len(points)]).sigmoid_()


def _chunks(points: Tensor, size: int) -> Iterator[slice]:
    for start in range(0, len(points), size):
        yield slice(start, start + size)
