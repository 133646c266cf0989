"""Likelihood-free inference: pyro_ext beside sbi, on simulators with known posteriors.

Claim: draws as close to the exact posterior as sbi's at the same number of simulations, after at
most half the processor time of training.

    python benchmarks/contrastive.py run two_moons npe --simulations 2000
    python benchmarks/contrastive.py run slcp nre --atoms 10 --rounds 5 --simulations 1000
    python benchmarks/contrastive.py suite                 # all of the table, some hours
    python benchmarks/contrastive.py table                 # of the runs that there are
    python benchmarks/contrastive.py picture
    python benchmarks/contrastive.py calibration           # ranks of simulation-based calibration

Both run on the same machine in the same process, one thread, float32, one after the other, with
draws from the same prior: the Pyro model is ours as it is, and is handed to sbi as a prior and a
function. The reference of the queue is computed when it is first asked for, which takes ten
minutes. Settings of sbi are those of Durkan et al. 2020 (minibatches of 100, step size 5e-4,
a tenth held out, patience of 20 epochs, a MAF of five layers, a residual network of two blocks of
50), but that it draws by MCMC from flows of further rounds, since rejection may take forever; ours
are the defaults. ``npe`` is maximum likelihood in the first round and SNPE-C after it,
``nre`` the ratio among K parameters, ``nle`` the likelihood.

Figures: C2ST of 1,000 draws (pyro_ext.diagnostics.classifier_two_sample_test, the mean of two
seeds of the classifier; 1/2 is perfect), minus the log-density of the true parameters by a
Gaussian kernel estimate of the draws, seconds of processor time. The draws of every finished run
are kept in ``benchmarks/output/contrastive``, its figures are a line of
``benchmarks/output/contrastive.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
from scipy.stats import gaussian_kde
from torch import Tensor

from benchmarks._contrastive import METHODS, NUM_DRAWS, PACKAGES, Setting, estimator_for
from benchmarks._report import OUTPUT, progress, write_table
from benchmarks.simulators import TASKS, Task, cached_reference
from pyro_ext import NeuralRatioEstimator
from pyro_ext.diagnostics import classifier_two_sample_test, simulation_based_calibration

RESULTS_FILE = os.path.join(OUTPUT, "contrastive.jsonl")
CALIBRATION_FILE = os.path.join(OUTPUT, "contrastive_calibration.jsonl")
DRAWS = os.path.join(OUTPUT, "contrastive")
IMAGES = os.path.join(os.path.dirname(OUTPUT), "..", "docs", "images")
STYLE = os.path.join(os.path.dirname(OUTPUT), "..", "pyro_ext", "figures.mplstyle")
_PANELS = {
    "c2st_rounds": "C2ST",
    "nltp_rounds": "-log p(true parameters)",
    "distances": "median distance of simulations",
    "cpu_training_rounds": "training, CPU s",
}
_ROWS = {
    "slcp": "SLCP",
    "queue": "M/G/1 queue",
    "lotka_volterra_jump": "Lotka-Volterra, jump process",
}
_COLOURS = {"pyro_ext": "tab:blue", "sbi": "tab:orange"}
_LINES: dict[str | int, str] = {
    **{"npe": "-", "nre": "--", "nle": ":"},
    **{100: "-", 10: "--", 2: ":"},
}
CLASSIFIER_SEEDS = 2
CALIBRATION_SIMULATIONS, CALIBRATION_RUNS, CALIBRATION_DRAWS = 5000, 300, 99

_ONE_ROUND = ("two_moons", "gaussian_linear", "queue", "lotka_volterra_jump")
_ONE_ROUND += ("lotka_volterra_sde_plausible",)
SUITE = [
    *(
        Setting(task, method, 10, 1, 2000, seed)
        for seed in range(3)
        for task in _ONE_ROUND
        for method in ("npe", "nre")
    ),
    *(Setting("two_moons", "nre", atoms, 1, 2000, s) for s in range(3) for atoms in (2, 100)),
    *(Setting("two_moons", "nle", 10, 1, 2000, seed) for seed in range(3)),
    *(Setting("slcp", m, 10, 5, 1000, seed) for seed in range(3) for m in ("npe", "nre")),
    *(Setting(task, m, 10, 5, 1000, 0) for task in _ROWS for m in ("npe", "nre", "nle")),
    *(Setting("slcp", "nre", atoms, 5, 1000, 0) for atoms in (2, 100)),
]


def figures(draws: list[Tensor], task: Task) -> dict[str, Any]:
    """How good draws are."""
    result: dict[str, Any] = {}
    if task.reference is not None:
        result["c2st_rounds"] = [_c2st(each, task) for each in draws]
        result["c2st"] = result["c2st_rounds"][-1]
    if task.truth is not None:
        result["nltp_rounds"] = [_minus_log_density_of_truth(each, task.truth) for each in draws]
        result["nltp"] = result["nltp_rounds"][-1]
    return result


def _c2st(draws: Tensor, task: Task) -> float:
    exact = cached_reference(task, NUM_DRAWS).draws
    accuracies = []
    for seed in range(CLASSIFIER_SEEDS):
        torch.manual_seed(seed)
        test = classifier_two_sample_test(exact, draws.to(exact))
        accuracies.append(test.accuracy)
    return statistics.mean(accuracies)


def _minus_log_density_of_truth(draws: Tensor, truth: Tensor) -> float:
    density = gaussian_kde(draws.numpy().astype(float).T)
    return -float(density.logpdf(truth.numpy().astype(float))[0])


def _exact_minus_log_density(task: Task) -> float | None:
    """What the figure is for exact draws: less is too sure of itself, and was lucky."""
    if task.reference is None or task.truth is None:
        return None
    return _minus_log_density_of_truth(cached_reference(task, NUM_DRAWS).draws, task.truth)


def run(package: str, setting: Setting) -> dict[str, Any]:
    """One run, kept in the file of results."""
    torch.manual_seed(setting.seed)
    np.random.seed(setting.seed)
    with warnings.catch_warnings():
        if package == "sbi":
            warnings.simplefilter("ignore")
        found = PACKAGES[package](setting)
    draws = [each.detach() for each in found.draws]
    os.makedirs(DRAWS, exist_ok=True)
    name = "_".join([package, *(str(value) for value in setting)])
    torch.save(draws, os.path.join(DRAWS, f"{name}.pt"))
    record = {
        "package": package,
        **setting._asdict(),
        "cpu_training": found.cpu_training[-1],
        "cpu_training_rounds": found.cpu_training,
        "cpu_sampling": found.cpu_sampling,
        "distances": found.distances,
        "acceptance_rounds": found.acceptance,
        "num_failed": found.num_failed,
        **figures(draws, TASKS[setting.task]),
    }
    with open(RESULTS_FILE, "a") as file:
        file.write(json.dumps(record) + "\n")
    progress(json.dumps(record))
    return record


def records() -> list[dict[str, Any]]:
    """All finished runs."""
    if not os.path.exists(RESULTS_FILE):
        return []
    with open(RESULTS_FILE) as file:
        return [json.loads(line) for line in file]


def _setting(record: dict[str, Any]) -> Setting:
    return Setting(**{name: record[name] for name in Setting._fields})


def suite(packages: list[str]) -> None:
    """Every run of the table that is not there yet."""
    done = {(record["package"], _setting(record)) for record in records()}
    for setting in dict.fromkeys(SUITE):
        for package in packages:
            if (package, setting) not in done:
                run(package, setting)


def table() -> None:
    """One row per setting and package, seeds together."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records():
        groups.setdefault((_setting(record).key, record["package"]), []).append(record)
    rows: list[dict[str, str]] = []
    for _, runs in sorted(groups.items()):
        first = runs[0]
        has_atoms = first["method"] == "nre" or (first["method"] == "npe" and first["rounds"] > 1)
        rows.append(
            {
                "task": first["task"],
                "method": first["method"],
                "K": str(first["atoms"]) if has_atoms else "",
                "simulations": f"{first['rounds']} x {first['simulations']}",
                "package": first["package"],
                "C2ST": _median_and_range(runs, "c2st"),
                "-log p(true)": _median_and_range(runs, "nltp", digits=2),
                "training, CPU s": _median_and_range(runs, "cpu_training", digits=1),
                "drawing 1,000, CPU s": _median_and_range(runs, "cpu_sampling", digits=2),
                "inside the prior": _acceptance(runs),
                "failed": str(first["num_failed"]),
                "seeds": str(len(runs)),
            }
        )
    for name in sorted({row["task"] for row in rows}):
        exact = _exact_minus_log_density(TASKS[name])
        if exact is not None:
            found = {"task": name, "package": "exact draws", "-log p(true)": f"{exact:.2f}"}
            rows.append({column: found.get(column, "") for column in rows[0]})
    rows.sort(key=lambda row: row["task"])
    how = "one thread, medians over seeds (smallest to largest)"
    write_table("contrastive", rows, how, ["torch", "pyro-ppl", "sbi", "scikit-learn"])


