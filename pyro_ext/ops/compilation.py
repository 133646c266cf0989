"""What ``torch.compile`` should leave as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributions import Distribution

__all__ = ["validation_kept"]


@contextmanager
def validation_kept() -> Iterator[None]:
    """Keep the validation of distributions, which the first compilation switches off."""
    is_enabled = Distribution._validate_args
    try:
        yield
    finally:
        if Distribution._validate_args != is_enabled:
            Distribution.set_default_validate_args(is_enabled)
