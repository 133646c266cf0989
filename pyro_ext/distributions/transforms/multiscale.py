"""The multi-scale architecture of flows on images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from .bijection import Bijection, Composite
from .image import ActNorm, Squeeze

__all__ = ["MultiScale", "initialize", "level_shapes"]


def level_shapes(
    image_shape: Sequence[int], num_levels: int, factor_out: bool = True
) -> list[tuple[int, int, int]]:
    """
    Shapes of the images that the levels of :class:`MultiScale` see, after the squeeze.

    :param image_shape: channels, height and width.
    :param int num_levels: number of levels.
    :param bool factor_out: whether half of the channels leave after each level but the last.
    :returns: channels, height and width for each level.
    :raises ValueError: if the shape is not one of images, or too small for the levels.
    """
    shape = tuple(image_shape)
    if len(shape) != 3 or any(size < 1 for size in shape):
        raise ValueError(f"image_shape must be (channels, height, width), got {shape}")
    if num_levels < 1:
        raise ValueError(f"a flow on images needs at least one level, got {num_levels}")
    channels, height, width = shape
    if height % 2**num_levels or width % 2**num_levels:
        both = math.gcd(height, width)
        raise ValueError(
            f"{num_levels} levels halve the height and the width {num_levels} times and need "
            f"multiples of {2**num_levels}; {height} x {width} is enough for "
            f"{(both & -both).bit_length() - 1}: pad the images or take fewer levels"
        )
    shapes = []
    for level in range(num_levels):
        if level and factor_out:
            channels //= 2
        channels, height, width = 4 * channels, height // 2, width // 2
        shapes.append((channels, height, width))
    return shapes


class MultiScale(Bijection):
    r"""
    Levels at ever lower resolution, with half of the channels leaving after each.

    Every level first squeezes its images, so that C channels become 4 C at half the resolution,
    then applies its bijection. After each level but the last the second half of the channels
    leaves as noise, the first half goes on. All noise together is one vector of
    :math:`D = CHW` elements, first what left first: data have three event dimensions, **noise has
    one**, so that any distribution over vectors serves as the base.

    A context is a vector, as for every bijection. With ``context_shape`` it is the elements of an
    image and is squeezed together with the data, so that each level sees it at its own resolution
    with nothing lost; without, every pixel sees the whole vector, as an image of height and width
    1.

    :param image_shape: channels C, height H and width W of the data.
    :param levels: a bijection for each level, which keeps the shape of its images
        (:func:`level_shapes`).
    :param bool factor_out: whether channels leave; without, all go through all levels, as for
        CIFAR-10 in Durkan et al. 2019.
    :param context_shape: channels, height and width of a context that is an image; height and
        width are those of the data.
    :raises ValueError: if a shape is not one of images, or too small for the levels.

    Reference: Dinh, Sohl-Dickstein and Bengio 2017, "Density estimation using Real NVP",
    section 3.6.

    >>> from pyro_ext.distributions.transforms.image import InvertibleConvolution
    >>> from pyro_ext.distributions.transforms.multiscale import MultiScale, level_shapes
    >>> level_shapes((3, 8, 8), 2)
    [(12, 4, 4), (24, 2, 2)]
    >>> flow = MultiScale((3, 8, 8), [InvertibleConvolution(12), InvertibleConvolution(24)])
    >>> z, log_det = flow.to_noise(torch.randn(10, 3, 8, 8))
    >>> z.shape, log_det.shape
    (torch.Size([10, 192]), torch.Size([10]))
    """

    event_dim = 3
    noise_event_dim = 1
    """Dimensions of one noise value, counted from the right."""

    def __init__(
        self,
        image_shape: Sequence[int],
        levels: Iterable[Bijection],
        *,
        factor_out: bool = True,
        context_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.levels: Sequence[Bijection] = nn.ModuleList(levels)  # type: ignore[assignment]
        self.squeeze = Squeeze()
        self.image_shape = tuple(image_shape)
        *before, last = level_shapes(image_shape, len(self.levels), factor_out)
        leaving = [(channels // 2, height, width) for channels, height, width in before]
        self.noise_shapes = [*(leaving if factor_out else ()), last]
        """Shapes of the images that leave, in the order of the noise."""
        if context_shape is not None and (
            len(context_shape) != 3 or tuple(context_shape[1:]) != self.image_shape[1:]
        ):
            raise ValueError(
                "a context that is an image needs the height and width of the data, got "
                f"context_shape={tuple(context_shape)} for images of shape {self.image_shape}"
            )
        self.context_shape = None if context_shape is None else tuple(context_shape)

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Map images to noise.

        :param Tensor x: images, shape ``batch_shape + (C, H, W)``.
        :param Tensor context: shape ``batch_shape + (context_features,)``, or broadcastable.
        :returns: the noise of shape ``batch_shape + (C * H * W,)`` and ``log |det dz/dx|``.
        :raises ValueError: if the images have another shape.
        """
        if tuple(x.shape[-3:]) != self.image_shape:
            raise ValueError(
                f"images must have shape (..., {', '.join(map(str, self.image_shape))}), got "
                f"{tuple(x.shape)}"
            )
        return self._to_noise(x, context, lambda level, *inputs: level.to_noise(*inputs))

    def _to_noise(
        self,
        x: Tensor,
        context: Tensor | None,
        apply: Callable[[Bijection, Tensor, Tensor | None], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """:meth:`to_noise` with a function that applies a level."""
        noise: list[Tensor] = []
        log_det = x.new_zeros(x.shape[:-3])
        for level, image_context in zip(self.levels, self._contexts(context), strict=True):
            x, _ = self.squeeze.to_noise(x)
            x, log_det_of_level = apply(level, x, image_context)
            log_det = log_det + log_det_of_level
            if len(noise) < len(self.noise_shapes) - 1:
                x, leaving = x.chunk(2, -3)
                noise.append(leaving.flatten(-3))
        noise.append(x.flatten(-3))
        # contexts may have more batch dimensions than data, from the first coupling on
        return torch.cat([part.expand(*log_det.shape, -1) for part in noise], -1), log_det

    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Map noise to images, the inverse of :meth:`to_noise`.

        :param Tensor z: noise, shape ``batch_shape + (C * H * W,)``.
        :param Tensor context: shape ``batch_shape + (context_features,)``, or broadcastable.
        :returns: images of shape ``batch_shape + (C, H, W)`` and ``log |det dx/dz|``.
        :raises ValueError: if the noise has another size.
        """
        sizes = [math.prod(shape) for shape in self.noise_shapes]
        if z.shape[-1] != sum(sizes):
            raise ValueError(f"noise must have shape (..., {sum(sizes)}), got {tuple(z.shape)}")
        *leaving, x = z.split(sizes, -1)
        x, log_det = x.unflatten(-1, self.noise_shapes[-1]), z.new_zeros(z.shape[:-1])
        contexts = self._contexts(context)
        for index in reversed(range(len(self.levels))):
            if index < len(leaving):
                part = leaving[index].unflatten(-1, self.noise_shapes[index])
                x = torch.cat((x, part.expand(*x.shape[:-3], -1, -1, -1)), -3)
            x, log_det_of_level = self.levels[index].to_data(x, contexts[index])
            x, _ = self.squeeze.to_data(x)
            log_det = log_det + log_det_of_level
        return x, log_det

    def _contexts(self, context: Tensor | None) -> list[Tensor | None]:
        """The context as each level sees it, an image of its resolution or of one pixel."""
        if context is None:
            return [None] * len(self.levels)
        if self.context_shape is None:
            return [context[..., None, None]] * len(self.levels)
        images = [context.unflatten(-1, self.context_shape)]
        for _ in self.levels:
            images.append(self.squeeze.to_noise(images[-1])[0])
        return images[1:]


def initialize(bijection: Bijection, x: Tensor, context: Tensor | None = None) -> None:
    """
    Set every :class:`~pyro_ext.distributions.transforms.image.ActNorm` of a bijection from data.

    Each sees what the layers before it, already set, make of the data.

    :param Bijection bijection: a layer, or a :class:`Composite` or :class:`MultiScale` of layers.
    :param Tensor x: images, shape ``batch_shape + (channels, height, width)``.
    :param Tensor context: their contexts.
    """
    with torch.no_grad():
        _initialize(bijection, x, context)


def _initialize(bijection: Bijection, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    if isinstance(bijection, MultiScale):
        return bijection._to_noise(x, context, _initialize)
    if isinstance(bijection, Composite):
        log_det = x.new_zeros(())
        for part in bijection.bijections:
            x, _ = _initialize(part, x, context)
        return x, log_det
    if isinstance(bijection, ActNorm):
        bijection.initialize(x)
    return bijection.to_noise(x, context)
