"""Modules that only some functions need."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["import_optional"]


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
