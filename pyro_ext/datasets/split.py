"""What every data set is: tensors to train, to validate and to test on."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Split", "import_optional"]


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


def import_optional(module: str, package: str, purpose: str) -> Any:
    """
    Import a module that pyro_ext does not depend on.

    :param str module: what to import.
    :param str package: what ``pip install`` calls it.
    :param str purpose: what needs it, the beginning of the message.
    :raises ImportError: if it is missing, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {package}: pip install {package}") from error