def _acceptance(runs: list[dict[str, Any]]) -> str:
    values = [run["acceptance_rounds"][-1] for run in runs if run.get("acceptance_rounds")]
    return f"{100 * statistics.median(values):.3g} %" if values else ""


def _median_and_range(runs: list[dict[str, Any]], name: str, digits: int = 3) -> str:
    values = [run[name] for run in runs if name in run]
    if not values:
        return ""
    median = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return median
    return f"{median} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def calibration(tasks: list[str], methods: list[str]) -> None:
    """Simulation-based calibration of posteriors that were learned from one set of simulations."""
    for name in tasks:
        for method in methods:
            torch.manual_seed(0)
            task = TASKS[name]
            estimator = estimator_for(Setting(name, method, 10, 1, 0, 0), task)
            estimator.simulate(CALIBRATION_SIMULATIONS)
            estimator.fit()
            row = {"task": name, "method": method, **_calibrate(estimator, task)}
            with open(CALIBRATION_FILE, "a") as file:
                file.write(json.dumps(row) + "\n")
    with open(CALIBRATION_FILE) as file:
        rows = [json.loads(line) for line in file]
    latest = {(row["task"], row["method"]): row for row in rows}
    names = dict.fromkeys(name for row in latest.values() for name in row)
    how = (
        f"one thread; {CALIBRATION_SIMULATIONS} simulations, {CALIBRATION_RUNS} data sets, "
        f"{CALIBRATION_DRAWS} draws for each"
    )
    write_table(
        "contrastive_calibration",
        [{name: row.get(name, "") for name in names} for _, row in sorted(latest.items())],
        how,
        ["torch", "pyro-ppl"],
    )


