"""Train the tracker that ships with this tutorial, and write its weights.

    python tutorials/apg_tracking/train.py --write              # two minutes of one core
    python tutorials/apg_tracking/train.py --warm 5 --steps 2   # only to see that it works

Every step is on new videos of three digits and ten frames, from the images for training. Nobody
says what a digit looks like, or where one is. The encoder, which follows what it has cut out of
the first frames, needs no training to find most digits. So what they look like is learned first,
by a variational autoencoder of the cut-outs, in a hundredth of a second for a step; then model,
encoder and kernels together by amortized population Gibbs. ``--start PATH --warm 0`` goes on.
"""

import argparse
import math
import time
from pathlib import Path

import pyro
import pyro.poutine as poutine
import torch
from metrics import follow
from model import Tracker, stack_where
from proposals import Proposals, cut_out, make_sampler
from pyro.infer import TraceMeanField_ELBO
from videos import load_images, simulate

WEIGHTS = Path(__file__).parent / "weights" / "tracker.pt"
NUM_FRAMES = 10


def build(num_digits=3):
    """Tracker and proposals, not trained."""
    tracker = Tracker(num_digits)
    return tracker, Proposals(tracker)


def load(num_digits=3, path=WEIGHTS):
    """Tracker and proposals that ship with the tutorial; they serve any number of digits."""
    tracker, proposals = build(num_digits)
    state = torch.load(path, weights_only=True)
    tracker.load_state_dict(state["tracker"])
    proposals.load_state_dict(state["proposals"])
    return tracker, proposals


def save(tracker, proposals, path=WEIGHTS):
    path.parent.mkdir(exist_ok=True)
    torch.save({"tracker": tracker.state_dict(), "proposals": proposals.state_dict()}, path)


def optimizer(tracker, proposals):
    """Adam for all, with steps 20 times as long for the few numbers of the kernels."""
    networks = [*tracker.parameters(), *proposals.network.parameters()]
    names = ("log_gain", "log_scale", "log_scale_of_what", "momentum")
    numbers = [getattr(proposals, name) for name in names]
    groups = [{"params": networks, "factor": 1.0}, {"params": numbers, "factor": 20.0}]
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


def set_rate(optim, first, last, progress):
    """Anneal by half a cosine."""
    for group in optim.param_groups:
        rate = last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))
        group["lr"] = group["factor"] * rate


def warm_up(tracker, proposals, images, num_steps, *, num_digits=60, rates=(3e-3, 3e-4)):
    """Learn what digits look like where the encoder puts them, and yield the losses."""
    optim = optimizer(tracker, proposals)
    elbo = TraceMeanField_ELBO()
    for step in range(num_steps):
        set_rate(optim, *rates, step / num_steps)
        if step % 200 == 0:
            seen, others = cut_outs(
                proposals, simulate(images, 200, tracker.num_digits, NUM_FRAMES).frames
            )
        rows = torch.randint(seen.shape[1], (num_digits,))
        batch = seen[:, rows], others[:, rows]
        loss = elbo.differentiable_loss(tracker.cut_outs, proposals.propose_what, *batch)
        optim.zero_grad()
        (loss / num_digits).backward()
        optim.step()
        yield loss.item() / num_digits


@torch.no_grad()
def cut_outs(proposals, frames):
    """What the encoder cuts out, ``(frames, digits of all videos, ...)``."""
    nodes = poutine.trace(proposals.encode).get_trace(frames).nodes
    latents = {name: node["value"] for name, node in nodes.items() if name.startswith("where")}
    where = stack_where(latents, frames.shape[1], proposals.tracker.num_digits)
    return [part.transpose(0, 1).flatten(1, 2) for part in cut_out(frames, where)]


def train(sampler, images, num_steps, *, num_videos=6, num_digits=3, rates=(5e-4, 5e-5)):
    """Train by amortized population Gibbs, and yield what :meth:`APG.diagnostics` says."""
    for step in range(num_steps):
        set_rate(sampler.optim, *rates, step / num_steps)
        sampler.step(simulate(images, num_videos, num_digits, NUM_FRAMES).frames)
        yield sampler.diagnostics()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--warm", type=int, default=3000, help="steps of variational inference")
    parser.add_argument("--steps", type=int, default=60, help="steps of population Gibbs")
    parser.add_argument("--num-sweeps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--start", type=Path, help="weights to start from")
    parser.add_argument("--path", type=Path, default=WEIGHTS)
    parser.add_argument("--write", action="store_true", help="write the weights, now and then")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(args.seed)
    tracker, proposals = build() if args.start is None else load(path=args.start)
    images = load_images()
    started = time.process_time()

    def report(step, message):
        if step % args.every == 0:
            print(f"{step} steps, {time.process_time() - started:.0f} s: {message}", flush=True)
            if args.write:
                save(tracker, proposals, args.path)

    for step, loss in enumerate(warm_up(tracker, proposals, images, args.warm), 1):
        report(step, f"negative evidence bound {loss:.0f}")
    optim = optimizer(tracker, proposals)
    sampler = make_sampler(tracker, proposals, NUM_FRAMES, optim, num_sweeps=args.num_sweeps)
    for step, figures in enumerate(train(sampler, images, args.steps), 1):
        joint = [round(value) for value in figures["log_joint"]]
        ess = figures["ess"]
        where = sum(value for name, value in ess.items() if "where" in name) / NUM_FRAMES
        fractions = f"encoder {ess['encoder']:.2f}, where {where:.2f}, what {ess['what']:.2f}"
        report(step, f"log joint by sweep {joint}; ESS / L of {fractions}")
    if args.write:
        save(tracker, proposals, args.path)
    evaluate(tracker, proposals)


def evaluate(tracker, proposals, num_videos=10, num_sweeps=5):
    """Say how good tracker and proposals are on new videos of images for testing."""
    pyro.set_rng_seed(1000)
    videos = simulate(load_images("test"), num_videos, tracker.num_digits, NUM_FRAMES)
    result = follow(make_sampler(tracker, proposals, NUM_FRAMES), tracker, videos, num_sweeps)
    for name in ("log_joint", "clean_squared_error", "distance", "distance_of_frames"):
        by_sweep = [f"{value:.4g}" for value in getattr(result, name).mean(1)]
        print(f"{name} on {num_videos} test videos, by sweep: {', '.join(by_sweep)}")


if __name__ == "__main__":
    main()
