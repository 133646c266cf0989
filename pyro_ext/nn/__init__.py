"""Networks that predict the parameters of distributions; they know nothing of densities."""

from .convolutional import ResidualConvolutionalNetwork as ResidualConvolutionalNetwork
from .energy import EnergyNetwork as EnergyNetwork
from .exponential_family import BernoulliHead as BernoulliHead
from .exponential_family import BetaHead as BetaHead
from .exponential_family import CategoricalHead as CategoricalHead
from .exponential_family import DirichletHead as DirichletHead
from .exponential_family import GammaHead as GammaHead
from .exponential_family import NormalGammaHead as NormalGammaHead
from .exponential_family import NormalHead as NormalHead
from .masked import ResMADE as ResMADE
from .masked import SequentialState as SequentialState
from .pairs import PairLogits as PairLogits
from .residual import ResidualNetwork as ResidualNetwork
from .score import ScoreNetwork as ScoreNetwork
from .score import TimeEmbedding as TimeEmbedding
from .sufficient_statistics import PointwiseStatistics as PointwiseStatistics
from .sufficient_statistics import SoftMoments as SoftMoments
from .unet import UNet as UNet

__all__ = [
    "BernoulliHead",
    "BetaHead",
    "CategoricalHead",
    "DirichletHead",
    "EnergyNetwork",
    "GammaHead",
    "NormalGammaHead",
    "NormalHead",
    "PairLogits",
    "PointwiseStatistics",
    "ResMADE",
    "ResidualConvolutionalNetwork",
    "ResidualNetwork",
    "ScoreNetwork",
    "SequentialState",
    "SoftMoments",
    "TimeEmbedding",
    "UNet",
]
