"""Densities whose score is known at every time, and the flows that have it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, MixtureSameFamily, MultivariateNormal

from pyro_ext.distributions import ScoreFlow
from pyro_ext.distributions.diffusion import SDE, VESDE, VPSDE, SubVPSDE

__all__ = ["FADED", "MIXTURE", "SDES", "SKEWED", "KnownScore", "Mixture", "known_flow"]

SDES = {"vp": VPSDE(), "subvp": SubVPSDE(), "ve": VESDE()}
# so long that nothing of the data is left: the prior is what they have become
FADED = {
    "vp": VPSDE(beta_max=60.0),
    "subvp": SubVPSDE(beta_max=60.0, start=1e-3),
    "ve": VESDE(sigma_max=1e6),
}


class Mixture:
    """
    A mixture of Gaussians, and what a diffusion makes of it: another one.

    :param Tensor weights: shape ``(k,)``.
    :param Tensor means: shape ``(k, d)``.
    :param Tensor covariances: shape ``(k, d, d)``.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        self.weights, self.means, self.covariances = weights, means, covariances

    def at(self, sde: SDE, t: float) -> Distribution:
        """The distribution at a time."""
        time = torch.tensor(t, dtype=self.means.dtype)
        return self._noisy(sde.mean_factor(time), sde.std(time))

    def density(self) -> Distribution:
        """The distribution of the data."""
        return self._noisy(torch.ones(()), torch.zeros(()))

    def _noisy(self, mean_factor: Tensor, std: Tensor) -> Distribution:
        identity = torch.eye(self.means.shape[1])
        components = MultivariateNormal(
            mean_factor * self.means,
            mean_factor.square() * self.covariances + std.square() * identity,
        )
        return MixtureSameFamily(Categorical(self.weights), components)

    def score(self, sde: SDE, x: Tensor, t: Tensor) -> Tensor:
        """Gradient of the log-density, in closed form; shapes ``(n, d)`` and ``(n,)``."""
        a, std = sde.mean_factor(t)[:, None, None], sde.std(t)[:, None, None]
        values, vectors = torch.linalg.eigh(self.covariances)
        spread = a.square() * values + std.square()  # (n, k, d)
        rotated = torch.einsum("nkd,kde->nke", x[:, None] - a * self.means, vectors)
        log_densities = -0.5 * (rotated.square() / spread + spread.log()).sum(-1)
        shares = (log_densities + self.weights.log()).softmax(-1)
        scores = -torch.einsum("nke,kde->nkd", rotated / spread, vectors)
        return (shares.unsqueeze(-1) * scores).sum(1)


class KnownScore(nn.Module):
    """A score network that knows the answer, off by a factor if one wants."""

    def __init__(self, mixture: Mixture, sde: SDE, factor: float = 1.0) -> None:
        super().__init__()
        self.mixture, self.sde = mixture, sde
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        return self.factor * self.mixture.score(self.sde, x, t)


def known_flow(mixture: Mixture, sde: SDE, factor: float = 1.0) -> ScoreFlow:
    """A flow with the exact score of a mixture."""
    network = KnownScore(mixture, sde, factor)
    return ScoreFlow(mixture.means.shape[1], network, sde=sde, parametrization="score")


def _double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SKEWED = Mixture(
    _double([1.0]),
    _double([[0.5, -1.0, 0.0]]),
    _double([[[1.0, 0.6, 0.0], [0.6, 0.5, 0.1], [0.0, 0.1, 0.3]]]),
)
MIXTURE = Mixture(
    _double([0.3, 0.7]),
    _double([[-1.0, 0.5], [1.0, -0.5]]),
    _double([[[0.1, 0.05], [0.05, 0.1]], [[0.4, 0.0], [0.0, 0.02]]]),
)
