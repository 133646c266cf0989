"""Fit the networks of all rows to their evidence."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...errors import SamplingWarning
from ...ops.lbfgs import minimize_lbfgs
from ...ops.row_adam import minimize_adam
from ...ops.rows import RowsResult, RowStatus

__all__ = ["OPTIMIZERS", "Elbo", "FitResult", "check_fit", "minimize", "summarize"]

Elbo = Callable[[Tensor, Tensor], Tensor]
"""From psi and noise to one value per draw and row, the terms of the C-ELBO."""

OPTIMIZERS: dict[str, Callable[..., RowsResult]] = {"lbfgs": minimize_lbfgs, "adam": minimize_adam}

_MAX_ITER = {"lbfgs": 500, "adam": 2000}
_TOL = 1e-8
_GRADIENT_TOL = 1e-6
_OVERFIT_ERRORS = 5.0
_OVERFIT_NATS = 1.0


class FitResult(NamedTuple):
    """What happened in a fit. Tensors have the shape of the rows, ``()`` if there is one."""

    c_elbo: Tensor
    """The C-ELBO on the noise that it was maximised on."""
    held_out_c_elbo: Tensor
    """The C-ELBO on fresh noise. If it is much lower, the noise was learned by heart."""
    held_out_error: Tensor
    """Monte Carlo standard error of :attr:`held_out_c_elbo`."""
    status: Tensor
    """How each row ended, a :class:`~pyro_ext.ops.rows.RowStatus`."""
    num_iterations: Tensor
    """Steps of each row."""
    num_evaluations: int
    """Evaluations of the objective, each of all rows."""
    trace: Tensor
    """Best C-ELBO after each evaluation, shape ``(num_evaluations,) + rows``."""
    seconds: float
    """Wall time."""


def check_fit(optimizer: str, num_particles: int, features: int) -> None:
    """
    Check the settings of a fit.

    :raises ValueError: if one is out of its range.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer={optimizer!r} is unknown: give one of "
            f"{', '.join(map(repr, OPTIMIZERS))}, or use pyro.infer.SVI with an optimizer of Pyro."
        )
    if not isinstance(num_particles, int) or num_particles < 2 * (features + 1):
        raise ValueError(
            f"num_particles={num_particles!r} draws of noise for {features} latents of a row: an "
            f"affine map can place any {features + 1} draws where it likes, and learns them by "
            f"heart instead of the posterior. Give at least {2 * (features + 1)}, better ten "
            "times as many."
        )


