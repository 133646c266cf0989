"""Infer the parameters of a stochastic simulator from its output, and hold the answer to account.

    python tutorials/lotka_volterra/demo.py             # the full run, a few minutes
    python tutorials/lotka_volterra/demo.py --quick     # small numbers, for a first look
    python tutorials/lotka_volterra/demo.py --picture docs/images/lotka_volterra.png

Conditions the Lotka-Volterra simulator on its observed output with ConstrainedHMC, beside
approximate Bayesian computation (ABC) and the exact answer, which this example happens to have.
Prints a table; leaves two pictures and the table as CSV in ``tutorials/lotka_volterra/output``.
``--picture`` also writes the one in the README. The notebook uses the same functions.
"""

import argparse
import csv
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from abc_baselines import ABCSamples, elliptical_slice
from figures import PARAMETER_AXES, marginals_figure, overview_figure, trajectories_figure
from pyro.infer import NUTS
from simulator import (
    NUM_STEPS,
    PARAMETER_NAMES,
    THETA_TRUE,
    ExactPosterior,
    exact_posterior,
    model,
    observed_data,
    parameters_from_normals,
    simulate_from_normals,
    start_on_data,
    tractable_model,
)
from torch import Tensor

from pyro_ext import MCMC, ConstrainedHMC
from pyro_ext.diagnostics import deterministic_values
from pyro_ext.infer.constrained_hmc import Status

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ announces its next version
    import arviz

__all__ = [
    "FULL",
    "QUICK",
    "Results",
    "Sizes",
    "abc",
    "constrained_hmc",
    "format_table",
    "largest_difference",
    "nuts",
    "resimulate",
    "run_all",
    "save_figures",
    "summary_table",
    "write_csv",
]

RADII = (100.0, 10.0)
DESCRIPTIONS = ("prey birth", "predation", "predator death", "predator growth")
UNITS = tuple(parameter.size for parameter in PARAMETER_AXES)
Table = dict[tuple[str, str], Tensor]


class Sizes(NamedTuple):
    """
    How much is drawn.

    ``num_chains``, ``warmup_steps``, ``num_samples``
        of ConstrainedHMC.
    ``abc_chains``, ``abc_warmup``, ``abc_samples``, ``abc_thinning``
        of each ABC run.
    ``nuts_warmup``, ``nuts_samples``
        of NUTS, one chain.
    """

    num_chains: int
    warmup_steps: int
    num_samples: int
    abc_chains: int
    abc_warmup: int
    abc_samples: int
    abc_thinning: int
    nuts_warmup: int
    nuts_samples: int


FULL = Sizes(64, 50, 100, 64, 500, 250, 4, 300, 1000)
QUICK = Sizes(8, 20, 20, 8, 5, 20, 1, 50, 50)


class Results(NamedTuple):
    """
    What the methods returned.

    ``x``
        observed populations, shape ``(50, 2)``.
    ``exact``
        exact posterior.
    ``mcmc``
        finished run of ConstrainedHMC.
    ``resimulated``
        what the unconditioned simulator returns for its draws, shape
        ``(num_chains, num_samples, 50, 2)``.
    ``abc``
        draws of ABC by radius.
    ``nuts``
        draws of NUTS, shape ``(nuts_samples, 4)``.
    """

    x: Tensor
    exact: ExactPosterior
    mcmc: MCMC
    resimulated: Tensor
    abc: dict[float, ABCSamples]
    nuts: Tensor


# ------------------------------------------------------------------------------------ the methods


def constrained_hmc(x: Tensor, sizes: Sizes, *, disable_progbar: bool = False) -> MCMC:
    """
    Condition the simulator on its output. The chains start from draws of the prior.

    :param Tensor x: observed populations, shape ``(50, 2)``.
    :param Sizes sizes: how much to draw.
    :param bool disable_progbar: show neither a progress bar nor the line after the run.
    :returns: the finished run.
    """
    mcmc = MCMC(
        ConstrainedHMC(pyro.condition(model, {"x": x})),
        num_samples=sizes.num_samples,
        warmup_steps=sizes.warmup_steps,
        num_chains=sizes.num_chains,
        disable_progbar=disable_progbar,
    )
    mcmc.run()
    return mcmc


