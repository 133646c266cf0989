"""Score flows of densities in the plane that are known: gaps to the truth, and pictures."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._diffusion import (
    BATCH,
    DENSITIES,
    NUM_TEST,
    NUM_TRAIN,
    PACKAGES,
    kept,
    output_path,
    spent,
    standard_error,
    trained,
)
from benchmarks._report import threads_in_words, write_table
from pyro_ext.distributions import ScoreFlow
from pyro_ext.distributions.diffusion import VPSDE

FIGURE = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "docs", "images", "diffusion.png"
)
STEPS = {"grid": 12_000, "checkerboard": 6000, "spirals": 6000, "rings": 6000}
# at which fields are shown, in units of the scale of the data
NOISE = (0.02, 0.15, 1.0)


def plane_flow(hidden: int) -> ScoreFlow:
    return ScoreFlow(2, hidden_features=hidden, frequencies=128, sde=VPSDE(start=1e-4))


def plane_run(density: str, hidden: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    truth = DENSITIES[density]()
    data, test = truth.sample((NUM_TRAIN,)), truth.sample((NUM_TEST,))
    flow = plane_flow(hidden)
    _, seconds = spent(lambda: trained(data, steps, flow, learning_rate=1e-2))
    torch.save(flow.state_dict(), output_path(f"{density}_{hidden}_{steps}.pt"))
    with torch.no_grad():
        found = flow().density(test)
        bound = flow().elbo(test, 50)
    expected = truth.log_prob(test)
    gap = expected - found.log_prob
    return {
        "seconds": seconds,
        "gap": float(gap.mean()),
        "error": standard_error(gap),
        "bound": float((expected - bound.value).mean()),
        "bound error": standard_error(expected - bound.value),
        "evaluations": float(found.num_evaluations.double().mean()),
        "parameters": sum(p.numel() for p in flow.parameters()),
    }


def plane(args: argparse.Namespace) -> None:
    rows = []
    densities = args.densities or list(DENSITIES)
    for density in densities:
        steps = args.steps or STEPS[density]
        run = partial(plane_run, density, args.hidden, steps)
        result = kept(f"plane_{density}_{args.hidden}_{steps}", run)
        rows.append(
            {
                "density": density,
                "parameters": f"{result['parameters']:,}",
                "steps": f"{steps:,}",
                "CPU s": f"{result['seconds']:.0f}",
                "gap of log_prob": f"{result['gap']:.3f}",
                "standard error": f"{result['error']:.3f}",
                "gap of elbo": f"{result['bound']:.3f}",
                "its standard error": f"{result['bound error']:.3f}",
                "evaluations": f"{result['evaluations']:.0f}",
            }
        )
    how = f"{threads_in_words(1)}, {args.hidden} hidden units, batches of {BATCH}"
    write_table("diffusion_plane", rows, how, PACKAGES)
    draw({density: args.steps or STEPS[density] for density in densities}, args.hidden)


# -- pictures -------------------------------------------------------------------------------------


def draw(steps: Mapping[str, int], hidden: int) -> None:
    """A row for each density: the field at three times, the flow, draws, density."""
    from matplotlib.figure import Figure

    titles = [f"score, noise {value:g}" for value in NOISE]
    titles += ["flow of the plane", "draws", "log-density"]
    figure = Figure(figsize=(11.0, 1.95 * len(steps)), layout="constrained")
    axes = figure.subplots(len(steps), len(titles), squeeze=False)
    for row, (density, number) in zip(axes, steps.items(), strict=True):
        torch.manual_seed(0)
        flow = plane_flow(hidden)
        state = torch.load(output_path(f"{density}_{hidden}_{number}.pt"), weights_only=True)
        flow.load_state_dict(state)
        flow.eval()
        points = DENSITIES[density]().sample((2000,))
        half = 1.15 * float(points.abs().quantile(0.999))
        for ax, noise in zip(row, NOISE, strict=False):
            draw_field(ax, flow, points, noise, half)
        draw_flow(row[3], flow, half)
        with torch.no_grad():
            draws = flow().sample((4000,), rtol=1e-3, atol=1e-3)
        row[4].plot(*draws.T.numpy(), ".", color="#000000", markersize=0.8, alpha=0.5)
        draw_density(row[5], flow, half)
        for ax in row:
            ax.set(xlim=(-half, half), ylim=(-half, half), xticks=[], yticks=[], aspect="equal")
        row[0].set_ylabel(density.capitalize())
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=9)
    os.makedirs(os.path.dirname(FIGURE), exist_ok=True)
    figure.savefig(FIGURE, dpi=140, pil_kwargs={"optimize": True})


def time_of_noise(flow: ScoreFlow, noise: float) -> Tensor:
    """When there is as much noise beside standardised data of scale 1, by bisection."""
    low, high = torch.zeros(()), torch.ones(())
    for _ in range(40):
        t = flow.sde.time(0.5 * (low + high))
        is_early = bool(flow.sde.std(t) / flow.sde.mean_factor(t) < noise)
        low, high = (0.5 * (low + high), high) if is_early else (low, 0.5 * (low + high))
    return flow.sde.time(low)


def draw_field(ax: Any, flow: ScoreFlow, points: Tensor, noise: float, half: float) -> None:
    """Noisy data and the score there, in the frame of the data."""
    t = time_of_noise(flow, noise)
    noisy = points + noise * flow.scale * torch.randn_like(points)
    side = torch.linspace(-half, half, 21)[1::2]
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        arrows = flow().score(flow.sde.mean_factor(t) * grid, float(t))
    lengths = arrows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    arrows = arrows / lengths.sqrt() / lengths.max().sqrt()
    ax.plot(*noisy.T.numpy(), ".", color="#E69F00", markersize=0.8, alpha=0.5)
    ax.quiver(*grid.T.numpy(), *arrows.T.numpy(), color="#0072B2", scale=14, width=0.006)


def draw_flow(ax: Any, flow: ScoreFlow, half: float) -> None:
    """What the probability flow makes of circles and rays of the noise."""
    angles = torch.linspace(0, 2 * torch.pi, 801)
    circle = torch.stack([angles.cos(), angles.sin()], -1)
    radii = torch.linspace(0, 2.5, 401).unsqueeze(-1)
    with torch.no_grad():
        for radius in (0.5, 1.0, 1.5, 2.0, 2.5):
            x = flow().to_data(radius * circle, solver="rk4", num_steps=20)
            ax.plot(*x.T.numpy(), color="#0072B2", linewidth=0.5)
        for angle in torch.arange(12) * torch.pi / 6:
            ray = radii * torch.stack([angle.cos(), angle.sin()])
            x = flow().to_data(ray, solver="rk4", num_steps=20)
            ax.plot(*x.T.numpy(), color="#D55E00", linewidth=0.5)


def draw_density(ax: Any, flow: ScoreFlow, half: float, cells: int = 80) -> None:
    middles = (torch.arange(cells) + 0.5) * (2 * half / cells) - half
    grid = torch.cartesian_prod(middles, middles)
    with torch.no_grad():
        values = flow().log_prob(grid, solver="rk4", num_steps=15).reshape(cells, cells)
    highest = float(values.flatten().quantile(0.999))
    extent = (-half, half, -half, half)
    ax.imshow(
        values.T, origin="lower", extent=extent, vmin=highest - 8, vmax=highest, cmap="magma"
    )
