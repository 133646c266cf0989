"""Videos of bouncing digits, after Srivastava et al. 2015 and Wu et al. 2020."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from canvas import SIZE, place
from torch import Tensor

from pyro_ext.datasets import digits

SPEED = 0.3  # in a frame; a canvas is crossed in about seven


class Videos(NamedTuple):
    """Binary videos, and what they were made from."""

    frames: Tensor  # (videos, frames, CANVAS, CANVAS), of zeros and ones
    clean: Tensor  # the same, before pixels were drawn: their probabilities
    where: Tensor  # (videos, frames, digits, 2)
    images: Tensor  # (videos, digits, SIZE, SIZE)


def load_images(part="train"):
    """Images of digits between 0 and 1, ``(n, SIZE, SIZE)``; ``part`` is "train" or "test".

    Of MNIST where ``PYRO_EXT_DATA`` has it, a folder with ``mnist.npz`` or the file itself, and
    otherwise of scikit-learn.
    """
    path = Path(os.environ.get("PYRO_EXT_DATA", "")) / "mnist.npz"
    path = path if path.exists() else path.parent
    if path.suffix == ".npz" and path.is_file():
        with np.load(path) as file:
            grey = torch.from_numpy(file[f"x_{part}"]).unsqueeze(1) / 255
    else:
        grey = getattr(digits(), part) / 16
    grey = grey.to(torch.get_default_dtype())
    resized = F.interpolate(grey, (SIZE, SIZE), mode="bicubic", antialias=True)[:, 0]
    # most pixels of small images are grey: draw them darker, so that strokes have an edge
    return (1.6 * resized - 0.3).clamp(0, 1)


@torch.no_grad()
def simulate(images, num_videos, num_digits=3, num_frames=10):
    """Draw digits and trajectories, and let them bounce off the walls."""
    chosen = images[torch.randint(len(images), (num_videos, num_digits))]
    where = trajectories(num_videos, num_digits, num_frames)
    placed = place(chosen.unsqueeze(1), where)
    clean = 1 - (1 - placed).prod(2)
    return Videos(torch.bernoulli(clean), clean, where, chosen)


def trajectories(num_videos, num_digits, num_frames):
    """Straight lines with elastic reflections at -1 and 1, ``(videos, frames, digits, 2)``."""
    start = 2 * torch.rand(num_videos, 1, num_digits, 2) - 1
    angle = 2 * torch.pi * torch.rand(num_videos, 1, num_digits)
    velocity = SPEED * torch.stack([angle.cos(), angle.sin()], -1)
    free = start + velocity * torch.arange(num_frames).to(start)[:, None, None]
    # a wall folds the line: a triangle wave of period 4
    return 1 - ((free + 1) % 4 - 2).abs()
