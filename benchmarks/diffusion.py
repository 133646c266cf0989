"""Score flows: cost of densities, of training and of draws, and densities that are known.

Claims: a training step costs at most a twentieth of that of a continuous flow trained by its
likelihood, for a density at least as good in the same time; a hard value does not slow the others
of its batch.

    python benchmarks/diffusion.py cost      # of log_prob, against dimension and tolerance
    python benchmarks/diffusion.py stalling  # one value far out in a batch
    python benchmarks/diffusion.py ffjord    # training beside zuko's continuous flow
    python benchmarks/diffusion.py roughness # what fine errors of the score cost
    python benchmarks/diffusion.py draws     # distance to the truth against evaluations
    python benchmarks/diffusion.py plane     # four densities in the plane, beside the truth
    python benchmarks/diffusion.py ablation  # digits: weighting, importance sampling, dequantising
    python benchmarks/diffusion.py images    # patches and digits, beside spline flows and AEM

Times are processor time with one thread, which other programs on the machine spoil least. Gaps
are means of true minus learned log-density over test points, in nats. Finished runs are kept in
``benchmarks/output``.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, MixtureSameFamily, Normal

from benchmarks._diffusion import (
    BATCH,
    DENSITIES,
    NUM_TEST,
    NUM_TRAIN,
    PACKAGES,
    kept,
    spent,
    standard_error,
    trained,
)
from benchmarks._diffusion_images import ablation, images
from benchmarks._diffusion_plane import plane
from benchmarks._report import threads_in_words, write_table
from pyro_ext.distributions import ScoreFlow
from pyro_ext.distributions.diffusion import VPSDE


def modes(dimension: int) -> Distribution:
    """Every number independently from two narrow modes."""
    weights = Categorical(torch.tensor([0.3, 0.7]).expand(dimension, 2))
    components = Normal(torch.tensor([-1.0, 1.0]).expand(dimension, 2), 0.2)
    return torch.distributions.Independent(MixtureSameFamily(weights, components), 1)


# -- cost of densities ----------------------------------------------------------------------------


def cost(args: argparse.Namespace) -> None:
    rows = []
    for dimension in (2, 8, 32, 64):
        torch.manual_seed(0)
        truth = modes(dimension)
        flow = ScoreFlow(dimension, hidden_features=64, sde=VPSDE(start=1e-4))
        trained(truth.sample((20_000,)), args.steps or 1000, flow)
        x = truth.sample((128,))
        with torch.no_grad():
            # single precision would not do for this tolerance
            exact = {"rtol": 1e-6, "atol": 1e-6, "trace": "exact"}
            reference = flow.double()().log_prob(x.double(), **exact).float()
            flow.float()
            gap = float((truth.log_prob(x) - reference).mean())
            for trace in ("exact", "hutchinson"):
                for tolerance in (1e-3, 1e-5):
                    settings = {"rtol": tolerance, "atol": tolerance, "trace": trace}
                    found, seconds = spent(partial(flow().density, x, **settings))
                    error = (found.log_prob - reference).abs()
                    rows.append(
                        {
                            "dimension": f"{dimension}",
                            "gap": f"{gap:.3f}",
                            "trace": trace,
                            "tolerance": f"{tolerance:g}",
                            "evaluations": f"{float(found.num_evaluations.double().mean()):.0f}",
                            "at most": f"{int(found.num_evaluations.max())}",
                            "CPU ms per value": f"{1e3 * seconds / len(x):.2f}",
                            "mean error": f"{float(error.mean()):.1e}",
                        }
                    )
    write_table("diffusion_cost", rows, f"{threads_in_words(1)}, 128 values", PACKAGES)


def stalling(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    truth = modes(2)
    flow = ScoreFlow(2, hidden_features=64, frequencies=32, sde=VPSDE(start=1e-4))
    trained(truth.sample((20_000,)), args.steps or 1000, flow)
    x = truth.sample((1000,))
    hard = torch.cat([x, torch.tensor([[60.0, -60.0]])])
    rows = []
    with torch.no_grad():
        exact = flow.double()().log_prob(x.double(), rtol=1e-7, atol=1e-7).float()
        flow.float()
        for solver in ("rowwise", "dopri5"):
            for name, values in (("1,000 values", x), ("and one far out", hard)):
                found, seconds = spent(lambda v=values, s=solver: flow().density(v, solver=s))
                evaluations = found.num_evaluations[: len(x)].double()
                error = (found.log_prob[: len(x)] - exact).abs().max()
                rows.append(
                    {
                        "solver": solver,
                        "batch": name,
                        "evaluations per ordinary value": f"{float(evaluations.mean()):.0f}",
                        "of the hardest": f"{int(found.num_evaluations.max())}",
                        "CPU s": f"{seconds:.2f}",
                        "largest error of ordinary values": f"{float(error):.1e}",
                    }
                )
    write_table("diffusion_stalling", rows, f"{threads_in_words(1)}, tolerance 1e-5", PACKAGES)


# -- beside a continuous flow ---------------------------------------------------------------------


def continuous_flow(features: int, hidden: int) -> nn.Module:
    """Zuko's, with what its import does to the validation of arguments undone."""
    before = Distribution._validate_args
    import zuko

    Distribution.set_default_validate_args(before)
    return zuko.flows.CNF(features, hidden_features=(hidden,) * 3, activation=nn.SiLU)


