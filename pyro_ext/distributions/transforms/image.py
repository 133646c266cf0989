"""Layers of flows on images: squeezing, normalisation, 1×1 convolutions, couplings."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .bijection import Bijection
from .elementwise import ElementwiseMap
from .linear import LULinear

__all__ = ["ActNorm", "ImageCoupling", "InvertibleConvolution", "PixelRange", "Squeeze"]


class PixelRange(Bijection):
    r"""
    Map pixels from :math:`[l, h]` to :math:`[-\tfrac12, \tfrac12]`, as Glow does.

    The map is affine, so that its log-determinant is :math:`-D \log(h - l)` for :math:`D` pixels
    and channels, and values outside the range are valid too.

    :param float low: value of the darkest pixels.
    :param float high: value of the brightest pixels.
    :raises ValueError: if ``low`` is not less than ``high``, or one of them is not finite.

    >>> from pyro_ext.distributions.transforms.image import PixelRange
    >>> PixelRange(0.0, 2.0).to_noise(torch.full((1, 1, 1), 2.0))
    (tensor([[[0.5000]]]), tensor(-0.6931))
    """

    event_dim = 3

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"pixels need a range from low to high, got {low} and {high}")
        self.low, self.high = float(low), float(high)

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Map data to noise, see :meth:`Bijection.to_noise`.

        :raises TypeError: if the images are integers, which have no density.
        """
        if not x.is_floating_point():
            raise TypeError(
                f"images must be real numbers in [{self.low}, {self.high}], got {x.dtype}; for "
                "integer images wrap the flow: DequantizedFlow(flow, "
                "UniformDequantization(levels)) or with VariationalDequantization"
            )
        z = (x - self.low) / (self.high - self.low) - 0.5
        return z, -self._log_det(x)

    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_data`."""
        x = self.low + (self.high - self.low) * (z + 0.5)
        return x, self._log_det(z)

    def _log_det(self, value: Tensor) -> Tensor:
        size = math.prod(value.shape[-3:])
        return value.new_full(value.shape[:-3], size * math.log(self.high - self.low))


class Squeeze(Bijection):
    """
    Trade resolution for channels: every square of pixels becomes one pixel with more channels.

    Shape ``(..., C, H, W)`` becomes ``(..., C * factor**2, H / factor, W / factor)``; nothing but
    the order of the elements changes, and the log-determinant is zero.

    :param int factor: side of the square.
    :raises ValueError: if ``factor`` is less than 1.

    Reference: Dinh, Sohl-Dickstein and Bengio 2017, section 3.6.

    >>> from pyro_ext.distributions.transforms.image import Squeeze
    >>> Squeeze().to_noise(torch.randn(5, 3, 32, 32))[0].shape
    torch.Size([5, 12, 16, 16])
    """

    event_dim = 3

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        self.factor = factor

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Map data to noise, see :meth:`Bijection.to_noise`.

        :raises ValueError: if the height or the width is not a multiple of the factor.
        """
        height, width = x.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"squeezing by {self.factor} needs a height and a width that it divides, got "
                f"{height} x {width}; pad or crop the images"
            )
        return nn.functional.pixel_unshuffle(x, self.factor), x.new_zeros(x.shape[:-3])

    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Map noise to data, see :meth:`Bijection.to_data`.

        :raises ValueError: if the number of channels is not a multiple of ``factor**2``.
        """
        if z.shape[-3] % self.factor**2:
            raise ValueError(
                f"undoing a squeeze by {self.factor} needs a multiple of {self.factor**2} "
                f"channels, got {z.shape[-3]}"
            )
        return nn.functional.pixel_shuffle(z, self.factor), z.new_zeros(z.shape[:-3])


class ActNorm(Bijection):
    r"""
    A trainable scale and shift of each channel, set once from data.

    :math:`z_{chw} = e^{s_c} x_{chw} + t_c`. New layers are the identity; :meth:`initialize`
    chooses :math:`s` and :math:`t` so that every channel of a batch has zero mean and unit
    variance. Nothing else ever changes them but the optimiser: evaluating the layer on a first
    batch does not.

    :param int channels: number of channels C.
    :raises ValueError: if ``channels`` is less than 1.

    Reference: Kingma and Dhariwal 2018, "Glow", section 3.1.

    >>> from pyro_ext.distributions.transforms.image import ActNorm
    >>> layer = ActNorm(3)
    >>> x = 5.0 + torch.randn(64, 3, 8, 8)
    >>> layer.initialize(x)
    >>> layer.to_noise(x)[0].mean((0, 2, 3)).abs().max() < 1e-12
    tensor(True)
    """

    event_dim = 3
    initialized: Tensor
    """Whether :meth:`initialize` has run: a buffer, part of the ``state_dict``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        _check_channels(channels, 1)
        self.channels = channels
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """
        Give every channel of a batch zero mean and unit variance.

        A channel that is constant in this batch says nothing about its scale and keeps it.

        :param Tensor x: images, shape ``(..., channels, height, width)``.
        :raises ValueError: if the shape is wrong or a value is not finite.
        """
        if x.dim() < 3 or x.shape[-3] != self.channels or x.numel() == 0:
            raise ValueError(
                f"ActNorm({self.channels}) needs images of shape (..., {self.channels}, height, "
                f"width), got {tuple(x.shape)}"
            )
        if not x.isfinite().all():
            raise ValueError("ActNorm cannot start from data that are NaN or infinite")
        values = x.movedim(-3, 0).flatten(1)
        mean, deviation = values.mean(-1), values.std(-1, correction=0)
        rounding = 8 * torch.finfo(x.dtype).eps * values.abs().amax(-1)
        log_scale = torch.where(deviation > rounding, -deviation.log(), self.log_scale.flatten())
        self.log_scale.copy_(log_scale[:, None, None])
        self.shift.copy_((-mean * log_scale.exp())[:, None, None])
        self.initialized.fill_(True)

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_noise`."""
        return x * self.log_scale.exp() + self.shift, self._log_det(x)

    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_data`."""
        return (z - self.shift) * (-self.log_scale).exp(), -self._log_det(z)

    def _log_det(self, value: Tensor) -> Tensor:
        pixels = value.shape[-2] * value.shape[-1]
        return (pixels * self.log_scale.sum()).expand(value.shape[:-3])


