"""Exceptions and warnings raised by pyro_ext at its public boundary.

Mistakes in arguments are :class:`ValueError` or :class:`TypeError`; the classes here are for
what only shows once a model runs. Inside sampling loops failure is a per-chain status, never
an exception.
"""

__all__ = [
    "DegenerateWeightsError",
    "DiscreteDataWarning",
    "InitializationError",
    "ModelStructureError",
    "NormalizerWarning",
    "PrecisionWarning",
    "PyroExtError",
    "SamplingWarning",
    "VectorizationWarning",
]


class PyroExtError(RuntimeError):
    """Base class of the errors that a running model can cause."""


class ModelStructureError(PyroExtError):
    """The sites of a model changed between two runs."""


class InitializationError(PyroExtError):
    """No input that reproduces the observed outputs was found."""


class DegenerateWeightsError(PyroExtError):
    """All particles of a data set have weight zero; the message names the block."""


class SamplingWarning(UserWarning):
    """A run finished, but its draws deserve suspicion; the message says why."""


class VectorizationWarning(UserWarning):
    """A model cannot be vectorised over chains and is run once per chain instead."""


class PrecisionWarning(UserWarning):
    """A model runs in a precision that limits how exactly its outputs can be matched."""


class NormalizerWarning(UserWarning):
    """Estimates of the normaliser of a density are not what quadrature gives."""


class DiscreteDataWarning(UserWarning):
    """Data of a continuous density look like integers."""
