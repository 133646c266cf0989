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
from .image import ActNorm as ActNorm
from .image import ImageCoupling as ImageCoupling
from .image import InvertibleConvolution as InvertibleConvolution
from .image import PixelRange as PixelRange
from .image import Squeeze as Squeeze
from .linear import LULinear as LULinear
from .multiscale import MultiScale as MultiScale
from .permutation import Permutation as Permutation
from .permutation import random_cycle as random_cycle
from .quadratic import QuadraticSpline as QuadraticSpline
from .rational_quadratic import RationalQuadraticSpline as RationalQuadraticSpline
from .standardize import ShiftAndScale as ShiftAndScale
from .standardize import Standardize as Standardize

__all__ = [
    "ActNorm",
    "Additive",
    "Affine",
    "Autoregressive",
    "Bijection",
    "Composite",
    "Coupling",
    "ElementwiseMap",
    "ImageCoupling",
    "Inverse",
    "InvertibleConvolution",
    "LULinear",
    "MultiScale",
    "Permutation",
    "PixelRange",
    "QuadraticSpline",
    "RationalQuadraticSpline",
    "ShiftAndScale",
    "Squeeze",
    "Standardize",
    "random_cycle",
]
