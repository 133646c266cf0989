"""Train the machine whose weights the tutorial loads; about a minute on one core.

python train.py
"""

from __future__ import annotations

import argparse
import time

import torch

from pyro_ext.datasets import RotatedGrid
from pyro_ext.distributions import AutoregressiveEnergyMachine
from pyro_ext.training import fit_density

__all__ = ["build", "diamond"]


def diamond() -> RotatedGrid:
    """
    Make the density to learn: 225 narrow modes on a grid that is turned by 45 degrees.

    :returns: a distribution over the plane.
    """
    return RotatedGrid()


def build() -> AutoregressiveEnergyMachine:
    """
    Make the machine of the tutorial, untrained.

    :returns: a machine for two features.
    """
    return AutoregressiveEnergyMachine(
        2,
        hidden_features=64,
        energy_hidden_features=64,
        energy_context=32,
        residual_blocks=2,
        num_importance_samples=10,
        num_gradient_samples=3,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", default="diamond.pt")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine, start = build(), time.process_time()
    loss = AutoregressiveEnergyMachine.training_loss
    fit_density(
        machine,
        diamond().sample((200_000,)),
        loss=loss,
        num_steps=arguments.steps,
        learning_rate=3e-3,
        progress=False,
    )
    torch.save(machine.state_dict(), arguments.out)
    print(f"{time.process_time() - start:.0f} s", machine.diagnostics())


if __name__ == "__main__":
    main()
