"""Inference engines and guides for Pyro models."""

from .apg import APG as APG
from .apg import ExactBlock as ExactBlock
from .apg import WeightedSamples as WeightedSamples
from .apg import WithFactors as WithFactors
from .auto_spline_flow import AutoSplineFlow as AutoSplineFlow
from .conditional_prior import ConditionalPriorGuide as ConditionalPriorGuide
from .constrained_hmc import ConstrainedHMC as ConstrainedHMC
from .constrained_hmc import ConstrainedNUTS as ConstrainedNUTS
from .contrastive import NeuralLikelihoodEstimator as NeuralLikelihoodEstimator
from .contrastive import NeuralPosteriorEstimator as NeuralPosteriorEstimator
from .contrastive import NeuralRatioEstimator as NeuralRatioEstimator
from .mcmc import MCMC as MCMC

__all__ = [
    "APG",
    "MCMC",
    "AutoSplineFlow",
    "ConditionalPriorGuide",
    "ConstrainedHMC",
    "ConstrainedNUTS",
    "ExactBlock",
    "NeuralLikelihoodEstimator",
    "NeuralPosteriorEstimator",
    "NeuralRatioEstimator",
    "WeightedSamples",
    "WithFactors",
]