def abc(x: Tensor, theta: Tensor, radius: float, sizes: Sizes) -> ABCSamples:
    """
    Run pseudo-marginal elliptical slice sampling, the best of the ABC baselines.

    :param Tensor x: observed populations, shape ``(50, 2)``.
    :param Tensor theta: parameters to start from, shape ``(num_starts, 4)``; the noise with which
        they reproduce the data is solved for. Draws of the exact posterior spare ABC the search
        for a start, which it would not survive here.
    :param float radius: how far from the data a simulation may be.
    :param Sizes sizes: how much to draw.
    :returns: the draws of every chain.
    """
    return elliptical_slice(
        simulate_from_normals,
        x.flatten(),
        radius,
        start_on_data(theta[: sizes.abc_chains], x),
        num_draws=sizes.abc_samples,
        warmup_steps=sizes.abc_warmup,
        thinning=sizes.abc_thinning,
        transform=parameters_from_normals,
    )


def nuts(x: Tensor, sizes: Sizes, *, disable_progbar: bool = False) -> Tensor:
    """
    Run Pyro's NUTS on the likelihood, which this simulator happens to have.

    :param Tensor x: observed populations, shape ``(50, 2)``.
    :param Sizes sizes: how much to draw.
    :param bool disable_progbar: show no progress bar.
    :returns: draws of the parameters, shape ``(nuts_samples, 4)``.
    """
    mcmc = pyro.infer.MCMC(
        NUTS(tractable_model, full_mass=True),
        num_samples=sizes.nuts_samples,
        warmup_steps=sizes.nuts_warmup,
        disable_progbar=disable_progbar,
    )
    mcmc.run(x)
    return mcmc.get_samples()["theta"]


def resimulate(mcmc: MCMC, simulator: Callable[[], Tensor] = model) -> Tensor:
    """
    Run a simulator that has never seen the data from the inputs that were drawn.

    :param MCMC mcmc: a finished run.
    :param simulator: model with the deterministic site ``x``, not conditioned.
    :returns: its output for each draw, shape ``(num_chains, num_samples, 50, 2)``.
    """
    return deterministic_values(simulator, mcmc.get_samples(group_by_chain=True))["x"]


def largest_difference(simulated: Tensor, x: Tensor) -> float:
    """Return the largest difference between any simulated and the observed population."""
    return (simulated - x).abs().max().item()


def run_all(sizes: Sizes) -> Results:
    """
    Run every method, and say what is done.

    :param Sizes sizes: how much to draw.
    :returns: what the methods returned.
    """
    x = observed_data()
    print(
        f"Data: prey and predators of a simulated Lotka-Volterra system, {x.numel()} numbers from "
        f"{NUM_STEPS} steps.\nUnknown: 4 parameters and the {x.numel()} normal inputs that drove "
        "the simulation.\n"
    )
    print(
        f"ConstrainedHMC: {sizes.num_chains} chains from prior draws, "
        f"{sizes.warmup_steps} + {sizes.num_samples} draws each, no tolerance.\n"
        "  (The bar starts when every chain has found inputs that reproduce the data.)"
    )
    with _timed():
        mcmc = constrained_hmc(x, sizes)
        simulated = resimulate(mcmc)
    starts = mcmc.get_samples(group_by_chain=True)["theta"][:, -1]
    approximate = {}
    for radius in RADII:
        print(
            f"ABC: simulations within {radius:g} of the data; {sizes.abc_chains} chains that get "
            "draws of ConstrainedHMC to start from."
        )
        with _timed():
            approximate[radius] = abc(x, starts, radius, sizes)
    print("NUTS: on the likelihood, which this simulator happens to have.")
    with _timed():
        reference = nuts(x, sizes)
    print("Exact posterior by quadrature.")
    with _timed():
        exact = exact_posterior(x)
    return Results(x, exact, mcmc, simulated, approximate, reference)


