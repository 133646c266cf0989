"""Small images that ship with scikit-learn, so that nothing is downloaded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..optional import import_optional
from .split import Split

__all__ = ["digits", "natural_image_patches"]

# Columns of an image, as fractions of its width.
_BANDS = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}


def digits(
    *,
    flat: bool = False,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
    seed: int = 0,
) -> Split:
    """
    Handwritten digits of 8 by 8 pixels with 17 grey levels (Alpaydin and Kaynak 1998).

    The 1797 images are scikit-learn's copy of the test set of the UCI data set "Optical
    recognition of handwritten digits", here shuffled and split. They are integers from 0 to 16:
    densities of continuous variables need dequantisation first, for example
    ``(x + torch.rand(x.shape)) / 17``.

    :param bool flat: return rows of 64 pixels instead of images.
    :param fractions: parts for training, validation and testing, which add up to one.
    :param int seed: seed of the shuffle.
    :returns: images of shape ``(n, 1, 8, 8)``, or ``(n, 64)`` when flat, and the digits they show
        as ``labels`` of shape ``(n,)``, all of dtype ``int64``.
    :raises ValueError: if the fractions are not three positive numbers that add up to one.
    :raises ImportError: without scikit-learn.

    Example::

        >>> from pyro_ext.datasets import digits
        >>> split = digits()
        >>> split.train.shape, split.labels.train.shape
        (torch.Size([1257, 1, 8, 8]), torch.Size([1257]))
    """
    if (
        len(fractions) != 3
        or any(part <= 0 for part in fractions)
        or not math.isclose(sum(fractions), 1.0)
    ):
        raise ValueError(
            f"fractions must be three positive numbers that add up to one, got {fractions}."
        )
    bunch = import_optional("sklearn.datasets", "scikit-learn", "digits()").load_digits()
    images, labels = torch.from_numpy(bunch.images).long(), torch.from_numpy(bunch.target).long()
    images = images.flatten(1) if flat else images.unsqueeze(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    num_train, num_validation = (int(part * len(images)) for part in fractions[:2])
    sizes = [num_train, num_validation, len(images) - num_train - num_validation]
    train, validation, test = order.split(sizes)
    return Split(
        images[train],
        images[validation],
        images[test],
        "digits",
        Split(labels[train], labels[validation], labels[test], "digits: labels"),
    )


def natural_image_patches(
    size: int = 8,
    *,
    num_train: int = 100_000,
    num_validation: int = 5_000,
    num_test: int = 10_000,
    seed: int = 0,
) -> Split:
    """
    Grey patches of two photographs, prepared like the patches of BSDS300 (Zoran and Weiss 2011).

    The photographs are scikit-learn's sample images, a temple and a flower. Patches are cut at
    random places of separate bands of columns: the left 70% of each photograph for training, the
    next 10% for validation and the right 20% for testing, so that no two parts share a pixel.
    They are prepared as in Uria et al. 2013: grey levels (the mean of the three colours, rounded)
    are dequantised by uniform noise and divided by 256, the mean of each patch is subtracted and
    its last pixel, which the others then determine, is left out.

    :param int size: height and width of a patch.
    :param int num_train: patches to train on.
    :param int num_validation: patches to validate on.
    :param int num_test: patches to test on.
    :param int seed: seed of the places and the noise.
    :returns: rows of ``size ** 2 - 1`` numbers, 63 by default, in the default dtype.
    :raises ValueError: for a size that does not fit into the bands, or numbers below one.
    :raises ImportError: without scikit-learn, or Pillow, which it reads images with.

    Example::

        >>> from pyro_ext.datasets import natural_image_patches
        >>> natural_image_patches(num_train=1000).train.shape
        torch.Size([1000, 63])
    """
    numbers = {"train": num_train, "validation": num_validation, "test": num_test}
    if min(numbers.values()) < 1:
        raise ValueError(f"Every part must have at least one patch, got {numbers}.")
    photographs = _grey_photographs()
    height, width = photographs.shape[1:]
    bands = {part: (int(a * width), int(b * width)) for part, (a, b) in _BANDS.items()}
    largest = min(height, *(last - first for first, last in bands.values()))
    if not 2 <= size <= largest:
        raise ValueError(f"size must be between 2 and {largest} pixels, got {size}.")
    generator = torch.Generator().manual_seed(seed)
    parts = {
        part: _prepared(_cut(photographs[..., slice(*bands[part])], size, number, generator))
        for part, number in numbers.items()
    }
    name = f"natural image patches, {size} x {size}"
    return Split(parts["train"], parts["validation"], parts["test"], name)


def _grey_photographs() -> Tensor:
    """Grey levels from 0 to 255, shape ``(2, 427, 640)``."""
    purpose = "natural_image_patches()"
    datasets = import_optional("sklearn.datasets", "scikit-learn", purpose)
    import_optional("PIL", "pillow", purpose)
    colours = [torch.tensor(image) for image in datasets.load_sample_images().images]
    return torch.stack(colours).double().mean(-1).round()


def _cut(band: Tensor, size: int, number: int, generator: torch.Generator) -> Tensor:
    """Dequantised patches at random places, shape ``(number, size, size)``."""
    num_photographs, height, width = band.shape
    photograph, first_row, first_column = (
        torch.randint(number_of_places, (number, 1, 1), generator=generator)
        for number_of_places in (num_photographs, height - size + 1, width - size + 1)
    )
    offsets = torch.arange(size)
    patches = band[photograph, first_row + offsets.unsqueeze(-1), first_column + offsets]
    return patches + torch.rand(patches.shape, generator=generator, dtype=patches.dtype)


def _prepared(patches: Tensor) -> Tensor:
    rows = patches.flatten(1) / 256
    centred = rows - rows.mean(1, keepdim=True)
    return centred[:, :-1].to(torch.get_default_dtype())
