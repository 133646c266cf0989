"""Amortized population Gibbs for one model, in plain PyTorch: no Pyro, nothing general.

The Gaussian mixture of Wu et al. 2020, section 5.1, written out from algorithm 3: the densities of
this model, the two blocks of this model, one backward pass for all sweeps. It is the peer of
``benchmarks/apg.py``: what the generality of ``pyro_ext.infer.APG`` costs is the difference.
Shapes: particles L, data sets B, points N, clusters I, dimensions D.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOC, NU, ALPHA, BETA = 0.0, 0.1, 2.0, 2.0
NUM_CLUSTERS, NUM_FEATURES = 3, 2

NormalGamma = tuple[Tensor, Tensor, Tensor, Tensor]  # location, nu, alpha, beta


def gamma_log_prob(tau: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return alpha * beta.log() - torch.lgamma(alpha) + (alpha - 1) * tau.log() - beta * tau


def normal_log_prob(x: Tensor, mean: Tensor | float, precision: Tensor) -> Tensor:
    return 0.5 * (precision.log() - math.log(2 * math.pi) - precision * (x - mean) ** 2)


def normal_gamma_log_prob(p: NormalGamma, mu: Tensor, tau: Tensor) -> Tensor:
    loc, nu, alpha, beta = p
    log_prob = gamma_log_prob(tau, alpha, beta) + normal_log_prob(mu, loc, nu * tau)
    return log_prob.sum((-1, -2))


def prior_log_prob(mu: Tensor, tau: Tensor) -> Tensor:
    parameters = (LOC, NU, ALPHA, BETA)
    prior = tuple(torch.full_like(tau, value) for value in parameters)
    return normal_gamma_log_prob(prior, mu, tau)  # type: ignore[arg-type]


def draw(p: NormalGamma) -> tuple[Tensor, Tensor]:
    loc, nu, alpha, beta = (value.detach() for value in p)
    tau = (torch._standard_gamma(alpha) / beta).clamp_min(1e-8)
    return loc + torch.randn_like(tau) / (nu * tau).sqrt(), tau


def likelihoods(x: Tensor, mu: Tensor, tau: Tensor) -> Tensor:
    """Log-density of every point in every cluster, ``(..., N, I)``."""
    distance = x.unsqueeze(-2) - mu.unsqueeze(-3)
    log_scale = 0.5 * (tau.log() - math.log(2 * math.pi)).unsqueeze(-3)
    return (log_scale - 0.5 * tau.unsqueeze(-3) * distance**2).sum(-1)


class Clusters(nn.Module):
    """Proposal of means and precisions, by neural sufficient statistics."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.assignment = nn.Linear(in_features, NUM_CLUSTERS)
        self.value = nn.Linear(in_features, NUM_FEATURES)

    def forward(self, h: Tensor) -> NormalGamma:
        gamma = torch.softmax(self.assignment(h), -1).transpose(-1, -2)
        f = self.value(h)
        number, first, second = gamma.sum(-1, keepdim=True), gamma @ f, gamma @ f**2
        nu = NU + number
        loc = (NU * LOC + first) / nu
        beta = BETA + 0.5 * (second + NU * LOC**2 - nu * loc**2).clamp_min(0)
        return loc, nu, (ALPHA + 0.5 * number).expand_as(beta), beta


class Assignments(nn.Module):
    """Proposal of the assignments, by a network on each pair of a point and a cluster."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3 * NUM_FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, 1)
        )

    def forward(self, x: Tensor, mu: Tensor, tau: Tensor) -> Tensor:
        shape = (*mu.shape[:-2], x.shape[-2], NUM_CLUSTERS, NUM_FEATURES)
        points = x.unsqueeze(-2).expand(shape)
        clusters = [value.unsqueeze(-3).expand(shape) for value in (mu, tau)]
        return torch.log_softmax(self.net(torch.cat((points, *clusters), -1)).squeeze(-1), -1)


def pick(table: Tensor, c: Tensor) -> Tensor:
    return table.gather(-1, c.unsqueeze(-1)).squeeze(-1)


def resample(log_weights: Tensor, *values: Tensor) -> list[Tensor]:
    num_particles, num_sets = log_weights.shape
    weights = torch.softmax(log_weights, 0).t().cumsum(1)
    points = (torch.rand(num_sets, 1) + torch.arange(num_particles)) / num_particles
    ancestors = torch.searchsorted((weights / weights[:, -1:]).contiguous(), points)
    ancestors = ancestors.clamp_max(num_particles - 1).t()

    def take(value: Tensor) -> Tensor:
        index = ancestors.reshape(*ancestors.shape, *[1] * (value.dim() - 2))
        return value.gather(0, index.expand(num_particles, *value.shape[1:]))

    return [take(value) for value in values]


class PlainAPG(nn.Module):
    """Encoder, two kernels, and the loss of a run of the sampler."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Clusters(NUM_FEATURES)
        self.clusters = Clusters(NUM_FEATURES + NUM_CLUSTERS)
        self.assignments = Assignments()

    def forward(self, x: Tensor, num_particles: int, num_sweeps: int) -> Tensor:
        xs, num_points = x.unsqueeze(0), x.shape[1]
        p = tuple(value.expand(num_particles, *value.shape[1:]) for value in self.encoder(xs))
        mu, tau = draw(p)  # type: ignore[arg-type]
        of_clusters = normal_gamma_log_prob(p, mu, tau)  # type: ignore[arg-type]
        table = self.assignments(xs, mu, tau)
        c = self._categorical(table)
        log_q = of_clusters + pick(table, c).sum(-1)
        with torch.no_grad():
            log_p = prior_log_prob(mu, tau) + pick(likelihoods(xs, mu, tau), c).sum(-1)
            log_weights = log_p - num_points * math.log(NUM_CLUSTERS) - log_q
        losses = [-(torch.softmax(log_weights, 0) * log_q).sum(0).mean()]
        for _ in range(num_sweeps - 1):
            mu, tau, c = resample(log_weights, mu, tau, c)
            one_hot = F.one_hot(c, NUM_CLUSTERS).to(x)
            points = xs.expand(*c.shape, NUM_FEATURES)
            q = self.clusters(torch.cat((points, one_hot), -1))
            new_mu, new_tau = draw(q)
            log_q = normal_gamma_log_prob(q, new_mu, new_tau)
            with torch.no_grad():
                after = pick(likelihoods(xs, new_mu, new_tau), c).sum(-1)
                after = after + prior_log_prob(new_mu, new_tau) - log_q
                before = pick(likelihoods(xs, mu, tau), c).sum(-1) + prior_log_prob(mu, tau)
                log_weights = after - before + normal_gamma_log_prob(q, mu, tau)
            losses.append(-(torch.softmax(log_weights, 0) * log_q).sum(0).mean())
            mu, tau, c = resample(log_weights, new_mu, new_tau, c)
            table = self.assignments(xs, mu, tau)
            new_c = self._categorical(table)
            log_q = pick(table, new_c)
            with torch.no_grad():
                densities = likelihoods(xs, mu, tau)
                change = pick(densities, new_c) - pick(densities, c)
                of_points = change - log_q + pick(table, c)
                log_weights = of_points.sum(-1)
            losses.append(-(torch.softmax(of_points, 0) * log_q).sum(0).sum(-1).mean())
            c = new_c
        return torch.stack(losses).sum()

    def _categorical(self, log_probs: Tensor) -> Tensor:
        fn = torch.distributions.Categorical(logits=log_probs.detach(), validate_args=False)
        return fn.sample()
