"""A mixture of curves whose shape is learned, and the networks that propose its latents."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
import torch.nn.functional as F
from torch import nn

from pyro_ext.nn import NormalHead, PairLogits

NUM_CLUSTERS = 4
NUM_FEATURES = 2
CENTRE_SCALE = 3.5
NOISE = math.sqrt(0.2)  # of points, in each coordinate
RADIUS = 2.0  # of the rings that the data are made of


def one_hot(assignment):
    return F.one_hot(assignment, NUM_CLUSTERS)


def direction(angle):
    """Points on the unit circle: features of an angle without a jump."""
    return torch.stack([angle.cos(), angle.sin()], -1)


class Ring(nn.Module):
    """The decoder that made the data, which training does not see."""

    def forward(self, angle):
        return RADIUS * direction(angle)


class Decoder(nn.Module):
    """A closed curve of any shape: from angles to places relative to the centre of a cluster."""

    def __init__(self, hidden_features=16):
        super().__init__()
        self.curve = nn.Sequential(
            nn.Linear(NUM_FEATURES, hidden_features),
            nn.Sigmoid(),
            nn.Linear(hidden_features, NUM_FEATURES),
        )

    def forward(self, angle):
        return self.curve(direction(angle))


def rings(decoder, x, mask=None):
    """Data sets of points near four curves of one shape; ``(data sets, points, 2)``.

    Each point has a cluster and an angle. ``mask`` is false for points that are only there to make
    data sets equally long.
    """
    num_sets, num_points = x.shape[:2]
    with pyro.plate("data_sets", num_sets, dim=-2):
        with pyro.plate("clusters", NUM_CLUSTERS, dim=-1):
            prior = dist.Normal(x.new_zeros(NUM_FEATURES), CENTRE_SCALE)
            centre = pyro.sample("centre", prior.to_event(1))
        with (
            pyro.plate("points", num_points, dim=-1),
            poutine.mask(mask=True if mask is None else mask),
        ):
            assignment = pyro.sample(
                "assignment", dist.Categorical(logits=x.new_zeros(NUM_CLUSTERS))
            )
            angle = pyro.sample("angle", dist.Uniform(x.new_tensor(-math.pi), math.pi))
            loc = one_hot(assignment).to(x) @ centre + decoder(angle)
            pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)


class Model(nn.Module):
    """The model with its decoder, as one module."""

    def __init__(self, decoder=None):
        super().__init__()
        self.decoder = decoder or Decoder()

    def forward(self, x, mask=None):
        rings(self.decoder, x, mask)


class Proposals(nn.Module):
    """Encoder and kernels with neural sufficient statistics."""

    def __init__(self, hidden_features=16, num_statistics=16):
        super().__init__()
        sizes = (NUM_FEATURES, hidden_features)
        self.gates = _network(*sizes, NUM_CLUSTERS)
        self.statistics = _network(*sizes, num_statistics)
        pooled = NUM_CLUSTERS * num_statistics
        self.first = _network(pooled, 2 * hidden_features, 2 * NUM_CLUSTERS * NUM_FEATURES)
        # where the centre of a cluster is, as its points say, given their angles
        self.head = NormalHead(0.0, CENTRE_SCALE)
        self.votes = _network(NUM_FEATURES, hidden_features, NUM_FEATURES)
        self.log_precision = nn.Parameter(torch.tensor(0.0))
        self.fit = PairLogits(NUM_FEATURES, NUM_FEATURES, hidden_features)
        with torch.no_grad():  # at first a function of where a point is relative to a centre
            self.fit.of_cluster.weight.copy_(-self.fit.of_point.weight)
        self.pull_network = _network(NUM_FEATURES, hidden_features, NUM_FEATURES)

    def encode(self, x, mask=None):
        gates = torch.softmax(self.gates(x), -1)
        if mask is not None:
            gates = gates * mask.unsqueeze(-1)
        sums = gates.transpose(-1, -2) @ self.statistics(x)
        means = sums / (gates.sum(-2).unsqueeze(-1) + 1e-6)
        loc, scale = wide_normal(self.first(means.flatten(-2)))
        with pyro.plate("data_sets", len(x), dim=-2):
            with pyro.plate("clusters", NUM_CLUSTERS, dim=-1):
                centre = pyro.sample("centre", dist.Normal(loc, scale).to_event(1))
        self.update_points({"centre": centre}, x, mask)

    def update_centres(self, latents, x, mask=None):
        with pyro.plate("data_sets", len(x), dim=-2):
            with pyro.plate("clusters", NUM_CLUSTERS, dim=-1):
                proposal = dist.Normal(*self.centre_parameters(latents, x, mask))
                pyro.sample("centre", proposal.to_event(1))

    def centre_parameters(self, latents, x, mask=None):
        votes, precision = self.votes_for_centre(x, latents["angle"])
        assigned = one_hot(latents["assignment"]).to(x)
        if mask is not None:
            assigned = assigned * mask.unsqueeze(-1)
        sums = precision * (assigned.transpose(-1, -2) @ votes)
        number = precision * assigned.sum(-2).unsqueeze(-1)
        return self.head(torch.stack([sums, number.expand(sums.shape)], -1))

    def votes_for_centre(self, x, angle):
        """Where each point says that its centre is, and with what precision."""
        return x - self.votes(direction(angle)), self.log_precision.exp()

    def update_points(self, latents, x, mask=None):
        centre = latents["centre"]
        with pyro.plate("data_sets", len(x), dim=-2), pyro.plate("points", x.shape[1], dim=-1):
            logits = self.assignment_logits(x, centre)
            assignment = pyro.sample("assignment", dist.Categorical(logits=logits))
            relative = x - one_hot(assignment).to(x) @ centre
            # natural parameters of a von Mises: a pull towards an angle, which is uniform without
            across, up = self.pull(relative).unbind(-1)
            strength = (across.square() + up.square() + 1e-6).sqrt()
            pyro.sample("angle", dist.VonMises(torch.atan2(up, across), strength))

    def assignment_logits(self, x, centre):
        return self.fit(x, centre)

    def pull(self, relative):
        return self.pull_network(relative)


class ExactProposals(Proposals):
    """The conditionals of clusters that are rings, and the encoder as it is."""

    def votes_for_centre(self, x, angle):
        return x - RADIUS * direction(angle), x.new_tensor(NOISE**-2)

    def assignment_logits(self, x, centre):
        distance = torch.cdist(x.expand(*centre.shape[:-2], *x.shape[-2:]), centre)
        strength = distance * RADIUS / NOISE**2
        # the angle is integrated out, which gives a Bessel function; here scaled by exp(-strength)
        return torch.special.i0e(strength).log() - 0.5 * ((distance - RADIUS) / NOISE).square()

    def pull(self, relative):
        return relative * (RADIUS / NOISE**2)


def wide_normal(parameters):
    """Location and scale of all centres, those of the prior where the parameters are zero."""
    parameters = parameters.unflatten(-1, (NUM_CLUSTERS, NUM_FEATURES, 2))
    return CENTRE_SCALE * parameters[..., 0], CENTRE_SCALE * parameters[..., 1].clamp(-5, 3).exp()


def _network(in_features, hidden_features, out_features):
    return nn.Sequential(
        nn.Linear(in_features, hidden_features),
        nn.Sigmoid(),
        nn.Linear(hidden_features, out_features),
    )


@torch.no_grad()
def simulate(num_sets, num_points=200):
    """Data sets of rings: points, and the latents they came from."""
    trace = poutine.trace(poutine.uncondition(rings)).get_trace(
        Ring(), torch.zeros(num_sets, num_points, NUM_FEATURES)
    )
    latents = {name: trace.nodes[name]["value"] for name in ("centre", "assignment", "angle")}
    return trace.nodes["x"]["value"], latents


def log_joint(x, latents, decoder=None):
    """Log joint density of points and latents, one per data set."""
    trace = poutine.trace(poutine.condition(rings, latents)).get_trace(decoder or Ring(), x)
    trace.compute_log_prob()
    sites = (trace.nodes[name]["log_prob"] for name in ("centre", "assignment", "angle", "x"))
    return sum(log_prob.sum(-1) for log_prob in sites)