@contextmanager
def _timed() -> Iterator[None]:
    start = time.perf_counter()
    sys.stdout.flush()
    yield
    print(f"  done in {time.perf_counter() - start:.0f} s\n", flush=True)


# -------------------------------------------------------------------------------------- the table


def summary_table(results: Results) -> Table:
    """
    Summarise every method, parameter by parameter.

    :param Results results: what :func:`run_all` returned.
    :returns: for each method and quantity a tensor of shape ``(4,)``.
    """
    theta = results.mcmc.get_samples(group_by_chain=True)["theta"]
    ours = "ConstrainedHMC"
    table: Table = {
        ("truth", ""): torch.tensor(THETA_TRUE, dtype=theta.dtype),
        ("exact posterior", "mean"): results.exact.mean,
        ("exact posterior", "sd"): results.exact.sd,
        **_moments(ours, theta),
    }
    for level in (0.025, 0.5, 0.975):
        table[ours, f"{100 * level:g}%"] = theta.flatten(0, 1).quantile(level, dim=0)
    table[ours, "bulk ESS"] = _diagnostic(arviz.ess, theta, method="bulk")
    table[ours, "tail ESS"] = _diagnostic(arviz.ess, theta, method="tail")
    table[ours, "r-hat"] = _diagnostic(arviz.rhat, theta)
    table |= _moments("NUTS", results.nuts.unsqueeze(0))
    for radius in sorted(results.abc):
        name = f"ABC, radius {radius:g}"
        draws = results.abc[radius].theta
        table |= _moments(name, draws)
        table[name, "r-hat"] = _diagnostic(arviz.rhat, draws)
    return table


def _moments(name: str, theta: Tensor) -> Table:
    flat = theta.flatten(0, 1)
    return {(name, "mean"): flat.mean(0), (name, "sd"): flat.std(0)}


def _diagnostic(function: Callable[..., float], theta: Tensor, **options: str) -> Tensor:
    values = [float(function(theta[..., i].numpy(), **options)) for i in range(theta.shape[-1])]
    return torch.tensor(values, dtype=theta.dtype)


def format_table(table: Mapping[tuple[str, str], Tensor]) -> str:
    """
    Write a table for a terminal 80 characters wide: a row per quantity, a column per parameter.

    :param table: what :func:`summary_table` returned.
    """
    names = [
        name if unit == 1 else f"{name} / {unit:g}"
        for name, unit in zip(PARAMETER_NAMES, UNITS, strict=True)
    ]
    lines = [_line("", "", DESCRIPTIONS), _line("", "", names)]
    previous = ""
    for (method, quantity), values in table.items():
        if method != previous:
            lines.append("")
        shown = [
            _number(quantity, value, unit)
            for value, unit in zip(values.tolist(), UNITS, strict=True)
        ]
        lines.append(_line(method if method != previous else "", quantity, shown))
        previous = method
    return "\n".join(line.rstrip() for line in lines)


def _line(method: str, quantity: str, columns: Sequence[str]) -> str:
    first, *others = columns
    return f"{method:<16}{quantity:<9}{first:>10}" + "".join(f"{text:>16}" for text in others)


def _number(quantity: str, value: float, unit: float) -> str:
    if "ESS" in quantity:
        return f"{value:.0f}"
    return f"{value:.3f}" if quantity == "r-hat" else f"{value / unit:.5f}"


def write_csv(table: Mapping[tuple[str, str], Tensor], path: Path) -> None:
    """
    Write a table with all its digits, a row per method and quantity.

    :param table: what :func:`summary_table` returned.
    :param Path path: file to write.
    """
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "quantity", *PARAMETER_NAMES])
        for (method, quantity), values in table.items():
            writer.writerow([method, quantity or "value", *values.tolist()])


