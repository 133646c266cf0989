"""Networks that predict the parameters of distributions; they know nothing of densities."""

from .convolutional import ResidualConvolutionalNetwork as ResidualConvolutionalNetwork
from .energy import EnergyNetwork as EnergyNetwork
from .masked import ResMADE as ResMADE
from .masked import SequentialState as SequentialState
from .residual import ResidualNetwork as ResidualNetwork

__all__ = [
    "EnergyNetwork",
    "ResMADE",
    "ResidualConvolutionalNetwork",
    "ResidualNetwork",
    "SequentialState",
]
