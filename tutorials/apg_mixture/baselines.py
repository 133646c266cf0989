"""Reweighted wake-sleep: encoders that have to find all latents of a mixture at once.

    python tutorials/apg_mixture/baselines.py --write   # train both and write their weights

They are trained by the same engine with one sweep, which is reweighted wake-sleep (Bornschein and
Bengio 2015; Wu et al. 2020, section 5.1).
"""

import argparse
import time

import model
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
import train
from torch import nn

from pyro_ext.distributions import NormalGamma
from pyro_ext.infer import APG


class PointNetwork(model.Proposals):
    """The encoder of the sampler, alone: statistics of the points, one by one."""


class Sequence(nn.Module):
    """An LSTM that reads the points in both directions.

    Its last states give the clusters, its states at a point and the clusters the assignment.
    """

    def __init__(self, hidden_features=32):
        super().__init__()
        self.reader = nn.LSTM(
            model.NUM_FEATURES, hidden_features, batch_first=True, bidirectional=True
        )
        num_parameters = 4 * model.NUM_CLUSTERS * model.NUM_FEATURES
        self.to_parameters = nn.Linear(2 * hidden_features, num_parameters)
        in_features = 2 * hidden_features + 2 * model.NUM_CLUSTERS * model.NUM_FEATURES
        self.to_logits = nn.Sequential(
            nn.Linear(in_features, hidden_features),
            nn.Tanh(),
            nn.Linear(hidden_features, model.NUM_CLUSTERS),
        )

    def encode(self, x):
        states, (last, _) = self.reader(x)
        parameters = self.to_parameters(last.transpose(0, 1).flatten(1))
        parameters = parameters.reshape(len(x), model.NUM_CLUSTERS, model.NUM_FEATURES, 4)
        loc, nu, alpha, beta = parameters.unbind(-1)
        positive = [0.1 + F.softplus(nu), 1 + F.softplus(alpha), 0.1 + F.softplus(beta)]
        with pyro.plate("data_sets", len(x), dim=-2):
            with pyro.plate("clusters", model.NUM_CLUSTERS, dim=-1):
                cluster = pyro.sample("cluster", NormalGamma(loc, *positive).to_event(1))
            # with precisions as logarithms, which vary less
            mean, precision = cluster.unbind(-1)
            known = torch.cat([mean, precision.log()], -1).flatten(-2).unsqueeze(-2)
            shape = (*known.shape[:-2], x.shape[1], -1)
            features = torch.cat([states.expand(shape), known.expand(shape)], -1)
            with pyro.plate("points", x.shape[1], dim=-1):
                logits = self.to_logits(features)
                pyro.sample("assignment", dist.Categorical(logits=logits))


ENCODERS = {"points": PointNetwork, "sequence": Sequence}


def make_sampler(encoder, optim=None, num_particles=10):
    """Reweighted wake-sleep: a first sweep, and no other."""
    return APG(
        model.mixture,
        encoder.encode,
        [],
        optim,
        num_particles=num_particles,
        num_sweeps=1,
        batch_plate="data_sets",
    )


def load(name, seed=0):
    """An encoder with the weights that ship with the tutorial; of seeds 0 and 1."""
    encoder = ENCODERS[name]()
    path = train.WEIGHTS / f"wake_sleep_{name}_{seed}.pt"
    encoder.load_state_dict(torch.load(path, weights_only=True))
    return encoder


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=[], help=", ".join(ENCODERS))
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.names or ENCODERS:
        pyro.set_rng_seed(args.seed)
        encoder = ENCODERS[name]()
        optim = torch.optim.Adam(encoder.parameters(), betas=(0.9, 0.99))
        sampler = make_sampler(encoder, optim)
        started = time.process_time()
        train.train(sampler, args.num_steps, rates=(5e-3, 1e-4))
        seconds = time.process_time() - started
        x, latents = model.simulate(200)
        particles = next(sampler.sweeps(x))
        gap = (particles.log_joint - model.log_joint(x, latents)).mean()
        ess = sampler.sample(x).history.ess["encoder"].mean()
        print(
            f"{name}: log joint minus truth {gap:.1f}, ESS / L {ess:.3f}, "
            f"{seconds:.0f} s of processor time",
            flush=True,
        )
        if args.write:
            torch.save(encoder.state_dict(), train.WEIGHTS / f"wake_sleep_{name}_{args.seed}.pt")


if __name__ == "__main__":
    main()