def closing_lines(results: Results) -> str:
    """Say how exactly the simulations match the data, and how the sampler fared."""
    diagnostics = results.mcmc.diagnostics()
    accept_prob = torch.stack(list(diagnostics["accept_prob"].values()))
    status = torch.stack(list(diagnostics["status"].values()))
    failed = int((status != Status.CONVERGED).sum())
    ours = largest_difference(results.resimulated, results.x)
    theirs = ", ".join(
        f"ABC {radius:g}: {largest_difference(_abc_outputs(results, radius), results.x):.3g}"
        for radius in sorted(results.abc)
    )
    return (
        f"Largest difference between simulated and observed data: {ours:.1e} animals\n"
        f"  (the unconditioned simulator run again from all {accept_prob.numel()} draws; "
        f"{theirs}).\n"
        f"Acceptance {accept_prob.mean():.2f}, failed trajectories {failed} of "
        f"{accept_prob.numel()}."
    )


# ------------------------------------------------------------------------------------ the pictures


def _abc_outputs(results: Results, radius: float) -> Tensor:
    return results.abc[radius].outputs.unflatten(-1, (-1, 2))


def panels(results: Results) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return simulations and draws of the parameters by method, as the figures want them."""
    theta = results.mcmc.get_samples()["theta"]
    simulations = {"ConstrainedHMC": results.resimulated.flatten(0, 1)}
    draws = {"ConstrainedHMC": theta}
    for radius in sorted(results.abc):
        name = f"ABC, radius {radius:g}"
        simulations[name] = _abc_outputs(results, radius)
        draws[name] = results.abc[radius].theta.flatten(0, 1)
    return simulations, draws


def save_figures(results: Results, folder: Path) -> list[Path]:
    """
    Draw trajectories and marginals of every method.

    :param Results results: what :func:`run_all` returned.
    :param Path folder: where to write ``trajectories.png`` and ``marginals.png``.
    :returns: the files written.
    """
    simulations, draws = panels(results)
    figures = {
        "trajectories.png": trajectories_figure(results.x, simulations),
        "marginals.png": marginals_figure(
            results.exact.marginals, draws, reference=results.nuts, true_values=THETA_TRUE
        ),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name)
    return [folder / name for name in figures]


def save_picture(results: Results, path: Path) -> None:
    """
    Draw the picture of the README: trajectories above marginals.

    :param Results results: what :func:`run_all` returned.
    :param Path path: file to write.
    """
    simulations, draws = panels(results)
    figure = overview_figure(
        results.x, simulations, results.exact.marginals, draws, true_values=THETA_TRUE
    )
    figure.savefig(path, dpi=140, pil_kwargs={"optimize": True})


# ---------------------------------------------------------------------------------------- the job


def main(arguments: list[str] | None = None) -> None:
    """Run the demonstration from the command line."""
    parser = argparse.ArgumentParser(description="Infer a simulator's parameters from its output.")
    parser.add_argument("--quick", action="store_true", help="small numbers, for a first look")
    parser.add_argument("--seed", type=int, default=0, help="seed of all methods")
    parser.add_argument("--picture", type=Path, help="also write the picture of the README here")
    default = Path(__file__).parent / "output"
    parser.add_argument("--output", type=Path, default=default, help="folder for the results")
    options = parser.parse_args(arguments)

    start = time.perf_counter()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # on tensors this small, more threads mostly wait for each other
    pyro.set_rng_seed(options.seed)
    results = run_all(QUICK if options.quick else FULL)
    table = summary_table(results)
    print(format_table(table), closing_lines(results), sep="\n\n")

    options.output.mkdir(parents=True, exist_ok=True)
    files = save_figures(results, options.output)
    files.append(options.output / "summary.csv")
    write_csv(table, files[-1])
    if options.picture is not None:
        save_picture(results, options.picture)
        files.append(options.picture)
    print(f"\nAll done in {time.perf_counter() - start:.0f} s. Look at")
    for file in files:
        print(f"  {os.path.relpath(file)}")


if __name__ == "__main__":
    main()