def ffjord(args: argparse.Namespace) -> None:
    rows = []
    for density in args.densities or ["rings", "spirals"]:

        def run(density: str = density) -> dict[str, Any]:
            torch.manual_seed(0)
            truth = DENSITIES[density]()
            data, test = truth.sample((NUM_TRAIN,)), truth.sample((NUM_TEST,))
            expected = truth.log_prob(test)
            result: dict[str, Any] = {}
            mean, std = data.mean(0), data.std(0)
            peer = continuous_flow(2, args.hidden)
            ours = ScoreFlow(2, hidden_features=args.hidden, sde=VPSDE(start=1e-4))
            ours.initialize(data)

            def standardized(x: Tensor) -> Tensor:
                return (x - mean) / std

            losses: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
                "zuko CNF": (peer, lambda x: -peer().log_prob(standardized(x)).mean()),
                "ScoreFlow": (ours, ours.training_loss),
            }
            for name, (module, loss) in losses.items():
                optimizer = torch.optim.Adam(module.parameters(), lr=4e-3)
                steps, start = 0, time.process_time()
                while (share := (time.process_time() - start) / args.seconds) < 1:
                    for group in optimizer.param_groups:
                        group["lr"] = 4e-3 * 0.5 * (1 + math.cos(math.pi * share))
                    x = data[torch.randint(len(data), (BATCH,))]
                    optimizer.zero_grad()
                    loss(x).backward()
                    nn.utils.clip_grad_norm_(module.parameters(), 5.0)
                    optimizer.step()
                    steps += 1
                seconds = time.process_time() - start
                with torch.no_grad():
                    if module is ours:
                        log_prob = ours().log_prob(test)
                    else:
                        log_prob = peer().log_prob(standardized(test)) - std.log().sum()
                gap = expected - log_prob
                result[name] = {
                    "steps": steps,
                    "ms": 1e3 * seconds / steps,
                    "gap": float(gap.mean()),
                    "error": standard_error(gap),
                    "parameters": sum(p.numel() for p in module.parameters()),
                }
            return result

        result = kept(f"ffjord_{density}_{args.hidden}_{args.seconds:g}", run)
        ratio = result["zuko CNF"]["ms"] / result["ScoreFlow"]["ms"]
        for name, values in result.items():
            rows.append(
                {
                    "density": density,
                    "flow": name,
                    "parameters": f"{values['parameters']:,}",
                    "steps": f"{values['steps']:,}",
                    "CPU ms per step": f"{values['ms']:.1f}",
                    "times cheaper": f"{ratio:.0f}" if name == "ScoreFlow" else "1",
                    "gap": f"{values['gap']:.3f}",
                    "standard error": f"{values['error']:.3f}",
                }
            )
    how = f"{threads_in_words(1)}, {args.seconds:g} s of training each, batches of {BATCH}"
    write_table("diffusion_ffjord", rows, how, [*PACKAGES, "zuko"])


# -- rough errors ---------------------------------------------------------------------------------


