"""Look at a finished run, and hold posteriors of any engine to account."""

from .conversion import deterministic_values as deterministic_values
from .conversion import to_arviz as to_arviz

__all__ = ["deterministic_values", "to_arviz"]
