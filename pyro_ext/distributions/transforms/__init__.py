"""Invertible maps between data and noise, the layers of normalizing flows.

A *map* is a family of increasing functions of one variable and gets its parameters with every
call; a *bijection* is a layer with trainable parameters of its own.
"""

from .affine import Additive as Additive
from .affine import Affine as Affine
from .autoregressive import Autoregressive as Autoregressive
from .bijection import Bijection as Bijection
from .bijection import Composite as Composite
from .bijection import Inverse as Inverse
from .coupling import Coupling as Coupling
from .elementwise import ElementwiseMap as ElementwiseMap
from .linear import LULinear as LULinear
from .permutation import Permutation as Permutation
from .permutation import random_cycle as random_cycle
from .quadratic import QuadraticSpline as QuadraticSpline
from .rational_quadratic import RationalQuadraticSpline as RationalQuadraticSpline
from .standardize import Standardize as Standardize

__all__ = [
    "Additive",
    "Affine",
    "Autoregressive",
    "Bijection",
    "Composite",
    "Coupling",
    "ElementwiseMap",
    "Inverse",
    "LULinear",
    "Permutation",
    "QuadraticSpline",
    "RationalQuadraticSpline",
    "Standardize",
    "random_cycle",
]