class Wavy(nn.Module):
    """The score of standard normal data, and a wave on top of it around one noise level."""

    def __init__(self, sde: VPSDE, noise: float, wave: float) -> None:
        super().__init__()
        self.sde, self.noise, self.wave = sde, noise, wave

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        std = self.sde.std(t)
        size = 0.2 * (-0.5 * (2 * (std / self.noise).log()).square()).exp()
        return -x + (size / std).unsqueeze(-1) * (self.wave * x).cos()


def roughness(args: argparse.Namespace) -> None:
    """What errors of one size cost the density of the flow, and the bound, by their wavelength."""
    rows = []
    sde = VPSDE(start=1e-4)
    for noise in (0.1, 0.4):
        for ratio in (0.1, 0.3, 1.0, 3.0, 10.0):
            torch.manual_seed(0)
            flow = ScoreFlow(2, Wavy(sde, noise, ratio / noise), sde=sde, parametrization="score")
            x = torch.randn(NUM_TEST, 2)
            truth = Normal(0.0, 1.0).log_prob(x).sum(-1)
            with torch.no_grad():
                gap = truth[:500] - flow().log_prob(x[:500])
                bound = truth - flow().elbo(x, 200).value
            rows.append(
                {
                    "noise": f"{noise:g}",
                    "waves, radians over the noise": f"{ratio:g}",
                    "gap of log_prob": f"{float(gap.mean()):.3f}",
                    "standard error": f"{standard_error(gap):.3f}",
                    "gap of elbo": f"{float(bound.mean()):.3f}",
                    "its standard error": f"{standard_error(bound):.3f}",
                }
            )
    write_table("diffusion_roughness", rows, f"{NUM_TEST} values", PACKAGES)


# -- draws ----------------------------------------------------------------------------------------


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Zero for equal distributions (Székely and Rizzo 2013)."""
    between = torch.cdist(x, y).mean()
    n, m = len(x), len(y)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return float(2 * between - within)


def draws(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    truth = modes(2)
    flow = ScoreFlow(2, hidden_features=64, sde=VPSDE(start=1e-4))
    trained(truth.sample((100_000,)), args.steps or 3000, flow)
    exact = truth.sample((4000,))
    rows = []
    methods: list[tuple[str, dict[str, Any], int]] = [
        ("another sample of the truth", {}, 0),
        *(("ode, rk4", {"solver": "rk4", "num_steps": n}, 4 * n) for n in (2, 5, 10, 25)),
        *(("ode, midpoint", {"solver": "midpoint", "num_steps": n}, 2 * n) for n in (5, 10, 25)),
        ("ode, rowwise, 1e-3", {"rtol": 1e-3, "atol": 1e-3}, -1),
        *(("euler_maruyama", {"num_steps": n}, n) for n in (10, 20, 50, 100, 500)),
        *(("predictor_corrector", {"num_steps": n}, 2 * n) for n in (10, 25, 50, 250)),
    ]
    for name, settings, evaluations in methods:
        method = "ode" if name.startswith("ode") else name
        if name.startswith("another"):
            x, seconds = truth.sample((4000,)), 0.0
        else:
            x, seconds = spent(lambda m=method, s=settings: flow().sample((4000,), method=m, **s))
        if evaluations < 0:
            found = flow().density(x[:100], **settings)
            evaluations = int(found.num_evaluations.double().mean())
        rows.append(
            {
                "method": name,
                "evaluations": f"{evaluations}",
                "CPU s": f"{seconds:.2f}",
                "energy distance": f"{energy_distance(x, exact):.5f}",
            }
        )
    write_table("diffusion_draws", rows, f"{threads_in_words(1)}, 4,000 draws", PACKAGES)


PARTS = {
    "cost": cost,
    "stalling": stalling,
    "ffjord": ffjord,
    "roughness": roughness,
    "draws": draws,
    "plane": plane,
    "ablation": ablation,
    "images": images,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=PARTS, nargs="?", help="default: all")
    parser.add_argument("--densities", nargs="+", choices=DENSITIES)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, for ffjord")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, part in PARTS.items():
        if args.part in (None, name):
            part(args)


if __name__ == "__main__":
    main()
