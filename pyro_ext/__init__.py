"""Inference engines and distributions that Pyro lacks, in Pyro's own vocabulary.

Importing this package changes no global state of torch or Pyro.
"""

from .diagnostics import deterministic_values as deterministic_values
from .diagnostics import to_arviz as to_arviz
from .infer import MCMC as MCMC
from .infer import ConstrainedHMC as ConstrainedHMC
from .poutine import lift_observations as lift_observations

__version__ = "0.1.0"

__all__ = [
    "MCMC",
    "ConstrainedHMC",
    "__version__",
    "deterministic_values",
    "lift_observations",
    "to_arviz",
]
