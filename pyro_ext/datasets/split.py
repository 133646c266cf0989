"""What every data set is: tensors to train, to validate and to test on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Split"]


class Split(NamedTuple):
    """A data set in three disjoint parts, one row per example in each."""

    train: Tensor
    """Rows to fit."""

    validation: Tensor
    """Rows to choose settings and stopping times by."""

    test: Tensor
    """Rows to report on, once."""

    name: str
    """Name of the data set."""

    labels: Split | None = None
    """Classes of the rows in the same three parts, for data that has them."""
