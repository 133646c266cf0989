"""Everything of ``pyro.distributions``, and ours: one import replaces the other."""

from pyro.distributions import *  # noqa: F403
from pyro.distributions import __all__ as _of_pyro

from .flow import FlowDistribution as FlowDistribution
from .spline_flow import NeuralSplineFlow as NeuralSplineFlow

__all__ = [*_of_pyro, "FlowDistribution", "NeuralSplineFlow"]
