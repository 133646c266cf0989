"""Train the flow whose weights the tutorial loads; about a minute on one core.

python train.py
"""

from __future__ import annotations

import argparse
import time

import torch

from pyro_ext.datasets import TwoSpirals
from pyro_ext.distributions import ScoreFlow
from pyro_ext.distributions.diffusion import VPSDE, OdeSettings
from pyro_ext.training import fit_density

__all__ = ["build", "spirals"]


def spirals() -> TwoSpirals:
    """
    Make the density to learn.

    :returns: a distribution over the plane.
    """
    return TwoSpirals()


def build() -> ScoreFlow:
    """
    Make the flow of the tutorial, untrained.

    :returns: a flow for two features.
    """
    return ScoreFlow(
        2,
        hidden_features=64,
        frequencies=64,
        sde=VPSDE(start=1e-4),
        ode=OdeSettings(rtol=1e-4, atol=1e-4),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", default="weights/spirals.pt")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    flow, start = build(), time.process_time()
    fit_density(
        flow,
        spirals().sample((200_000,)),
        loss=ScoreFlow.training_loss,
        num_steps=arguments.steps,
        batch_size=256,
        learning_rate=1e-2,
        ema_decay=0.998,
        progress=False,
    )
    torch.save(flow.state_dict(), arguments.out)
    test = spirals().sample((2000,))
    with torch.no_grad():
        gap = (spirals().log_prob(test) - flow.eval()().log_prob(test)).mean()
    print(f"{time.process_time() - start:.0f} s, {float(gap):.3f} nats from the truth")


if __name__ == "__main__":
    main()
