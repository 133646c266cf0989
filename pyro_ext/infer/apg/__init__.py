"""Amortized population Gibbs: learned block proposals and weighted posterior samples."""

from .apg import APG as APG
from .exact_block import ExactBlock as ExactBlock
from .factors import WithFactors as WithFactors
from .objective import APGObjective as APGObjective
from .weighted_samples import History as History
from .weighted_samples import WeightedSamples as WeightedSamples

__all__ = ["APG", "APGObjective", "ExactBlock", "History", "WeightedSamples", "WithFactors"]
