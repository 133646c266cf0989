"""A system that takes other Jacobians when the structure it found does not hold."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import SamplingWarning
from .jacobian.structure import Jacobian
from .model.inspection import ModelStructure
from .system.compilation import RecordedSystem
from .system.constrained_system import ConstrainedSystem, Point
from .system.defects import Misplaced, find_misplaced, has_lost_digits

__all__ = ["GuardedSystem"]

_MOST_NAMES = 4
_LOST_DIGITS = (
    "Outputs nearly stopped depending on their local inputs, where the structure of the Jacobian "
    "costs digits; from here on it is treated as dense. Pass structure='dense' to do so from the "
    "start."
)


class GuardedSystem:
    """
    The system of a run: recorded, compiled if that is asked for, and checked as it runs.

    Every so many points, accepted or not, the structured Jacobian is compared with a product of
    the true one: beyond the pattern the density is wrong, and may keep the chains from where that
    would be seen.

    :param system: the system, with the structure chosen for it.
    :param str report: why its Jacobians are computed as they are, in a line.
    :param replacement: makes the system to go on with, and says in a line what it is: given inputs
        with entries where the structure has none, one with these entries; given ``None``, because
        digits were lost, one without structure.
    :param names: the model's structure, for the names of sites.
    :param int num_chains: chains of the run.
    :param int check_interval: points per check.
    :param bool compile: whether to compile the system.
    """

    def __init__(
        self,
        system: ConstrainedSystem,
        report: str,
        replacement: Callable[[Tensor | None], tuple[ConstrainedSystem, str]],
        names: ModelStructure,
        num_chains: int,
        *,
        check_interval: int,
        compile: bool,
    ) -> None:
        self.is_vectorized = system.is_vectorized
        self.report = report
        self._names = names
        self._replacement = replacement
        self._num_chains = num_chains
        self._is_compiled = compile
        self._check_interval = check_interval
        self._num_points = self._num_reviews = 0
        self._misplaced: Misplaced | None = None
        self._plain = system
        self._current = self._prepared(system)

    def constraint(self, position: Tensor, scale: Tensor) -> Tensor:
        """See :meth:`.ConstrainedSystem.constraint`."""
        return self._current.constraint(position, scale)

    def correction(
        self, position: Tensor, scale: Tensor, jacobian: Jacobian
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`.ConstrainedSystem.correction`."""
        return self._current.correction(position, scale, jacobian)

    def slopes(self, position: Tensor, scale: Tensor) -> Any:
        """See :meth:`.ConstrainedSystem.slopes`."""
        return self._current.slopes(position, scale)

    def jacobian(self, position: Tensor, scale: Tensor) -> Jacobian:
        """See :meth:`.ConstrainedSystem.jacobian`."""
        return self._current.jacobian(position, scale)

    def point(self, position: Tensor, scale: Tensor) -> Point:
        """See :meth:`.ConstrainedSystem.point`."""
        point = self._current.point(position, scale)
        self._num_points += 1
        if self._has_structure and self._num_points % self._check_interval == 0:
            vector = torch.randn_like(position)
            product = self._current.product(position, vector, scale)
            misplaced = find_misplaced(self._plain, point, scale, vector, product)
            self._misplaced = self._misplaced or misplaced
        return point

    def review(self, point: Point, scale: Tensor) -> Point:
        """
        Give the structure up if it was found not to hold, or costs digits; after every draw.

        :param point: where the chains are.
        :param Tensor scale: scale of each input, ``(dim,)``.
        :returns: the same point; with other Jacobians from the time that structure is given up.
        """
        if not self._has_structure:
            return point
        self._num_reviews += 1
        misplaced, self._misplaced = self._misplaced, None
        if misplaced is not None:
            self._plain, report = self._replacement(misplaced.inputs)
            new = "with the structure that holds there too" if self._has_structure else "as dense"
            complaint = _misplaced_message(misplaced, self._names, new)
        elif self._num_reviews % self._check_interval == 0 and has_lost_digits(point):
            self._plain, report = self._replacement(None)
            complaint = _LOST_DIGITS
        else:
            return point
        warnings.warn(complaint, SamplingWarning, stacklevel=3)
        self.report = f"{report}, since {self.report} did not hold"
        self._current = self._prepared(self._plain)
        return self._current.point(point.position, scale)

    @property
    def _has_structure(self) -> bool:
        return self._plain.structure.pattern is not None

    def _prepared(self, system: ConstrainedSystem) -> ConstrainedSystem | RecordedSystem:
        # many operations take longer to record than a short run lasts
        if not (self._is_compiled or system.has_recorded_derivatives):
            return system
        return RecordedSystem(system, self._num_chains, compile=self._is_compiled)


def _misplaced_message(misplaced: Misplaced, names: ModelStructure, new: str) -> str:
    outputs = [names.constraint_name(row) for row in misplaced.rows]
    inputs = [
        site.name
        for site in names.latents
        if any(site.start <= column < site.stop for column in misplaced.columns)
    ]
    return (
        f"Outputs {_listed(outputs)} turn out to depend on inputs that they did not depend on at "
        f"the start: {outputs[0]!r} on {_listed(inputs)}. From here on the Jacobian is treated "
        f"{new}; draws since the start may lack where that is so. Run again with "
        "structure='dense', or with a smaller structure_check_interval."
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MOST_NAMES])
    more = len(names) - _MOST_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
