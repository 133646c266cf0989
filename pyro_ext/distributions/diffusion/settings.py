"""How the probability-flow equation is solved, and checks of it."""

from __future__ import annotations

import math
from typing import NamedTuple

from ...ops.ode import METHODS, ROWWISE

__all__ = ["OdeSettings", "check_settings", "check_whole"]

_LARGEST_EXACT = 32


class OdeSettings(NamedTuple):
    """
    Solver and trace of the probability-flow equation; a tuple, changed by ``_replace``.

    >>> from pyro_ext.distributions.diffusion import OdeSettings
    >>> OdeSettings(solver="rk4", num_steps=20).trace
    'auto'
    """

    solver: str = ROWWISE
    """``"rowwise"``: Dormand-Prince with a step size for every row. By ``torchdiffeq``, with one
    for all rows: ``"dopri5"``, ``"dopri8"``, ``"adaptive_heun"``; with fixed steps
    ``"euler"``, ``"midpoint"``, ``"heun3"``, ``"rk4"``."""

    rtol: float = 1e-5
    """Relative tolerance of adaptive solvers."""

    atol: float = 1e-5
    """Absolute tolerance of adaptive solvers."""

    num_steps: int = 50
    """Steps of solvers with fixed steps, equally long on the natural scale of the diffusion."""

    max_evaluations: int = 10_000
    """Evaluations of the score after which a solution is given up."""

    trace: str = "auto"
    """Divergence of the score: ``"exact"``, ``"hutchinson"``, or exact up to 32 dimensions."""

    probe: str = "rademacher"
    """Random vectors of Hutchinson's estimate: ``"rademacher"`` or ``"gaussian"``. They are the
    same throughout a solution, which no adaptive solver could find otherwise."""

    num_probes: int = 1
    """Number of these vectors for each row."""

    seed: int | None = None
    """Makes these vectors the same in every call; ``None`` draws them anew."""

    adjoint: bool = False
    """Gradients by the adjoint equation, whose memory does not grow with the number of steps;
    for solvers of ``torchdiffeq``."""

    score_gradient: bool = False
    """Gradients of log-densities with respect to the values are the score at the start, at the
    price of one evaluation instead of the derivative of a whole solution; parameters and context
    get none. They are as good as the score. Hamiltonian Monte Carlo over the values does not mind:
    its steps are reversible with any gradient, and what it accepts depends on the density."""

    def is_exact(self, num_dimensions: int) -> bool:
        """
        Whether the divergence is computed exactly.

        :param int num_dimensions: size of an event.
        """
        if self.trace == "auto":
            return num_dimensions <= _LARGEST_EXACT
        return self.trace == "exact"


def check_settings(settings: OdeSettings) -> OdeSettings:
    """
    Check settings.

    :param OdeSettings settings: the settings.
    :returns: the same.
    :raises ValueError: if one is out of its range.
    """
    choices = {
        "solver": METHODS,
        "trace": ("auto", "exact", "hutchinson"),
        "probe": ("rademacher", "gaussian"),
    }
    for name, known in choices.items():
        value = getattr(settings, name)
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    for name in ("rtol", "atol"):
        value = getattr(settings, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value!r}")
    for name in ("num_steps", "max_evaluations", "num_probes"):
        check_whole(name, getattr(settings, name), 1)
    if settings.adjoint and settings.solver == ROWWISE:
        raise ValueError(
            "adjoint=True needs a solver of torchdiffeq: give solver='dopri5' or solver='rk4' too"
        )
    if settings.adjoint and settings.score_gradient:
        raise ValueError("adjoint=True and score_gradient=True: choose one of the two gradients")
    return settings


def check_whole(name: str, value: int, smallest: int) -> int:
    """
    Check a whole number.

    :param str name: of the argument.
    :param int value: the number.
    :param int smallest: the smallest one allowed.
    :returns: the number.
    :raises ValueError: if it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise ValueError(f"{name} must be a whole number of at least {smallest}, got {value!r}")
    return value
