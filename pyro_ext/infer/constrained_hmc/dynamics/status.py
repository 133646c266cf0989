"""What can happen to one chain during one trajectory."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Status"]


class Status(IntEnum):
    """Per-chain outcome of a trajectory; anything but ``CONVERGED`` rejects the proposal."""

    CONVERGED = 0
    NOT_CONVERGED = 1
    """A projection onto the manifold found no solution within its iterations."""
    NON_REVERSIBLE = 2
    """A projection, retraced from its end, came back to another point."""
    DIVERGENT = 3
    """The energy error is larger than the divergence threshold or not finite, or the Jacobian
    lost rank."""
