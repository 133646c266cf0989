"""Conditional inference in trained models: small networks fitted to whatever evidence there is."""

from .fitting import FitResult as FitResult
from .guide import ConditionalPriorGuide as ConditionalPriorGuide
from .importance import ImportanceBound as ImportanceBound

__all__ = ["ConditionalPriorGuide", "FitResult", "ImportanceBound"]
