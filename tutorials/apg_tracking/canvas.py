"""Put small images onto a canvas, and cut them out again: a spatial transformer for translations.

A position is a pair of numbers, across and down: -1 where the image touches the left or upper edge
of the canvas, and 1 where it touches the right or lower one. Between pixels it is bilinear, as
``torch.nn.functional.grid_sample`` is. A translation acts on rows and columns separately, so that
it is two products of matrices, which take a quarter of the time.
"""

import torch

CANVAS = 40
SIZE = 12  # of a digit
RANGE = CANVAS - SIZE  # how many pixels a digit can move


def place(images, positions):
    """Images ``(..., SIZE, SIZE)`` at positions ``(..., 2)`` of empty canvases."""
    columns, rows = _interpolation(positions).unbind(-3)
    return rows @ images @ columns.mT


def crop(canvases, positions):
    """Cut images at positions out of canvases ``(..., CANVAS, CANVAS)``; as large as SIZE."""
    columns, rows = _interpolation(positions).unbind(-3)
    return rows.mT @ canvases @ columns


def _interpolation(positions):
    """Weights ``(..., 2, CANVAS, SIZE)`` of the pixels of an image in those of a canvas."""
    start = 0.5 * RANGE * (positions + 1)
    across = torch.arange(CANVAS).to(positions)[:, None] - torch.arange(SIZE).to(positions)
    # in place, as new memory for so many numbers costs more than they do
    distance = (across - start[..., None, None]).abs_()
    return distance.neg_().add_(1).clamp_(min=0)


def pixel_positions(like):
    """The positions where pixels of an image meet those of the canvas, from -1 to 1."""
    return torch.linspace(-1, 1, RANGE + 1).to(like)
