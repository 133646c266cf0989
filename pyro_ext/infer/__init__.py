"""Inference engines for Pyro models."""

from .constrained_hmc import ConstrainedHMC as ConstrainedHMC
from .mcmc import MCMC as MCMC

__all__ = ["MCMC", "ConstrainedHMC"]
