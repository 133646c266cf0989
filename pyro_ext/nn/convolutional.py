"""A convolutional residual network, the conditioner of coupling layers on images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .block import Activation, ResidualBlock, check_context, check_settings

__all__ = ["ResidualConvolutionalNetwork"]


class _Convolution(nn.Conv2d):
    """A convolution that keeps the size of images with any number of leading dimensions."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, bias: bool = True
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias
        )

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input.reshape(-1, *input.shape[-3:]))
        return output.reshape(*input.shape[:-3], *output.shape[-3:])


class _BatchNorm(nn.BatchNorm2d):
    """Batch normalisation of each channel over pixels and all leading dimensions."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)  # as in `BatchNorm`

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.reshape(-1, *input.shape[-3:])).reshape(input.shape)


class ResidualConvolutionalNetwork(nn.Module):
    r"""
    Convolutional network of residual blocks, with a context that gates them.

    The network of the coupling layers of RealNVP (Dinh et al. 2017) and of neural spline flows
    on images (Durkan et al. 2019, appendix B.3): a 1×1 convolution, blocks of two 3×3
    convolutions that keep the size of the image, a 1×1 convolution. A context is an image too; it
    enters the first layer and the gates through 1×1 convolutions, at its own shape: a vector
    for the whole image is one of height and width 1.

    :param int in_channels: channels of an input.
    :param int out_channels: channels of an output.
    :param int hidden_channels: channels of the hidden layers.
    :param int context_channels: channels of a context, 0 for none.
    :param int residual_blocks: number of blocks, each of two layers.
    :param activation: function applied before each layer of a block.
    :param float dropout: probability of dropping an input of the second layer of a block.
    :param bool batch_norm: normalise before each activation, over pixels and all leading
        dimensions.
    :raises ValueError: if a size is too small.

    >>> from pyro_ext.nn import ResidualConvolutionalNetwork
    >>> network = ResidualConvolutionalNetwork(3, 12, context_channels=4)
    >>> network(torch.randn(10, 3, 8, 8), torch.randn(4, 1, 1)).shape
    torch.Size([10, 12, 8, 8])

    **References**

    Dinh, Sohl-Dickstein and Bengio (2017): Density estimation using Real NVP. ICLR.

    Durkan, Bekasov, Murray and Papamakarios (2019): Neural spline flows. NeurIPS.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int = 64,
        *,
        context_channels: int = 0,
        residual_blocks: int = 3,
        activation: Activation = torch.relu,
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_settings(
            dropout,
            in_channels=(in_channels, 1),
            out_channels=(out_channels, 1),
            hidden_channels=(hidden_channels, 1),
            context_channels=(context_channels, 0),
            residual_blocks=(residual_blocks, 0),
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.context_channels = context_channels

        self.initial = _Convolution(in_channels, hidden_channels, 1)
        self.initial_context = (
            _Convolution(context_channels, hidden_channels, 1, bias=False)
            if context_channels
            else None
        )
        self.blocks = nn.ModuleList(
            ResidualBlock(
                (
                    _Convolution(hidden_channels, hidden_channels, 3),
                    _Convolution(hidden_channels, hidden_channels, 3),
                ),
                _Convolution(context_channels, hidden_channels, 1) if context_channels else None,
                activation=activation,
                dropout=dropout,
                batch_norms=[_BatchNorm(hidden_channels) for _ in range(2 * batch_norm)],
            )
            for _ in range(residual_blocks)
        )
        self.output = _Convolution(hidden_channels, out_channels, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """
        Evaluate the network.

        :param Tensor x: images, shape ``(..., in_channels, height, width)``.
        :param Tensor context: shape ``(..., context_channels, height, width)``, where height and
            width may be 1 and leading dimensions broadcast against those of ``x``.
        :returns: shape ``(..., out_channels, height, width)``.
        :raises ValueError: if a shape is wrong, or the context is missing or not expected.
        """
        if x.dim() < 3 or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"x must have shape (..., {self.in_channels}, height, width), got {tuple(x.shape)}"
            )
        check_context(x.shape[:-3], context, self.context_channels, event_dim=3)
        hidden = self.initial(x)
        if context is not None and self.initial_context is not None:
            sizes = zip(context.shape[-2:], x.shape[-2:], strict=True)
            if any(m not in (1, n) for m, n in sizes):
                raise ValueError(
                    f"the context must have the height and width {tuple(x.shape[-2:])} of x, or "
                    f"1, got {tuple(context.shape[-2:])}"
                )
            hidden = hidden + self.initial_context(context)
        for block in self.blocks:
            hidden = block(hidden, context)
        return self.output(hidden)