class InvertibleConvolution(Bijection):
    r"""
    The same linear map of the channels at every pixel: an invertible 1×1 convolution.

    The matrix is :math:`W = PLU` with a fixed random permutation P, as in
    :class:`~pyro_ext.distributions.transforms.linear.LULinear`, which does the work; the
    log-determinant is :math:`H W \sum_c \log U_{cc}`.

    :param int channels: number of channels.

    Reference: Kingma and Dhariwal 2018, "Glow", section 3.2.

    >>> from pyro_ext.distributions.transforms.image import InvertibleConvolution
    >>> layer = InvertibleConvolution(4)
    >>> x = torch.randn(4, 8, 8)
    >>> layer.to_data(layer.to_noise(x)[0])[0].allclose(x)
    True
    """

    event_dim = 3

    def __init__(self, channels: int) -> None:
        super().__init__()
        _check_channels(channels, 1)
        self.linear = LULinear(channels)

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_noise`."""
        z, log_det = self.linear.to_noise(x.movedim(-3, -1))
        return z.movedim(-1, -3), log_det.sum((-2, -1))

    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_data`."""
        x, log_det = self.linear.to_data(z.movedim(-3, -1))
        return x.movedim(-1, -3), log_det.sum((-2, -1))


class ImageCoupling(Bijection):
    r"""
    Transform half of the channels by functions that a network chooses from the other half.

    With :math:`g_\theta` an increasing function of one variable,

    .. math:: \theta_{1:d} = \text{trainable, one per channel}, \quad
        \theta_{d+1:C} = \mathrm{NN}(x_{1:d}), \quad z = g_\theta(x),

    where :math:`d = \lfloor C / 2 \rfloor`. The last layer of the network starts at zero, so
    that a new layer is the identity.

    :param int channels: number of channels C, at least 2.
    :param ElementwiseMap elementwise_map: the family of functions g.
    :param network: called with the number of channels of the input and of the output, returns
        the network NN, a module called with an image and perhaps a context, whose last layer is
        its attribute ``output``.
    :raises ValueError: if there are fewer than two channels.
    :raises TypeError: if the network has no last layer ``output``.

    Reference: Durkan, Bekasov, Murray and Papamakarios 2019, "Neural Spline Flows", eq. 9-11 and
    appendix B.3.

    >>> from pyro_ext.distributions.transforms.image import ImageCoupling
    >>> from pyro_ext.distributions.transforms.rational_quadratic import RationalQuadraticSpline
    >>> from pyro_ext.nn import ResidualConvolutionalNetwork
    >>> layer = ImageCoupling(4, RationalQuadraticSpline(), ResidualConvolutionalNetwork)
    >>> layer.to_noise(torch.randn(10, 4, 8, 8))[1].shape
    torch.Size([10])
    """

    event_dim = 3

    def __init__(
        self,
        channels: int,
        elementwise_map: ElementwiseMap,
        network: Callable[[int, int], nn.Module],
    ) -> None:
        super().__init__()
        _check_channels(channels, 2)
        self.num_first = channels // 2
        self.num_second = channels - self.num_first
        self.elementwise_map = elementwise_map
        num_parameters = elementwise_map.num_parameters
        self.first_parameters = nn.Parameter(torch.zeros(self.num_first, 1, 1, num_parameters))
        self.network = network(self.num_first, self.num_second * num_parameters)
        output = getattr(self.network, "output", None)
        if not isinstance(output, nn.Module):
            raise TypeError(
                "a network of a coupling needs its last layer as the attribute `output`, "
                f"{type(self.network).__name__} has none"
            )
        for parameter in output.parameters():
            nn.init.zeros_(parameter)

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Map data to noise, see :meth:`Bijection.to_noise`.

        :param Tensor context: whatever the network takes, an image of this resolution.
        """
        first, second = self._halves(x)
        parameters = self._second_parameters(first, context)
        first, first_log_slope = self.elementwise_map.forward(first, self.first_parameters)
        second = second.expand(parameters.shape[:-1]).contiguous()
        second, second_log_slope = self.elementwise_map.forward(second, parameters)
        log_det = first_log_slope.sum((-3, -2, -1)) + second_log_slope.sum((-3, -2, -1))
        return _concatenate(first, second), log_det

    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_data`; the context is that of :meth:`to_noise`."""
        first, second = self._halves(z)
        first, first_log_slope = self.elementwise_map.inverse(first, self.first_parameters)
        parameters = self._second_parameters(first, context)
        second = second.expand(parameters.shape[:-1]).contiguous()
        second, second_log_slope = self.elementwise_map.inverse(second, parameters)
        log_det = first_log_slope.sum((-3, -2, -1)) + second_log_slope.sum((-3, -2, -1))
        return _concatenate(first, second), log_det

    def _halves(self, value: Tensor) -> tuple[Tensor, Tensor]:
        first, second = value.split((self.num_first, self.num_second), -3)
        # splines search bins for every element, which wants them one after the other in memory
        return first.contiguous(), second

    def _second_parameters(self, first: Tensor, context: Tensor | None) -> Tensor:
        output = self.network(first) if context is None else self.network(first, context)
        return output.unflatten(-3, (self.num_second, -1)).movedim(-3, -1)


def _concatenate(first: Tensor, second: Tensor) -> Tensor:
    """Join channels; contexts may have given the second half more batch dimensions."""
    return torch.cat((first.expand(*second.shape[:-3], *first.shape[-3:]), second), -3)


def _check_channels(channels: int, at_least: int) -> None:
    if channels < at_least:
        raise ValueError(f"channels must be at least {at_least}, got {channels}")
