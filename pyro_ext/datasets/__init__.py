"""Data to try densities on: exact densities in the plane, small images, published tables."""

from .images import digits as digits
from .images import natural_image_patches as natural_image_patches
from .plane import Checkerboard as Checkerboard
from .plane import Rings as Rings
from .plane import RotatedGrid as RotatedGrid
from .plane import TwoSpirals as TwoSpirals
from .split import Split as Split
from .tabular import load_tabular as load_tabular

__all__ = [
    "Checkerboard",
    "Rings",
    "RotatedGrid",
    "Split",
    "TwoSpirals",
    "digits",
    "load_tabular",
    "natural_image_patches",
]