def _calibrate(estimator: Any, task: Task) -> dict[str, str]:
    log_posterior: Callable[[Tensor, Tensor], Tensor] | None = task.log_posterior
    if log_posterior is None:
        raise ValueError(f"The exact posterior of {task.name!r} is not known.")
    options = {"method": "importance"} if isinstance(estimator, NeuralRatioEstimator) else {}
    with warnings.catch_warnings():
        # of data at the edge of what was simulated, which are among those from the prior
        warnings.simplefilter("ignore")
        result = simulation_based_calibration(
            task.model,
            lambda data: estimator.posterior(data["x"]).sample(CALIBRATION_DRAWS, **options),
            observed="x",
            num_simulations=CALIBRATION_RUNS,
            quantities={"exact": lambda values, data: log_posterior(values["theta"], data["x"])},
            disable_progbar=True,
        )
    progress(result.summary())
    parameters = result._replace(
        chi_square={"theta": result.chi_square["theta"]},
        kolmogorov_smirnov={"theta": result.kolmogorov_smirnov["theta"]},
    )
    names = ["exact log-density", *(f"theta {i + 1}" for i in range(len(result.spread["theta"])))]
    location, spread = _joined(result.location), _joined(result.spread)
    return {
        "p-value, parameters": f"{parameters.p_value:.2g}",
        "p-value, and exact log-density": f"{result.p_value:.2g}",
        **{name: f"{location[i]:.3f}, {spread[i]:.2f}" for i, name in enumerate(names)},
    }


def _joined(values: dict[str, Tensor]) -> list[float]:
    return [float(v) for name in ("exact", "theta") for v in values[name].reshape(-1)]


