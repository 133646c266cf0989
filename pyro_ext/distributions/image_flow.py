"""Neural spline flows over images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from pyro.distributions import Normal
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution

from ..nn import ResidualConvolutionalNetwork
from .flow import FlowDistribution
from .transforms.affine import Affine
from .transforms.bijection import Bijection, Composite
from .transforms.elementwise import ElementwiseMap
from .transforms.image import ActNorm, ImageCoupling, InvertibleConvolution, PixelRange
from .transforms.multiscale import MultiScale, initialize, level_shapes
from .transforms.rational_quadratic import RationalQuadraticSpline

__all__ = ["ImageSplineFlow"]


class ImageSplineFlow(nn.Module):
    r"""
    A flow over images: Glow with spline couplings and residual networks.

    Pixels are mapped affinely from ``[low, high]`` to :math:`[-\tfrac12, \tfrac12]`. Each level
    squeezes squares of four pixels into channels, makes some steps, each an activation
    normalisation, an invertible 1×1 convolution and a coupling, and ends with one more
    convolution; then half of the channels leave. The call returns the distribution::

        flow = ImageSplineFlow((3, 32, 32), levels=3, steps_per_level=7)
        flow.initialize(images[:256])         # recommended before training
        loss = -flow().log_prob(images).mean()

    The paper takes seven steps per level and batch normalisation in the networks. Batches that are
    normalised make the density of one image depend on the others of its batch while training: call
    :meth:`eval` before sampling, before comparing densities, and for inference.

    :param image_shape: channels, height and width; height and width multiples of
        ``2**levels``.
    :param int levels: number of levels, each at half the resolution of the one before.
    :param int steps_per_level: number of steps in each.
    :param str spline: functions in the couplings: ``"rational_quadratic"``, or ``"affine"`` for
        the flow without splines.
    :param int bins: bins of a spline.
    :param float bound: splines are the identity outside ``[-bound, bound]``.
    :param int hidden_channels: hidden channels of the networks.
    :param int residual_blocks: blocks of the networks.
    :param bool batch_norm: batch normalisation in the networks.
    :param float dropout: probability of dropping a hidden unit in the networks.
    :param bool factor_out: whether half of the channels leave after each level but the last.
    :param context_shape: shape of a context: ``(features,)`` for a vector, ``(channels, height,
        width)`` for an image of the height and width of the data; ``None`` for no context.
    :param base: distribution of the noise, over vectors of ``channels * height * width``
        elements, or a function of the context that returns one, for example a module; standard
        normal when ``None``.
    :param float low: value of the darkest pixels.
    :param float high: value of the brightest pixels.
    :raises ValueError: if a setting is out of its range or the image too small for the levels.

    Reference: Durkan, Bekasov, Murray and Papamakarios 2019, "Neural Spline Flows", section 5.3
    and appendix B.3; Kingma and Dhariwal 2018, "Glow".

    >>> from pyro_ext.distributions.image_flow import ImageSplineFlow
    >>> flow = ImageSplineFlow((1, 8, 8), levels=2, steps_per_level=2, hidden_channels=16)
    >>> images = torch.rand(100, 1, 8, 8)
    >>> flow.initialize(images)
    >>> flow().log_prob(images).shape, flow().sample((5,)).shape
    (torch.Size([100]), torch.Size([5, 1, 8, 8]))
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        levels: int = 2,
        steps_per_level: int = 4,
        spline: str = "rational_quadratic",
        bins: int = 4,
        bound: float = 3.0,
        hidden_channels: int = 64,
        residual_blocks: int = 3,
        batch_norm: bool = False,
        dropout: float = 0.0,
        factor_out: bool = True,
        context_shape: Sequence[int] | None = None,
        base: TorchDistribution | Callable[..., TorchDistribution] | None = None,
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        super().__init__()
        shapes = level_shapes(image_shape, levels, factor_out)
        if steps_per_level < 1:
            raise ValueError(f"steps_per_level must be at least 1, got {steps_per_level}")
        self.image_shape = torch.Size(image_shape)
        self.context_shape = torch.Size(context_shape or ())
        if context_shape is not None and len(self.context_shape) not in (1, 3):
            raise ValueError(
                "context_shape must be (features,) or (channels, height, width), got "
                f"{tuple(context_shape)}"
            )
        is_image = len(self.context_shape) == 3
        elementwise_map = _elementwise_map(spline, bins, bound)

        def level(index: int) -> Bijection:
            channels = shapes[index][0]
            squeezed = 4 ** (index + 1) if is_image else 1
            network = partial(
                ResidualConvolutionalNetwork,
                hidden_channels=hidden_channels,
                context_channels=self.context_shape[0] * squeezed if self.context_shape else 0,
                residual_blocks=residual_blocks,
                batch_norm=batch_norm,
                dropout=dropout,
            )
            layers: list[Bijection] = [] if index else [PixelRange(low, high)]
            for _ in range(steps_per_level):
                layers.append(ActNorm(channels))
                layers.append(InvertibleConvolution(channels))
                layers.append(ImageCoupling(channels, elementwise_map, network))
            composite = Composite([*layers, InvertibleConvolution(channels)])
            return composite

        self.bijection = MultiScale(
            image_shape,
            [level(index) for index in range(levels)],
            factor_out=factor_out,
            context_shape=self.context_shape if is_image else None,
        )
        self.base = base
        self.range = (low, high)

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """
        The distribution over images.

        :param Tensor context: shape ``batch_shape + context_shape``.
        :returns: a distribution with event shape ``(channels, height, width)``; its batch shape
            is that of the context, empty without one.
        :raises ValueError: if a context is missing, not expected, or has the wrong shape, or the
            base distribution has another size.
        """
        flat_context = self._flat_context(context)
        return FlowDistribution(
            self.bijection, self._noise(context), flat_context, event_shape=self.image_shape
        )

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """
        Choose the scales and shifts of all activation normalisations from a batch of images.

        Each channel then has zero mean and unit variance in this batch wherever one of these
        layers stands. For integer images, see the example of
        :class:`~pyro_ext.distributions.dequantization.DequantizedFlow`.

        :param Tensor x: images, shape ``(..., channels, height, width)``; a few hundred.
        :param Tensor context: their contexts.
        :raises ValueError: if values are outside of the range of the pixels, NaN or infinite, or
            a shape is wrong.
        """
        low, high = self.range
        if not ((x >= low) & (x <= high)).all():
            raise ValueError(
                f"pixels must be between low={low} and high={high}, got values between "
                f"{x.min().item()} and {x.max().item()}: scale the images, or give the flow their "
                "range"
            )
        initialize(self.bijection, x, self._flat_context(context))

    @property
    def is_initialized(self) -> bool:
        """Whether :meth:`initialize` has run, here or before the weights were saved."""
        return all(bool(m.initialized) for m in self.modules() if isinstance(m, ActNorm))

    def _noise(self, context: Tensor | None) -> TorchDistribution:
        size = math.prod(self.image_shape)
        base = self.base
        if base is None:
            like = next(self.bijection.parameters())
            return Normal(like.new_zeros(size), like.new_ones(size), validate_args=False).to_event(
                1
            )
        if not isinstance(base, Distribution):
            base = base() if context is None else base(context)
        if base.event_shape != (size,):
            raise ValueError(
                f"the base distribution must be over vectors of {size} elements, got event_shape "
                f"{tuple(base.event_shape)}; independent numbers become one event by .to_event(1)"
            )
        return base

    def _flat_context(self, context: Tensor | None) -> Tensor | None:
        """The context as bijections take it: one vector for each image."""
        shape = self.context_shape
        if context is None:
            if shape:
                raise ValueError(f"the flow needs a context of shape (..., {_listed(shape)})")
            return None
        if not shape:
            raise ValueError("the flow was made without context_shape and takes no context")
        if context.shape[-len(shape) :] != shape:
            raise ValueError(
                f"the context must have shape (..., {_listed(shape)}), got {tuple(context.shape)}"
            )
        return context.flatten(-len(shape))


def _elementwise_map(spline: str, bins: int, bound: float) -> ElementwiseMap:
    if spline == "rational_quadratic":
        return RationalQuadraticSpline(bins, bound)
    if spline == "affine":
        return Affine()
    raise ValueError(f"spline must be 'rational_quadratic' or 'affine', got {spline!r}")


def _listed(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))
