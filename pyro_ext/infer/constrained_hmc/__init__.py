"""Constrained Hamiltonian Monte Carlo (Graham and Storkey 2017).

Layers, each importing only those to its right:
``kernel -> transitions -> integrator -> projection -> system -> structure``.
``kernel`` and ``model`` alone know Pyro.
"""

from .kernel import ConstrainedHMC as ConstrainedHMC
from .status import Status as Status

__all__ = ["ConstrainedHMC", "Status"]
