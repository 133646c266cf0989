"""Accuracy of rational-quadratic splines: pyro_ext beside nflows, normflows, zuko and Pyro.

Claim: whatever real numbers a network predicts, in single precision too, the spline is increasing,
its inverse undoes it, and neither raises an error nor returns NaN.

    python benchmarks/spline_accuracy.py splines   # one spline, random parameters
    python benchmarks/spline_accuracy.py flows     # whole flows of ten steps, random weights

Splines have K = 8 bins on [-3, 3], their unconstrained parameters are drawn from N(0, scale^2),
the same ones for every library, and points are uniform on 1.2 times the interval. Libraries make
different splines of the same numbers: *largest log slope* tells how far from the identity these
are. A library that checks its inverse raises an error for a whole batch; batches have 500 points,
the other columns are of the batches that went through.

What stretches much cannot be inverted in float32, whatever the code: *inverse in float64* is the
error when the value in float32 is taken back in double precision. It shows how much is lost
already; the inverse in float32 can come out below it, as it shares the rounding of the knots with
the forward direction. Libraries also scale what their networks predict differently, so that equal
weights do not make equal flows.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._report import progress, threads_in_words, write_table
from benchmarks.peers.spline_flows import OURS, PYRO_INVERSE, ZUKO_PLAIN, Setting, build
from pyro_ext.distributions.transforms import RationalQuadraticSpline

NAME = "spline_accuracy"
PACKAGES = ["torch", "pyro-ppl", "nflows", "zuko", "normflows"]
BINS, BOUND = 8, 3.0
BATCH = 500
SCALES = (1.0, 3.0, 10.0, 100.0)
GAINS = (0.0, 0.5, 1.0)  # of the weights of a flow, 0 for the library's own
DTYPES = (torch.float32, torch.float64)

Parameters = tuple[Tensor, Tensor, Tensor]  # widths, heights, derivatives

# Of the splines with parameters `w, h, d` at `x`: values and log slopes, or those of the inverse.
Spline = Callable[[Tensor, Parameters, bool], tuple[Tensor, Tensor]]


# -- one spline in each library -----------------------------------------------------------------


def ours(x: Tensor, parameters: Parameters, inverse: bool) -> tuple[Tensor, Tensor]:
    spline = RationalQuadraticSpline(BINS, BOUND)
    joined = torch.cat(parameters, -1)
    return spline.inverse(x, joined) if inverse else spline.forward(x, joined)


def nflows(x: Tensor, parameters: Parameters, inverse: bool) -> tuple[Tensor, Tensor]:
    from nflows.transforms.splines import unconstrained_rational_quadratic_spline

    return unconstrained_rational_quadratic_spline(
        x, *parameters, inverse=inverse, tails="linear", tail_bound=BOUND
    )


def normflows(x: Tensor, parameters: Parameters, inverse: bool) -> tuple[Tensor, Tensor]:
    from normflows.utils.splines import unconstrained_rational_quadratic_spline

    return unconstrained_rational_quadratic_spline(
        x, *parameters, inverse=inverse, tails="linear", tail_bound=BOUND
    )


def zuko(x: Tensor, parameters: Parameters, inverse: bool) -> tuple[Tensor, Tensor]:
    from zuko.transforms import MonotonicRQSTransform

    transform = MonotonicRQSTransform(*parameters, bound=BOUND)
    if not inverse:
        return transform.call_and_ladj(x)
    y = transform.inv(x)
    return y, -transform.log_abs_det_jacobian(y, x)


def pyro(x: Tensor, parameters: Parameters, inverse: bool) -> tuple[Tensor, Tensor]:
    from pyro.distributions.transforms.spline import _monotonic_rational_spline

    w, h, d = parameters
    return _monotonic_rational_spline(
        x,
        torch.softmax(w, -1),
        torch.softmax(h, -1),
        F.softplus(d),
        inverse=inverse,
        bound=BOUND,
    )


SPLINES: dict[str, Spline] = {
    "nflows": nflows,
    OURS: ours,
    "zuko": zuko,
    "normflows": normflows,
    "Pyro": pyro,
}


# -- one spline: errors -------------------------------------------------------------------------


class Errors(NamedTuple):
    """Of one batch, or of all that went through; each a vector over points."""

    forward_inverse: Tensor  # |inverse(forward(x)) - x|
    forward_exact_inverse: Tensor  # with the inverse in double precision
    inverse_forward: Tensor
    log_slope: Tensor
    log_slope_against_double: Tensor
    log_slope_against_autograd: Tensor
    slope: Tensor  # by autograd
    num_not_finite: Tensor  # 1 where any of the values is not finite


def errors_of(spline: Spline, x: Tensor, parameters: Parameters) -> Errors:
    y, log_slope = spline(x, parameters, False)
    back, log_slope_back = spline(y, parameters, True)
    z, log_slope_inverse = spline(x, parameters, True)
    again, _ = spline(z, parameters, False)
    x_with_grad = x.clone().requires_grad_(True)
    value, _ = spline(x_with_grad, parameters, False)
    (slope,) = torch.autograd.grad(value.sum(), x_with_grad)
    in_double = tuple(each.double() for each in parameters)
    _, exact = spline(x.double(), in_double, False)
    exactly_back, _ = spline(y.double(), in_double, True)
    finite = torch.stack(
        [y, log_slope, back, log_slope_back, z, log_slope_inverse, again]
    ).isfinite()
    return Errors(
        (back - x).abs(),
        (exactly_back - x).abs(),
        (again - x).abs(),
        log_slope.abs(),
        (log_slope.double() - exact).abs(),
        (log_slope - slope.log()).abs(),
        slope,
        (~finite.all(0)).double(),
    )


def random_parameters(number: int, scale: float, generator: torch.Generator) -> Parameters:
    return tuple(
        scale * torch.randn(number, size, generator=generator, dtype=torch.float64)
        for size in (BINS, BINS, BINS - 1)
    )


def jump_at_bound(spline: Spline, scale: float, dtype: torch.dtype) -> float:
    """Largest log slope on the last point inside the bounds, where the tails have none."""
    parameters = random_parameters(1_000, scale, torch.Generator().manual_seed(2))
    eps = torch.finfo(dtype).eps
    inside = BOUND * (1 - 2 * eps)
    largest = 0.0
    for at in (-inside, inside):
        x = torch.full((1_000,), at, dtype=dtype)
        _, log_slope = spline(x, tuple(each.to(dtype) for each in parameters), False)
        largest = max(largest, float(log_slope.abs().max()))
    return largest


def spline_row(library: str, scale: float, dtype: torch.dtype, number: int) -> dict[str, str]:
    spline = SPLINES[library]
    generator = torch.Generator().manual_seed(1)
    parameters = random_parameters(number, scale, generator)
    x = 1.2 * BOUND * (2 * torch.rand(number, generator=generator, dtype=torch.float64) - 1)
    batches, raised = [], 0
    for rows in torch.arange(number).split(BATCH):
        of_batch = tuple(each[rows].to(dtype) for each in parameters)
        try:
            batches.append(errors_of(spline, x[rows].to(dtype), of_batch))
        except (AssertionError, RuntimeError, ValueError) as error:
            raised += 1
            progress(f"{library}, {dtype}, scale {scale:g}: {error!r}")
    row = {"scale": f"{scale:g}", "library": library}
    row["batches that raise"] = f"{raised} of {raised + len(batches)}"
    errors = Errors(*(torch.cat(each) for each in zip(*batches, strict=True))) if batches else None
    row |= error_columns(errors, dtype)
    try:
        row["log slope next to the bound"] = f"{jump_at_bound(spline, scale, dtype):.1e}"
    except (AssertionError, RuntimeError, ValueError):
        row["log slope next to the bound"] = "raises"
    return row


def error_columns(errors: Errors | None, dtype: torch.dtype) -> dict[str, str]:
    columns: dict[str, Callable[[Errors], str]] = {
        "not finite": lambda e: f"{int(e.num_not_finite.sum())}",
        "not increasing": lambda e: f"{int((e.slope <= 0).sum())}",
        "forward, inverse: largest": lambda e: largest(e.forward_inverse),
        "99%": lambda e: quantile(e.forward_inverse),
        "forward, inverse in float64: largest": lambda e: largest(e.forward_exact_inverse),
        "99% ": lambda e: quantile(e.forward_exact_inverse),
        "inverse, forward: largest": lambda e: largest(e.inverse_forward),
        "99%  ": lambda e: quantile(e.inverse_forward),
        "log slope against float64": lambda e: largest(e.log_slope_against_double),
        "against autograd": lambda e: largest(e.log_slope_against_autograd),
        "largest log slope": lambda e: f"{float(finite_part(e.log_slope).max()):.1f}",
    }
    if dtype == torch.float64:
        for name in ("forward, inverse in float64: largest", "99% ", "log slope against float64"):
            del columns[name]
    return {name: "-" if errors is None else of(errors) for name, of in columns.items()}


def finite_part(values: Tensor) -> Tensor:
    return values[values.isfinite()]


def largest(values: Tensor) -> str:
    """Of the finite ones; those that are not are counted in a column of their own."""
    return f"{float(finite_part(values).max()):.1e}"


def quantile(values: Tensor) -> str:
    values = values.double().nan_to_num(math.inf, math.inf)
    return f"{float(values.sort().values[int(0.99 * len(values))]):.1e}"


def splines(number: int, how: str) -> None:
    for dtype in DTYPES:
        rows = []
        for scale in SCALES:
            for library in SPLINES:
                progress(f"splines, {dtype}, scale {scale:g}, {library}")
                rows.append(spline_row(library, scale, dtype, number))
        write_table(f"{NAME}_{str(dtype).removeprefix('torch.')}", rows, how, PACKAGES)


# -- whole flows --------------------------------------------------------------------------------


def set_weights(module: nn.Module, gain: float, generator: torch.Generator) -> None:
    """Weights of all dense layers from N(0, 2 gain^2 / inputs), that is, He's times a gain."""
    for name, parameter in module.named_parameters():
        # zuko's dense layers are no nn.Linear; everybody's are called so
        if name.endswith("weight") and parameter.dim() == 2:
            weight = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                parameter.copy_(gain * math.sqrt(2 / parameter.shape[1]) * weight)


