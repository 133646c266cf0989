"""Constrained Hamiltonian Monte Carlo (Graham and Storkey 2017).

Layers, each importing only those to its right:
``kernel -> transitions -> integrator -> projection -> system -> structure``.
``kernel`` and ``model`` alone know Pyro.
"""

from .hmc import ConstrainedHMC as ConstrainedHMC
from .nuts import ConstrainedNUTS as ConstrainedNUTS
from .status import Status as Status

__all__ = ["ConstrainedHMC", "ConstrainedNUTS", "Status"]
