"""Score-based diffusion: densities whose gradients, blurred by noise, a network has learned."""

from .bound import Elbo as Elbo
from .dequantized import dequantized_training_loss as dequantized_training_loss
from .distribution import OdeDensity as OdeDensity
from .distribution import ScoreFlowDistribution as ScoreFlowDistribution
from .score_flow import ScoreFlow as ScoreFlow
from .sde import SDE as SDE
from .sde import VESDE as VESDE
from .sde import VPSDE as VPSDE
from .sde import SubVPSDE as SubVPSDE
from .settings import OdeSettings as OdeSettings

__all__ = [
    "SDE",
    "VESDE",
    "VPSDE",
    "Elbo",
    "OdeDensity",
    "OdeSettings",
    "ScoreFlow",
    "ScoreFlowDistribution",
    "SubVPSDE",
    "dequantized_training_loss",
]
