"""Neural sufficient statistics: what every point of a data set adds to the parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["PointwiseStatistics", "SoftMoments"]


class PointwiseStatistics(nn.Module):
    r"""
    Sum of a network's outputs over the points of a data set.

    .. math:: T_\phi(x, z) = \sum_n m_n \, T_\phi(x_n, z_n).

    Added to the natural parameters of a prior, as by :class:`NormalHead` and its like, it gives
    proposals whose precision grows with the number of points, so that networks that were trained
    on data sets of one size serve others. At the start the last linear layer is zero, and so
    are the statistics: proposals start at the prior.

    :param nn.Module network: from the features of a point to its statistics; none of its layers
        may look at other points.
    :param bool start_at_prior: whether to set the last linear layer to zero.
    :raises ValueError: if there is no linear layer to set to zero.

    Reference: Wu et al. 2020, "Amortized Population Gibbs Samplers with Neural Sufficient
    Statistics", section 3 and eq. 10.

    >>> from pyro_ext.nn import NormalHead, PointwiseStatistics
    >>> network = torch.nn.Sequential(
    ...     torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)
    ... )
    >>> statistics = PointwiseStatistics(network)
    >>> features = torch.randn(5, 100, 3)  # five data sets of 100 points
    >>> loc, scale = NormalHead(0.0, 2.0)(statistics(features))
    >>> scale
    tensor([2., 2., 2., 2., 2.], grad_fn=<RsqrtBackward0>)
    """

    def __init__(self, network: nn.Module, *, start_at_prior: bool = True) -> None:
        super().__init__()
        self.network = network
        if start_at_prior:
            layers = [part for part in network.modules() if isinstance(part, nn.Linear)]
            if not layers:
                raise ValueError(
                    "The network has no linear layer that could be set to zero: use "
                    "start_at_prior=False, and make its first outputs small."
                )
            nn.init.zeros_(layers[-1].weight)
            if layers[-1].bias is not None:
                nn.init.zeros_(layers[-1].bias)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Sum over the points.

        :param Tensor features: shape ``(..., points, features)``.
        :param Tensor mask: true for points that count, shape broadcastable to ``(..., points)``.
        :returns: shape ``(..., statistics)``.
        """
        if mask is None:
            return self.network(features).sum(-2)
        # by choice, not by products, and before the network: padding may be NaN
        features = torch.where(mask.unsqueeze(-1), features, 0.0)
        return torch.where(mask.unsqueeze(-1), self.network(features), 0.0).sum(-2)


class SoftMoments(nn.Module):
    r"""
    Numbers, sums and sums of squares of points that are softly assigned to clusters.

    .. math:: N_i = \sum_n \gamma_{ni}, \quad S_{1,i} = \sum_n \gamma_{ni} f_n, \quad
        S_{2,i} = \sum_n \gamma_{ni} f_n^2,

    with assignments :math:`\gamma_n = \mathrm{softmax}(A h_n)` and values :math:`f_n = F h_n`,
    by default affine functions of the features :math:`h_n` of a point. These are the sufficient
    statistics of a Gaussian mixture, which they equal if the assignments are among the features;
    :class:`NormalGammaHead` adds them to a prior.

    :param int in_features: number of features of a point.
    :param int num_clusters: number of clusters.
    :param int out_features: number of values of a point.
    :param assignment: another network from features to logits of the clusters.
    :param values: another network from features to values.
    :raises ValueError: if a number is not positive.

    Reference: Wu et al. 2020, "Amortized Population Gibbs Samplers with Neural Sufficient
    Statistics", section 5.1 and appendix E.

    >>> from pyro_ext.nn import SoftMoments
    >>> moments = SoftMoments(in_features=2, num_clusters=3, out_features=2)
    >>> moments(torch.randn(5, 60, 2)).shape
    torch.Size([5, 3, 2, 3])
    """

    def __init__(
        self,
        in_features: int,
        num_clusters: int,
        out_features: int,
        *,
        assignment: nn.Module | None = None,
        values: nn.Module | None = None,
    ) -> None:
        super().__init__()
        numbers = {
            "in_features": in_features,
            "num_clusters": num_clusters,
            "out_features": out_features,
        }
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name}={number} must be positive.")
        self.assignment = assignment or nn.Linear(in_features, num_clusters)
        self.values = values or nn.Linear(in_features, out_features)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Sum over the points.

        :param Tensor features: shape ``(..., points, in_features)``.
        :param Tensor mask: true for points that count, shape broadcastable to ``(..., points)``.
        :returns: N, S1 and S2, shape ``(..., clusters, out_features, 3)``.
        """
        if mask is not None:
            features = torch.where(mask.unsqueeze(-1), features, 0.0)  # padding may be NaN
        # clusters before points: a softmax over few adjacent numbers costs many times as much
        gamma = torch.softmax(self.assignment(features).mT, -2)
        if mask is not None:
            gamma = gamma * mask.unsqueeze(-2)
        values = self.values(features)
        powers = torch.cat([torch.ones_like(values), values, values.square()], -1)
        return (gamma @ powers).unflatten(-1, (3, -1)).mT
