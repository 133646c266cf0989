"""Contrastive likelihood-free inference: posteriors of simulators from simulations alone."""

from .likelihood_estimator import NeuralLikelihoodEstimator as NeuralLikelihoodEstimator
from .posterior import Posterior as Posterior
from .posterior import WeightedDraws as WeightedDraws
from .posterior_estimator import NeuralPosteriorEstimator as NeuralPosteriorEstimator
from .posteriors import FlowPosterior as FlowPosterior
from .posteriors import RatioPosterior as RatioPosterior
from .ratio_estimator import NeuralRatioEstimator as NeuralRatioEstimator
from .simulations import Simulations as Simulations

__all__ = [
    "FlowPosterior",
    "NeuralLikelihoodEstimator",
    "NeuralPosteriorEstimator",
    "NeuralRatioEstimator",
    "Posterior",
    "RatioPosterior",
    "Simulations",
    "WeightedDraws",
]
