"""Rounding of rational-quadratic splines, in figures and beside zuko's on the same numbers.

As in ``benchmarks/spline_accuracy.py``: 8 bins on [-3, 3], points uniform on 1.2 times the
interval, parameters from N(0, scale^2).
"""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_ext.distributions.transforms import RationalQuadraticSpline
from tests.distributions.reference_splines import knots_of

NUMBER = 20_000
# the largest error and the 99th percentile of inverse(forward(x)), about three times what we see
BOUNDS = {
    ("float32", 1.0): (1e-5, 2e-6),
    ("float32", 3.0): (2e-4, 1.3e-5),
    ("float32", 10.0): (5e-3, 1.6e-4),
    ("float32", 100.0): (7e-2, 2.7e-3),
    ("float64", 1.0): (2e-14, 3.5e-15),
    ("float64", 3.0): (4.5e-13, 2.4e-14),
    ("float64", 10.0): (1e-11, 3e-13),
    ("float64", 100.0): (1.4e-10, 4.5e-12),
}
needs_zuko = pytest.mark.skipif(
    importlib.util.find_spec("zuko") is None, reason="zuko is only among the benchmarks' needs"
)
# In a process of its own: nothing it does on import reaches other tests.
ZUKO = """
import sys
import numpy, torch
from zuko.transforms import MonotonicRQSTransform

torch.set_num_threads(1)
inputs = dict(numpy.load(sys.argv[1]))
slope = float(inputs.pop("slope"))
x, w, h, d = (torch.from_numpy(inputs[name]) for name in "xwhd")
transform = MonotonicRQSTransform(w, h, d, bound=3.0, slope=slope)
y, log_slope = transform.call_and_ladj(x)
numpy.savez(sys.argv[2], y=y, log_slope=log_slope, back=transform.inv(y))
"""


class Results(NamedTuple):
    y: Tensor
    log_slope: Tensor
    back: Tensor


def _inputs(scale: float, dtype: torch.dtype, number: int = NUMBER) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    parameters = scale * torch.randn(number, 23, generator=generator)
    x = 3.6 * (2.0 * torch.rand(number, generator=generator) - 1.0)
    return x.to(dtype), parameters.to(dtype)


def _ours(x: Tensor, parameters: Tensor) -> Results:
    spline = RationalQuadraticSpline(8, 3.0)
    y, log_slope = spline.forward(x, parameters)
    return Results(y, log_slope, spline.inverse(y, parameters)[0])


def _zuko(
    tmp_path: Path, x: Tensor, sizes: tuple[Tensor, Tensor, Tensor], slope: float = 1e-3
) -> Results:
    w, h, d = (each.numpy() for each in sizes)
    np.savez(tmp_path / "in.npz", x=x.numpy(), w=w, h=h, d=d, slope=slope)
    command = [sys.executable, "-c", ZUKO, str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    subprocess.run(command, check=True, timeout=200)
    with np.load(tmp_path / "out.npz") as results:
        return Results(*(torch.from_numpy(results[name]) for name in Results._fields))


def _worst_and_p99(error: Tensor) -> tuple[float, float]:
    error = error.double().abs().nan_to_num(torch.inf, torch.inf, torch.inf).sort().values
    return float(error[-1]), float(error[int(0.99 * len(error))])


@pytest.mark.parametrize(("dtype", "scale"), BOUNDS, ids=str)
def test_round_trips_are_as_exact_as_measured(dtype: str, scale: float) -> None:
    x, parameters = _inputs(scale, getattr(torch, dtype))
    worst, p99 = _worst_and_p99(_ours(x, parameters).back - x)
    worst_allowed, p99_allowed = BOUNDS[dtype, scale]
    assert worst <= worst_allowed
    assert p99 <= p99_allowed


@pytest.mark.parametrize(
    ("scale", "allowed"), [(1.0, 7.5e-5), (3.0, 2.2e-4), (10.0, 1.5e-3), (100.0, 3e-3)]
)
def test_log_slopes_in_single_precision(scale: float, allowed: float) -> None:
    """Against those in double precision of the same numbers."""
    x, parameters = _inputs(scale, torch.float32)
    single, double = _ours(x, parameters), _ours(x.double(), parameters.double())
    worst, p99 = _worst_and_p99(single.log_slope - double.log_slope)
    assert worst <= allowed
    assert p99 <= 0.15 * allowed


@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0, 100.0], ids="scale {:g}".format)
def test_the_density_has_no_step_at_the_bound(scale: float) -> None:
    """In double precision; a spline with end slopes of 0.999 would show 1e-3."""
    spline = RationalQuadraticSpline(8, 3.0)
    inside = torch.tensor([-3.0 + 1e-12, 3.0 - 1e-12]).expand(1000, 2)
    _, log_slope = spline.forward(inside, scale * torch.randn(1000, 1, 23))
    assert log_slope.abs().max() < 1e-6


@needs_zuko
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0, 100.0], ids="scale {:g}".format)
def test_round_trips_are_no_worse_than_those_of_zuko(
    tmp_path: Path, scale: float, dtype: torch.dtype
) -> None:
    x, parameters = _inputs(scale, dtype)
    w, h, d = parameters.split([8, 8, 7], -1)
    ours = _worst_and_p99(_ours(x, parameters).back - x)
    theirs = _worst_and_p99(_zuko(tmp_path, x, (w, h, d)).back - x)
    assert ours[0] <= theirs[0], "largest error"
    assert ours[1] <= theirs[1], "99th percentile"


@needs_zuko
@pytest.mark.slow
def test_values_equal_those_of_zuko_with_the_same_knots(tmp_path: Path) -> None:
    x, parameters = _inputs(1.0, torch.float64, 5_000)
    knots = knots_of(RationalQuadraticSpline(8, 3.0), parameters)
    slope = 1e-30  # so that its soft clipping leaves room
    logs = [knots.x.diff(dim=-1).log(), knots.y.diff(dim=-1).log(), knots.delta[:, 1:-1].log()]
    limits = [-np.log(slope) / 2, -np.log(slope) / 2, -np.log(slope)]
    w, h, d = (t / (1.0 - t.abs() / c) for t, c in zip(logs, limits, strict=True))
    theirs, ours = _zuko(tmp_path, x, (w, h, d), slope), _ours(x, parameters)
    torch.testing.assert_close(ours.y, theirs.y, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.log_slope, theirs.log_slope, rtol=0, atol=1e-11)
    torch.testing.assert_close(ours.back, theirs.back, rtol=0, atol=1e-11)
