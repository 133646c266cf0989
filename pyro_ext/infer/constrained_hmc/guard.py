"""A system that falls back to dense Jacobians when the structure it found does not hold."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor

from ...errors import SamplingWarning
from .compilation import CompiledSystem
from .defects import Defect, find_defect
from .inspection import ModelStructure
from .structure import Jacobian
from .system import ConstrainedSystem, Point, System

__all__ = ["GuardedSystem"]

_MOST_NAMES = 4


class GuardedSystem:
    """
    The system of a run: compiled if that is asked for, and reviewed between transitions.

    :param system: the system, with the structure chosen for it.
    :param str report: why its Jacobians are computed as they are, in a line.
    :param dense: makes the system without structure, and says in a line what it is.
    :param names: the model's structure, for the names of sites.
    :param num_chains: the batch size to compile for, ``None`` to leave the system uncompiled.
    """

    def __init__(
        self,
        system: ConstrainedSystem,
        report: str,
        dense: Callable[[], tuple[ConstrainedSystem, str]],
        names: ModelStructure,
        num_chains: int | None,
    ) -> None:
        self.is_vectorized = system.is_vectorized
        self.report = report
        self._names = names
        self._dense = dense
        self._num_chains = num_chains
        self._plain = system
        self._current = self._prepared(system)

    def constraint(self, position: Tensor, scale: Tensor) -> Tensor:
        """See :meth:`.system.ConstrainedSystem.constraint`."""
        return self._current.constraint(position, scale)

    def jacobian_matrix(self, position: Tensor, scale: Tensor) -> Tensor:
        """See :meth:`.system.ConstrainedSystem.jacobian_matrix`."""
        return self._current.jacobian_matrix(position, scale)

    def jacobian(self, position: Tensor, scale: Tensor) -> Jacobian:
        """See :meth:`.system.ConstrainedSystem.jacobian`."""
        return self._current.jacobian(position, scale)

    def point(self, position: Tensor, scale: Tensor) -> Point:
        """See :meth:`.system.ConstrainedSystem.point`."""
        return self._current.point(position, scale)

    def review(self, point: Point, scale: Tensor) -> Point:
        """
        Look whether the structure holds where the chains are, and give it up if it does not.

        :param point: where the chains are.
        :param Tensor scale: scale of each input, ``(dim,)``.
        :returns: the same point; with dense Jacobians from the time that structure is given up.
        """
        defect = find_defect(self._plain, point, scale)
        if defect is None:
            return point
        warnings.warn(self._complaint(defect), SamplingWarning, stacklevel=3)
        self._plain, report = self._dense()
        self.report = f"{report}, since {self.report} did not hold"
        self._current = self._prepared(self._plain)
        return self._current.point(point.position, scale)

    def _prepared(self, system: ConstrainedSystem) -> System:
        return system if self._num_chains is None else CompiledSystem(system, self._num_chains)

    def _complaint(self, defect: Defect) -> str:
        if not defect.rows:
            return (
                "Outputs nearly stopped depending on their local inputs, where the structure of "
                "the Jacobian costs digits; from here on it is treated as dense. Pass "
                "structure='dense' to do so from the start."
            )
        outputs = [self._names.constraint_name(row) for row in defect.rows]
        inputs = [
            site.name
            for site in self._names.latents
            if any(site.start <= column < site.stop for column in defect.columns)
        ]
        return (
            f"Outputs {_listed(outputs)} turn out to depend on inputs that they did not depend on "
            f"at the start: {outputs[0]!r} on {_listed(inputs)}. From here on the Jacobian is "
            "treated as dense; draws since the last check (structure_check_interval) may be "
            "slightly off. Pass structure='dense' to do so from the start."
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MOST_NAMES])
    more = len(names) - _MOST_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
