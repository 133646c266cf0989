"""Train the proposals that ship with this tutorial, and write their weights.

    python tutorials/apg_mixture/train.py                  # a few minutes on one core
    python tutorials/apg_mixture/train.py --num-steps 100  # only to see that it works

Every step is on new data sets from the model itself. At the end the proposals are compared with
the exact conditionals of the mixture.
"""

import argparse
import math
import time
from pathlib import Path

import model
import pyro
import torch
from metrics import block_divergences

from pyro_ext.infer import APG

WEIGHTS = Path(__file__).parent / "weights"


def make_sampler(proposals, optim=None, **settings):
    """Amortized population Gibbs for the mixture, as in the paper unless told otherwise."""
    settings = {"num_particles": 10, "num_sweeps": 5, **settings}
    return APG(
        model.mixture,
        proposals.encode,
        [proposals.update_clusters, proposals.update_assignments],
        optim,
        batch_plate="data_sets",
        local_plates=["points"],
        **settings,
    )


def train(sampler, num_steps=3000, *, num_sets=20, num_points=60, rates=(2e-2, 5e-4), every=500):
    """Train on simulated data, and return what happened every so many steps.

    The rate begins high: the softmax that tells the clusters apart needs weights far from zero,
    and a step of Adam moves a weight by the rate at most.
    """
    optim = sampler.optim
    history = []
    started = time.process_time()
    for step in range(num_steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
        for group in optim.param_groups:
            group["lr"] = rates[1] + (rates[0] - rates[1]) * cosine
        x, _ = model.simulate(num_sets, num_points)
        sampler.step(x)
        if step % every == 0:
            seconds = time.process_time() - started
            history.append({"step": step, "seconds": seconds, **sampler.diagnostics()})
    return history


def load(proposals, seed=0):
    """Give proposals the weights that ship with the tutorial; of seeds 0 and 1."""
    path = WEIGHTS / f"proposals_{seed}.pt"
    proposals.load_state_dict(torch.load(path, weights_only=True))
    return proposals


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(args.seed)
    proposals = model.Proposals()
    optim = torch.optim.Adam(proposals.parameters(), betas=(0.9, 0.99))
    started = time.process_time()
    sampler = make_sampler(proposals, optim)
    for row in train(sampler, args.num_steps):
        print({key: row[key] for key in ("step", "seconds", "ess", "local_ess")}, flush=True)
    seconds = time.process_time() - started
    print(f"{args.num_steps} steps in {seconds:.0f} s of processor time")
    for num_points in (60, 20, 240):
        x, latents = model.simulate(500, num_points)
        of_clusters, of_points = block_divergences(proposals, x, latents)
        print(
            f"{num_points} points: median KL of the clusters {of_clusters.median():.4f}, "
            f"mean KL of an assignment {of_points.mean():.4f}"
        )
    x, latents = model.simulate(100)
    truth = model.log_joint(x, latents).mean()
    for num_sweeps in (1, 5, 31):
        result = sampler.sample(x, num_sweeps=num_sweeps)
        joint = result.history.log_joint[-1].mean() - truth
        ess = {k: round(v[-3:].mean().item(), 4) for k, v in result.history.ess.items()}
        local = {k: round(v[-3:].mean().item(), 4) for k, v in result.history.local_ess.items()}
        print(f"{num_sweeps} sweeps: log joint minus truth {joint:.2f}, ESS / L {ess} {local}")
    if args.write:
        WEIGHTS.mkdir(exist_ok=True)
        torch.save(proposals.state_dict(), WEIGHTS / f"proposals_{args.seed}.pt")


if __name__ == "__main__":
    main()