def round_trips(library: str, setting: Setting, gain: float, seed: int) -> dict[str, Tensor]:
    """Error of each point from data to noise and back, the largest of its features."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    flow = build(library, setting)
    if gain:
        set_weights(flow.module, gain, generator)
    flow.module.eval()
    x = torch.randn(2_000, setting.features, generator=generator)
    with torch.no_grad():
        z = flow.to_noise(x)
        back = flow.to_data(z)
        flow.module.double()
        exact = flow.to_data(z.double())
        back_in_double = flow.to_data(flow.to_noise(x.double()))
    backs = {"float32": back, "float32, inverse in float64": exact, "float64": back_in_double}
    return {name: (each - x).abs().amax(-1) for name, each in backs.items()}


def flow_row(library: str, setting: Setting, gain: float, seeds: int) -> dict[str, str]:
    trips, raised = [], 0
    for seed in range(seeds):
        try:
            trips.append(round_trips(library, setting, gain, seed))
        except (AssertionError, RuntimeError, ValueError) as error:
            raised += 1
            progress(f"{library}, gain {gain:g}, seed {seed}: {error!r}")
    row = {
        "layers": "coupling" if setting.coupling else "autoregressive",
        "weights": f"He's times {gain:g}" if gain else "as built",
        "library": library,
        "flows that raise": f"{raised} of {seeds}",
    }
    for name in ("float32", "float32, inverse in float64", "float64"):
        errors = torch.cat([trip[name] for trip in trips]) if trips else None
        row[f"{name}: median"] = "-" if errors is None else f"{float(errors.median()):.1e}"
        row[f"{name}: largest"] = "-" if errors is None else f"{float(errors.max()):.1e}"
    return row


def flows(seeds: int, how: str) -> None:
    rows = []
    for coupling, libraries in (
        (True, ("nflows", OURS, "zuko", ZUKO_PLAIN, "normflows", "Pyro")),
        (False, ("nflows", OURS, "zuko", "normflows", PYRO_INVERSE)),
    ):
        for gain in GAINS:
            for library in libraries:
                progress(f"flows, {'C' if coupling else 'AR'}, gain {gain:g}, {library}")
                rows.append(flow_row(library, Setting(coupling=coupling), gain, seeds))
    write_table(f"{NAME}_flows", rows, f"{how}, {seeds} seeds", PACKAGES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=("all", "splines", "flows"), default="all")
    parser.add_argument("--number", type=int, default=20_000, help="of splines")
    parser.add_argument("--seeds", type=int, default=5, help="weights of the flows")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of the peers, about functions that torch will remove
    torch.set_num_threads(1)
    how = threads_in_words(1)
    if args.part in ("all", "splines"):
        splines(args.number, how)
    if args.part in ("all", "flows"):
        flows(args.seeds, how)


if __name__ == "__main__":
    main()
