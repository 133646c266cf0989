"""Inference engines and distributions that Pyro lacks, in Pyro's own vocabulary.

Importing this package changes no global state of torch or Pyro.
"""

from .diagnostics import deterministic_values as deterministic_values
from .diagnostics import to_arviz as to_arviz
from .distributions import AutoregressiveEnergyMachine as AutoregressiveEnergyMachine
from .distributions import NeuralSplineFlow as NeuralSplineFlow
from .distributions import ScoreFlow as ScoreFlow
from .infer import APG as APG
from .infer import MCMC as MCMC
from .infer import AutoSplineFlow as AutoSplineFlow
from .infer import ConditionalPriorGuide as ConditionalPriorGuide
from .infer import ConstrainedHMC as ConstrainedHMC
from .infer import ConstrainedNUTS as ConstrainedNUTS
from .infer import NeuralLikelihoodEstimator as NeuralLikelihoodEstimator
from .infer import NeuralPosteriorEstimator as NeuralPosteriorEstimator
from .infer import NeuralRatioEstimator as NeuralRatioEstimator
from .poutine import condition_on as condition_on
from .poutine import frozen as frozen
from .poutine import lift_observations as lift_observations
from .training import fit_density as fit_density

__version__ = "0.1.0"

__all__ = [
    "APG",
    "MCMC",
    "AutoSplineFlow",
    "AutoregressiveEnergyMachine",
    "ConditionalPriorGuide",
    "ConstrainedHMC",
    "ConstrainedNUTS",
    "NeuralLikelihoodEstimator",
    "NeuralPosteriorEstimator",
    "NeuralRatioEstimator",
    "NeuralSplineFlow",
    "ScoreFlow",
    "__version__",
    "condition_on",
    "deterministic_values",
    "fit_density",
    "frozen",
    "lift_observations",
    "to_arviz",
]
