"""Constrained Hamiltonian Monte Carlo (Graham and Storkey 2017).

The files here make a run out of parts: a kernel, and how a model becomes a system and its chains
find their starting points. ``model`` reads a Pyro model; the other folders compute with numbers,
each importing those to its right: ``warmup -> search -> dynamics -> system -> jacobian``.
"""

from .dynamics.status import Status as Status
from .hmc import ConstrainedHMC as ConstrainedHMC
from .nuts import ConstrainedNUTS as ConstrainedNUTS

__all__ = ["ConstrainedHMC", "ConstrainedNUTS", "Status"]
