"""Train model and proposals that ship with this tutorial, and write their weights.

    python tutorials/apg_rings/train.py                       # minutes on one core
    python tutorials/apg_rings/train.py --num-steps 20        # only to see that it works
    python tutorials/apg_rings/train.py --encoder points      # wake-sleep: an encoder alone
    python tutorials/apg_rings/train.py --encoder sequence

The decoder of the model learns the shape of the clusters while the proposals learn to find them:
all there is are points, new ones at every step.
"""

import argparse
import math
import time
from pathlib import Path

import baselines
import model
import pyro
import torch
from torch import nn

from pyro_ext.infer import APG

WEIGHTS = Path(__file__).parent / "weights"
SAMPLER = "blocks"


def make_sampler(rings, proposals, optim=None, **settings):
    """Amortized population Gibbs for rings.

    The model learns from the last sweep only: from particles of the encoder, which are far from
    the posterior, it would learn a curve that is wide enough to explain these.
    """
    settings = {"num_particles": 8, "num_sweeps": 4, "model_sweeps": 1, **settings}
    kernels = [proposals.update_centres, proposals.update_points]
    if settings["num_sweeps"] == 1:
        kernels = []  # reweighted wake-sleep
    return APG(
        rings,
        proposals.encode,
        kernels,
        optim,
        batch_plate="data_sets",
        local_plates=["points"],
        **settings,
    )


def make_optimizer(parts):
    """Proposals and model, with rates of their own."""
    groups = [{"params": list(parts[name].parameters())} for name in ("proposals", "rings")]
    return torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.99))


def train(
    sampler, num_steps, *, rates=(2e-2, 3e-3), num_sets=8, num_points=60, warm_up=100, every=100
):
    """Train on simulated data, and say what happened every so many steps.

    At first only proposals learn, and clusters are points: they learn to find clusters that are
    near. Then the model learns, too, at a lower rate, so that proposals can follow.
    """
    started = time.process_time()
    for step in range(num_steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
        of_proposals, of_model = sampler.optim.param_groups
        of_proposals["lr"] = 5e-4 + rates[0] * cosine
        of_model["lr"] = rates[1] * cosine if step >= warm_up else 0.0
        x, _ = model.simulate(num_sets, num_points)
        sampler.step(x)
        if step % every == 0 or step == num_steps - 1:
            seconds = time.process_time() - started
            yield {"step": step, "seconds": seconds, **sampler.diagnostics()}


def build(name=SAMPLER):
    """Model and proposals, not trained; by "blocks", or the name of an encoder alone."""
    make = model.Proposals if name == SAMPLER else baselines.ENCODERS[name]
    return nn.ModuleDict({"rings": model.Model(), "proposals": make()})


def load(name=SAMPLER, seed=0):
    """Model and proposals that ship with the tutorial."""
    parts = build(name)
    parts.load_state_dict(torch.load(WEIGHTS / f"{name}_{seed}.pt", weights_only=True))
    return parts


@torch.no_grad()
def shape_error(decoder):
    """How far the learned curve is from a ring: mean radius, and the largest deviation from it."""
    angle = torch.arange(360) * (2 * math.pi / 360)
    curve = decoder(angle)
    radius = (curve - curve.mean(0)).norm(dim=-1)
    return radius.mean().item(), (radius - radius.mean()).abs().max().item()


def report(parts, num_sweeps=(1, 4, 10, 20), num_sets=20):
    """Print how the sampler does on data sets of several sizes."""
    radius, deviation = shape_error(parts["rings"].decoder)
    print(f"radius {radius:.2f} instead of {model.RADIUS}, at most {deviation:.2f} off")
    for num_points in (60, 200):
        x, latents = model.simulate(num_sets, num_points)
        truth = model.log_joint(x, latents).mean()
        sampler = make_sampler(parts["rings"], parts["proposals"])
        for number in num_sweeps:
            result = sampler.sample(x, num_sweeps=number)
            gap = result.history.log_joint[-1].mean() - truth
            ess = {k: round(v[-3:].mean().item(), 3) for k, v in result.history.ess.items()}
            print(f"N = {num_points}, K = {number}: log joint minus truth {gap:.1f}, {ess}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-steps", type=int, default=1200)
    parser.add_argument("--encoder", choices=sorted(baselines.ENCODERS), default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(args.seed)
    name = args.encoder or SAMPLER
    parts = build(name)
    rings, proposals = parts["rings"], parts["proposals"]
    optim = make_optimizer(parts)
    # then with more sweeps, so that the model learns from particles that have arrived
    stages = [(1, args.num_steps, 100)] if args.encoder else [(4, args.num_steps, 100)]
    if not args.encoder:
        stages.append((12, args.num_steps // 4, 0))
    started = time.process_time()
    for num_sweeps, num_steps, warm_up in stages:
        sampler = make_sampler(rings, proposals, optim, num_sweeps=num_sweeps)
        rates = (2e-2, 3e-3) if warm_up else (5e-3, 3e-3)
        for row in train(sampler, num_steps, rates=rates, warm_up=warm_up):
            ess = {name: round(value, 3) for name, value in row["ess"].items()}
            joint = [round(value) for value in row["log_joint"]]
            shape = [round(value, 2) for value in shape_error(rings.decoder)]
            print(row["step"], round(row["seconds"]), joint, ess, shape, flush=True)
    seconds = time.process_time() - started
    print(f"trained in {seconds:.0f} s of processor time")
    if args.write:
        WEIGHTS.mkdir(exist_ok=True)
        torch.save(parts.state_dict(), WEIGHTS / f"{name}_{args.seed}.pt")
    report(parts, (1,) if args.encoder else (1, 4, 10, 20))


if __name__ == "__main__":
    main()