def minimize(
    terms: Elbo,
    starts: Iterable[Tensor],
    noise: Tensor,
    validation_noise: Tensor,
    *,
    optimizer: str,
    max_iter: int | None,
    tol: float | None,
    learning_rate: float | None,
    chunk_size: int | None,
    progress: bool,
) -> RowsResult:
    """
    Maximise the average of the C-ELBO over given noise, for all rows.

    :param terms: value of each draw and row, shape ``(draws, rows)``.
    :param starts: psi to start from, each of shape ``(rows, num_parameters)``; every row ends
        where the best of them led.
    :param Tensor noise: shape ``(draws, features)``, the same in all rows.
    :param Tensor validation_noise: further noise, on which the parameters are compared.
    :param str optimizer: "lbfgs" or "adam".
    :param max_iter: most steps, ``None`` for the default of the optimizer.
    :param tol: relative gain of a step below which a row is done, ``None`` for 1e-8, or what
        the precision resolves.
    :param learning_rate: of Adam.
    :param chunk_size: draws that are evaluated together, ``None`` for all.
    :param bool progress: show a progress bar.
    :returns: values are of minus the C-ELBO.
    """
    chunks = noise.split(chunk_size or len(noise))

    def objective(psi: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = torch.zeros_like(psi[:, 0]), torch.zeros_like(psi)
        psi = psi.detach().requires_grad_()
        for chunk in chunks:
            with torch.enable_grad():
                loss = -terms(psi, chunk).sum(0) / len(noise)
                (gradient_of_chunk,) = torch.autograd.grad(loss.sum(), psi)
            value = value + loss.detach()
            gradient = gradient + gradient_of_chunk
        return value, gradient

    def validate(psi: Tensor) -> Tensor:
        with torch.no_grad():
            chunks = validation_noise.split(chunk_size or len(validation_noise))
            totals = [terms(psi, chunk).sum(0) for chunk in chunks]
        return -torch.stack(totals).sum(0) / len(validation_noise)

    max_iter = _MAX_ITER[optimizer] if max_iter is None else max_iter
    minimizer: Callable[..., RowsResult] = OPTIMIZERS[optimizer]
    if optimizer == "adam" and learning_rate is not None:
        minimizer = partial(minimize_adam, learning_rate=learning_rate)
    hide = not progress or "CI" in os.environ
    best: RowsResult | None = None
    for start in starts:
        eps = torch.finfo(start.dtype).eps
        with tqdm(total=max_iter, desc="Fit", disable=hide, dynamic_ncols=True) as bar:
            result = minimizer(
                objective,
                start,
                max_iter=max_iter,
                gradient_tol=max(_GRADIENT_TOL, eps**0.5),
                value_tol=max(_TOL, 4 * eps) if tol is None else tol,
                validate=validate,
                callback=partial(_report, bar),
            )
        best = result if best is None else _better_rows(best, result, validate)
    if best is None:
        raise ValueError("There is no point to start from.")
    return best


def _report(bar: tqdm, value: Tensor, running: Tensor) -> None:
    bar.update(min(1, bar.total - bar.n))
    if not bar.disable:
        mean = value[value.isfinite()].mean()
        bar.set_postfix(c_elbo=f"{-mean:.4g}", running=f"{running.sum()}/{len(running)}")


def _better_rows(
    first: RowsResult, second: RowsResult, validate: Callable[[Tensor], Tensor]
) -> RowsResult:
    """Of each row the result with the lower value on other noise, but none above the start."""
    values = [torch.nan_to_num(validate(r.point), nan=float("inf")) for r in (first, second)]
    better = (values[1] < values[0]) & (second.status != RowStatus.NOT_FINITE)
    better &= second.value <= first.trace[0]
    return RowsResult(
        point=torch.where(better[:, None], second.point, first.point),
        value=torch.where(better, second.value, first.value),
        status=torch.where(better, second.status, first.status),
        num_iterations=torch.where(better, second.num_iterations, first.num_iterations),
        num_evaluations=first.num_evaluations + second.num_evaluations,
        trace=torch.cat([first.trace, second.trace]).cummin(0).values,
    )


def summarize(
    result: RowsResult,
    held_out: Tensor,
    folded: Tensor,
    row_shape: torch.Size,
    started: float,
) -> FitResult:
    """
    Put the result of a fit together, and warn of what deserves suspicion.

    :param RowsResult result: of :func:`minimize`.
    :param Tensor held_out: terms of the C-ELBO on fresh noise, shape ``(draws, rows)``.
    :param Tensor folded: rows whose network is not one-to-one, shape ``(rows,)``.
    :param torch.Size row_shape: shape of the results.
    :param float started: ``time.perf_counter()`` at the start.
    """
    c_elbo, mean = -result.value, held_out.mean(0)
    error = held_out.std(0) / len(held_out) ** 0.5
    failed = result.status == RowStatus.NOT_FINITE
    if bool(failed.any()):
        warnings.warn(
            f"{int(failed.sum())} of {len(failed)} rows were not fitted, because their evidence "
            "has no finite density at draws of the prior: rows "
            f"{failed.nonzero().squeeze(-1).tolist()[:20]}. They keep the prior.",
            SamplingWarning,
            stacklevel=3,
        )
    gap = c_elbo - mean
    learned = (gap > _OVERFIT_ERRORS * error) & (gap > _OVERFIT_NATS) & ~failed
    if bool(learned.any()):
        warnings.warn(
            f"In {int(learned.sum())} of {len(learned)} rows the C-ELBO on fresh noise is up to "
            f"{float(gap[learned].max()):.3g} lower than on the noise of the fit, which was "
            "learned by heart: give more particles, or a smaller flow.",
            SamplingWarning,
            stacklevel=3,
        )
    if bool(folded.any()):
        warnings.warn(
            f"In {int(folded.sum())} of {len(folded)} rows the network folds: the determinant of "
            "its Jacobian has both signs. There the C-ELBO is no bound and may lie above log "
            "p(x). Compare such a fit by its query_log_prob, or use 'planar' or 'spline'.",
            SamplingWarning,
            stacklevel=3,
        )
    return FitResult(
        c_elbo=c_elbo.reshape(row_shape),
        held_out_c_elbo=mean.reshape(row_shape),
        held_out_error=error.reshape(row_shape),
        status=result.status.reshape(row_shape),
        num_iterations=result.num_iterations.reshape(row_shape),
        num_evaluations=result.num_evaluations,
        trace=-result.trace.reshape(-1, *row_shape),
        seconds=time.perf_counter() - started,
    )
