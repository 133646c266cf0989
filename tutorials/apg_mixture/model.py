"""A Gaussian mixture, the networks that propose its latents, and its exact conditionals."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
import torch.nn.functional as F
from torch import nn

from pyro_ext.distributions import NormalGamma
from pyro_ext.nn import NormalGammaHead, PairLogits, SoftMoments

NUM_CLUSTERS = 3
NUM_FEATURES = 2
PRIOR = {"loc": 0.0, "mean_concentration": 0.1, "concentration": 2.0, "rate": 2.0}


def mixture(x, mask=None):
    """Data sets of points, each with three clusters of its own; shape ``(data sets, points, 2)``.

    ``mask`` is false for points that are only there to make data sets equally long.
    """
    num_sets, num_points = x.shape[:2]
    settings = {name: x.new_tensor(value) for name, value in PRIOR.items()}
    prior = NormalGamma(**settings).expand([NUM_FEATURES])
    with pyro.plate("data_sets", num_sets, dim=-2):
        with pyro.plate("clusters", NUM_CLUSTERS, dim=-1):
            cluster = pyro.sample("cluster", prior.to_event(1))
        mean, precision = cluster.unbind(-1)
        with (
            pyro.plate("points", num_points, dim=-1),
            poutine.mask(mask=True if mask is None else mask),
        ):
            assignment = pyro.sample(
                "assignment", dist.Categorical(logits=x.new_zeros(NUM_CLUSTERS))
            )
            # a product with one-hot vectors also serves where assignments are enumerated
            assigned = one_hot(assignment).to(x)
            likelihood = dist.Normal(assigned @ mean, assigned @ precision.rsqrt())
            pyro.sample("x", likelihood.to_event(1), obs=x)


def one_hot(assignment):
    return F.one_hot(assignment, NUM_CLUSTERS)


class Proposals(nn.Module):
    """Encoder and kernels with neural sufficient statistics."""

    def __init__(self, hidden_features=32):
        super().__init__()
        self.head = NormalGammaHead(**PRIOR)
        self.first_moments = SoftMoments(NUM_FEATURES, NUM_CLUSTERS, NUM_FEATURES)
        self.moments = SoftMoments(NUM_FEATURES + NUM_CLUSTERS, NUM_CLUSTERS, NUM_FEATURES)
        # how well a point fits to a cluster: a hidden layer on every pair of them
        self.fit = PairLogits(NUM_FEATURES, 2 * NUM_FEATURES, hidden_features)

    def encode(self, x, mask=None):
        with pyro.plate("data_sets", len(x), dim=-2):
            with pyro.plate("clusters", NUM_CLUSTERS, dim=-1):
                statistics = self.first_moments(x, mask)
                cluster = pyro.sample("cluster", NormalGamma(*self.head(statistics)).to_event(1))
        self.update_assignments({"cluster": cluster}, x, mask)

    def update_clusters(self, latents, x, mask=None):
        with pyro.plate("data_sets", len(x), dim=-2):
            with pyro.plate("clusters", NUM_CLUSTERS, dim=-1):
                pyro.sample(
                    "cluster", NormalGamma(*self.cluster_parameters(latents, x, mask)).to_event(1)
                )

    def cluster_parameters(self, latents, x, mask=None):
        assigned = one_hot(latents["assignment"]).to(x)
        points = x.expand(*assigned.shape[:-1], NUM_FEATURES)
        return self.head(self.moments(torch.cat([points, assigned], -1), mask))

    def update_assignments(self, latents, x, mask=None):
        with pyro.plate("data_sets", len(x), dim=-2), pyro.plate("points", x.shape[1], dim=-1):
            pyro.sample("assignment", dist.Categorical(logits=self.assignment_logits(latents, x)))

    def assignment_logits(self, latents, x):
        return self.fit(x, latents["cluster"].flatten(-2))


class ExactProposals(Proposals):
    """The conditionals of the mixture, which Gibbs sampling draws from."""

    def cluster_parameters(self, latents, x, mask=None):
        assigned = one_hot(latents["assignment"]).to(x)
        if mask is not None:
            assigned = assigned * mask.unsqueeze(-1)
        assigned = assigned.transpose(-1, -2)
        first, second = assigned @ x, assigned @ x.square()
        number = assigned.sum(-1, keepdim=True).expand(first.shape)
        return self.head(torch.stack([number, first, second], -1))

    def assignment_logits(self, latents, x):
        mean, precision = latents["cluster"].unsqueeze(-4).unbind(-1)
        log_prob = dist.Normal(mean, precision.rsqrt()).log_prob(x.unsqueeze(-2)).sum(-1)
        return log_prob


@torch.no_grad()
def simulate(num_sets, num_points=60):
    """Data sets from the model itself: points, and the latents they came from."""
    trace = poutine.trace(poutine.uncondition(mixture)).get_trace(
        torch.zeros(num_sets, num_points, NUM_FEATURES)
    )
    latents = {name: trace.nodes[name]["value"] for name in ("cluster", "assignment")}
    return trace.nodes["x"]["value"], latents


def log_joint(x, latents):
    """Log joint density of points and latents, one per data set."""
    trace = poutine.trace(poutine.condition(mixture, latents)).get_trace(x)
    trace.compute_log_prob()
    sites = (trace.nodes[name]["log_prob"] for name in ("cluster", "assignment", "x"))
    return sum(log_prob.sum(-1) for log_prob in sites)


def first_points(sizes, num_points):
    """Mask for data sets that have only so many points: true for these."""
    return torch.arange(num_points) < torch.tensor(sizes)[:, None]
