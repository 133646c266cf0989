"""Everything of ``pyro.distributions``, and ours: one import replaces the other."""

from pyro.distributions import *  # noqa: F403
from pyro.distributions import __all__ as _of_pyro

from .dequantization import Dequantized as Dequantized
from .dequantization import DequantizedFlow as DequantizedFlow
from .dequantization import UniformDequantization as UniformDequantization
from .dequantization import VariationalDequantization as VariationalDequantization
from .dequantization import bits_per_dimension as bits_per_dimension
from .diffusion import ScoreFlow as ScoreFlow
from .diffusion import ScoreFlowDistribution as ScoreFlowDistribution
from .energy import AutoregressiveEnergyMachine as AutoregressiveEnergyMachine
from .energy import EnergyMachineDistribution as EnergyMachineDistribution
from .energy import KernelDensityAEM as KernelDensityAEM
from .flow import FlowDistribution as FlowDistribution
from .image_flow import ImageSplineFlow as ImageSplineFlow
from .normal_gamma import NormalGamma as NormalGamma
from .spline_flow import NeuralSplineFlow as NeuralSplineFlow

__all__ = [
    *_of_pyro,
    "AutoregressiveEnergyMachine",
    "Dequantized",
    "DequantizedFlow",
    "EnergyMachineDistribution",
    "FlowDistribution",
    "ImageSplineFlow",
    "KernelDensityAEM",
    "NeuralSplineFlow",
    "NormalGamma",
    "ScoreFlow",
    "ScoreFlowDistribution",
    "UniformDequantization",
    "VariationalDequantization",
    "bits_per_dimension",
]
