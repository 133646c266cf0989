"""Reweighted wake-sleep: encoders that have to find all latents of the rings at once."""

import model
import pyro
import pyro.distributions as dist
from torch import nn


class PointNetwork(model.Proposals):
    """The encoder of the sampler, alone: statistics of the points, one by one."""


class Sequence(model.Proposals):
    """An LSTM that reads the points in both directions, and gives the centres.

    Given these, points are proposed as by the sampler.
    """

    def __init__(self, hidden_features=16):
        super().__init__(hidden_features)
        self.reader = nn.LSTM(
            model.NUM_FEATURES, 2 * hidden_features, batch_first=True, bidirectional=True
        )
        num_parameters = 2 * model.NUM_CLUSTERS * model.NUM_FEATURES
        self.to_parameters = nn.Linear(4 * hidden_features, num_parameters)

    def encode(self, x, mask=None):
        _, (last, _) = self.reader(x)
        parameters = self.to_parameters(last.transpose(0, 1).flatten(1))
        loc, scale = model.wide_normal(parameters)
        with pyro.plate("data_sets", len(x), dim=-2):
            with pyro.plate("clusters", model.NUM_CLUSTERS, dim=-1):
                centre = pyro.sample("centre", dist.Normal(loc, scale).to_event(1))
        self.update_points({"centre": centre}, x, mask)


ENCODERS = {"points": PointNetwork, "sequence": Sequence}
