"""Is the estimate of the normalisers right? Compare it with quadrature while training."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import NormalizerWarning
from .conditionals import Conditionals
from .normalizers import data_estimate, estimate, quadrature

__all__ = ["NormalizerCheck", "NormalizerMonitor", "check_normalizers"]

_NUM_CONDITIONALS = 128
_LARGEST_OPTIMISM = 0.2  # nats of one datum
_TOLERANCE = 1e-3


class NormalizerCheck(NamedTuple):
    """The estimates beside quadrature, on data of one minibatch; nats of a whole datum."""

    step: int
    """Training steps taken before."""

    optimism: float
    """Mean of the estimate of ``log_prob`` from that many draws, minus its value by quadrature."""

    standard_error: float
    """Of that mean."""

    training_bias: float
    """The same for the estimate of the training loss, which the datum itself takes part in."""

    effective_sample_size: float
    """Mean over conditionals, at most the number of draws."""

    is_converged: bool
    """Whether all quadratures reached their tolerance."""

    status: str
    """"ok"; "optimistic", above quadrature; "not converged" or "not finite", not to be judged."""


@torch.no_grad()
def check_normalizers(
    conditionals: Conditionals, x: Tensor, num_samples: int, *, features: int, step: int = 0
) -> NormalizerCheck:
    """
    Compare estimates of log Z with quadrature.

    :param Conditionals conditionals: n densities.
    :param Tensor x: a datum of each, shape ``(n,)``.
    :param int num_samples: draws of an estimate.
    :param int features: conditionals of a datum, by which mean errors are multiplied.
    :param int step: training steps taken before.
    """
    exact = quadrature(conditionals, tolerance=_TOLERANCE)
    drawn = estimate(conditionals, num_samples)
    _, with_data = data_estimate(conditionals, x, num_samples)
    optimism = features * (exact.value - drawn.log_normalizer)
    mean, error = float(optimism.mean()), float(optimism.std()) / math.sqrt(len(x))
    is_converged = bool(exact.is_converged.all())
    if not math.isfinite(mean):
        status = "not finite"
    elif not is_converged:
        status = "not converged"
    else:
        status = "optimistic" if mean - 3.0 * error > _LARGEST_OPTIMISM else "ok"
    return NormalizerCheck(
        step,
        mean,
        error,
        float((features * (exact.value - with_data.log_normalizer)).mean()),
        float(drawn.effective_sample_size.mean()),
        is_converged,
        status,
    )


class NormalizerMonitor:
    """
    Checks in the course of training; the first that is not "ok" is a warning, too.

    :param int every: training steps between checks, 0 for none.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.checks: list[NormalizerCheck] = []
        self._has_warned = False

    def is_due(self, step: int) -> bool:
        """Whether to check at a step."""
        return self.every > 0 and step % self.every == 0

    def check(
        self, conditionals: Conditionals, x: Tensor, num_samples: int, *, features: int, step: int
    ) -> None:
        """Check some of the conditionals, at random, see :func:`check_normalizers`."""
        index = torch.randperm(len(x), device=x.device)[:_NUM_CONDITIONALS]
        energy = conditionals.energy
        was_training = energy.training
        energy.eval()  # without dropout, which would make another function of every call
        try:
            result = check_normalizers(
                conditionals.select(index), x[index], num_samples, features=features, step=step
            )
        finally:
            energy.train(was_training)
        self.checks.append(result)
        if result.status != "ok" and not self._has_warned:
            self._has_warned = True
            warnings.warn(_message(result, num_samples), NormalizerWarning, stacklevel=4)

    def table(self) -> dict[str, list[float] | list[str]]:
        """All checks, one list per quantity."""
        return {
            name: [getattr(check, name) for check in self.checks]
            for name in NormalizerCheck._fields
        }


def _message(check: NormalizerCheck, num_samples: int) -> str:
    if check.status == "optimistic":
        return (
            f"At step {check.step} log_prob from {num_samples} draws is {check.optimism:.2f} nats "
            f"above its value by quadrature (standard error {check.standard_error:.2f}; "
            f"effective sample size {check.effective_sample_size:.1f}): judge this model by "
            "`log_prob(x, exact=True)`, or take more importance samples."
        )
    return (
        f"At step {check.step} the normalisers by quadrature are {check.status}, so that the "
        "estimates of the training cannot be checked; see `diagnostics()`. Infinite energies or "
        "weights are the usual cause."
    )
