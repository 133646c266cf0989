"""The uniform distribution on a closed box."""

from __future__ import annotations

from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["UnitBox"]


class UnitBox(TorchDistribution):
    """
    Uniform on ``[0, 1]`` in every feature, both ends included.

    (``Uniform`` leaves out its upper end, where a flow may put a value by rounding.)

    :param Tensor like: gives dtype, device and the number of features, shape ``(features,)``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.unit_interval, 1)
    has_rsample = True

    def __init__(self, like: Tensor) -> None:
        self._like = like
        super().__init__(torch.Size(), like.shape, validate_args=False)

    def expand(
        self,
        batch_shape: torch.Size | list[int] | tuple[int, ...],
        _instance: UnitBox | None = None,
    ) -> UnitBox:
        """Expand to a larger batch."""
        new = self._get_checked_instance(UnitBox, _instance)
        new._like = self._like
        super(UnitBox, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero inside the box; minus infinity outside."""
        is_inside = ((value >= 0) & (value <= 1)).all(-1)
        return torch.where(is_inside, 0.0, -torch.inf).to(value.dtype)

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draw uniformly."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return torch.rand(shape, dtype=self._like.dtype, device=self._like.device)