def picture() -> None:
    """What every round of inference adds, by task, and what more contrasting parameters do."""
    import matplotlib.pyplot as plt

    runs = [record for record in records() if record["rounds"] > 1]
    with plt.style.context(STYLE):
        panels: Any
        figure, panels = plt.subplots(
            len(_ROWS), len(_PANELS), figsize=(12, 3 * len(_ROWS)), layout="constrained"
        )
        for row, (task, title) in zip(panels, _ROWS.items(), strict=True):
            _draw_rounds(row, [r for r in runs if r["task"] == task and r["atoms"] == 10], task)
            row[0].set_ylabel(title)
        _finish(figure, panels[0], "contrastive_rounds.png")
        figure, row = plt.subplots(1, len(_PANELS), figsize=(12, 3), layout="constrained")
        ratios = [r for r in runs if r["task"] == "slcp" and r["method"] == "nre"]
        _draw_rounds(row, ratios, "slcp", by_atoms=True)
        _finish(figure, row, "contrastive_atoms.png")


def _draw_rounds(row: Any, runs: list[dict[str, Any]], task: str, by_atoms: bool = False) -> None:
    """Medians over seeds after every round, and their range."""
    from matplotlib.ticker import LogLocator

    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["package"], run["method"], run["atoms"]), []).append(run)
    for (package, method, atoms), group in sorted(groups.items()):
        label = f"{package}, K = {atoms}" if by_atoms else f"{package}, {method.upper()}"
        style = {
            "linestyle": _LINES[atoms] if by_atoms else _LINES[method],
            "color": _COLOURS[package],
        }
        total = np.arange(1, group[0]["rounds"] + 1) * group[0]["simulations"]
        for panel, name in zip(row, _PANELS, strict=True):
            values = np.array([run[name] for run in group if name in run])
            if len(values):
                panel.plot(total, np.median(values, 0), label=label, **style)
                limits = values.min(0), values.max(0)
                panel.fill_between(total, *limits, color=style["color"], alpha=0.12, lw=0)
    exact = _exact_minus_log_density(TASKS[task])
    if exact is not None:
        row[1].axhline(exact, color="0.5", label="exact draws")
    row[3].set_yscale("log")
    row[3].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    row[3].yaxis.set_major_formatter("{x:g}")
    row[3].yaxis.set_minor_formatter("")
    if not row[0].has_data():
        row[0].text(0.5, 0.5, "no exact draws", ha="center", transform=row[0].transAxes)
        row[0].set(xticks=[], yticks=[])


def _finish(figure: Any, row: Any, name: str) -> None:
    for panel, title in zip(row, _PANELS.values(), strict=True):
        panel.set_title(title, fontsize="medium")
    for panel in figure.axes[-len(_PANELS) :]:
        panel.set_xlabel("simulations")
    # where the lines leave room
    row[2].legend(*row[1].get_legend_handles_labels(), fontsize="small")
    path = os.path.join(IMAGES, name)
    os.makedirs(IMAGES, exist_ok=True)
    figure.savefig(path, dpi=130, pil_kwargs={"optimize": True})
    progress(f"wrote {os.path.relpath(path)}")


def _warm_up() -> None:
    """One step of training: the first in a process imports a second's worth of modules."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter])
    parameter.square().sum().backward()
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = ["run", "suite", "table", "picture", "calibration"]
    parser.add_argument("command", choices=commands, nargs="?", default="suite")
    parser.add_argument("task", choices=list(TASKS), nargs="?")
    parser.add_argument("method", choices=METHODS, nargs="?")
    parser.add_argument("--atoms", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--simulations", type=int, default=1000, help="of each round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packages", nargs="+", choices=list(PACKAGES), default=list(PACKAGES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    _warm_up()
    if arguments.command == "run":
        if arguments.task is None or arguments.method is None:
            parser.error("run needs a task and a method")
        setting = Setting(*(getattr(arguments, name) for name in Setting._fields))
        for package in arguments.packages:
            run(package, setting)
    elif arguments.command == "suite":
        suite(arguments.packages)
    elif arguments.command == "calibration":
        calibration(
            [arguments.task] if arguments.task else ["gaussian_linear", "two_moons"],
            [arguments.method] if arguments.method else ["npe", "nre"],
        )
    if arguments.command in ("run", "suite", "table") and records():
        table()
    if arguments.command in ("suite", "picture"):
        picture()


if __name__ == "__main__":
    main()
