"""A compact U-Net over images and time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention, silu

from .block import check_settings
from .score import TimeEmbedding

__all__ = ["UNet"]

_GROUPS = 8


class UNet(nn.Module):
    """
    Residual convolutions at several resolutions, with connections across (Ho et al. 2020).

    Every block is normalised by groups and modulated by time and context; at the lowest
    resolution there is one layer of attention. Resolutions are halved, rounding up, so that any
    height and width will do. The output is zero at the start.

    :param image_shape: channels, height and width.
    :param int hidden_channels: channels at the full resolution, a multiple of 8.
    :param multipliers: of the channels at each resolution.
    :param int context_features: size of a context vector, 0 for none.
    :param int residual_blocks: blocks at each resolution, on the way down and on the way up.
    :param int time_features: size of the features of time.
    :param float dropout: probability of dropping a channel's value in a block.
    :raises ValueError: if a size is too small or not a multiple of 8.

    Reference: Ronneberger, Fischer and Brox 2015, "U-Net"; Ho, Jain and Abbeel 2020, "Denoising
    diffusion probabilistic models", appendix B.

    >>> from pyro_ext.nn import UNet
    >>> network = UNet((1, 8, 8), 8)
    >>> network(torch.randn(5, 1, 8, 8), torch.rand(5)).shape
    torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        hidden_channels: int = 32,
        *,
        multipliers: Sequence[int] = (1, 2),
        context_features: int = 0,
        residual_blocks: int = 1,
        time_features: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_settings(
            dropout,
            hidden_channels=(hidden_channels, 8),
            context_features=(context_features, 0),
            residual_blocks=(residual_blocks, 1),
            time_features=(time_features, 1),
        )
        if hidden_channels % _GROUPS:
            raise ValueError(
                f"hidden_channels must be a multiple of {_GROUPS}, got {hidden_channels}"
            )
        if len(image_shape) != 3 or not multipliers:
            raise ValueError(
                "image_shape must be (channels, height, width) and multipliers not empty, got "
                f"{tuple(image_shape)} and {tuple(multipliers)}"
            )
        channels = image_shape[0]
        sizes = [hidden_channels * multiplier for multiplier in multipliers]
        self.context_features = context_features
        self.time = TimeEmbedding(time_features)
        condition = time_features + context_features

        def block(before: int, after: int) -> _Block:
            return _Block(before, after, condition, dropout)

        self.initial = nn.Conv2d(channels, sizes[0], 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.grow, self.up = nn.ModuleList(), nn.ModuleList()
        size = sizes[0]
        for index, next_size in enumerate(sizes):
            blocks = [block(size, next_size)]
            blocks += [block(next_size, next_size) for _ in range(residual_blocks - 1)]
            self.down.append(nn.ModuleList(blocks))
            if index + 1 < len(sizes):
                self.shrink.append(nn.Conv2d(next_size, next_size, 3, stride=2, padding=1))
            size = next_size
        self.middle = nn.ModuleList([block(size, size), _Attention(size), block(size, size)])
        for index, next_size in reversed(list(enumerate(sizes))):
            blocks = [block(size + next_size, next_size)]
            blocks += [block(next_size, next_size) for _ in range(residual_blocks - 1)]
            self.up.append(nn.ModuleList(blocks))
            if index:
                self.grow.append(nn.Conv2d(next_size, next_size, 3, padding=1))
            size = next_size
        self.norm = nn.GroupNorm(_GROUPS, size)
        self.output = nn.Conv2d(size, channels, 3, padding=1)
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """
        Evaluate.

        :param Tensor x: shape ``(n, channels, height, width)``.
        :param Tensor t: from 0 to 1, shape ``(n,)``.
        :param Tensor context: shape ``(n, context_features)``.
        :returns: the shape of ``x``.
        """
        condition = silu(self.time(t))
        if context is not None:
            condition = torch.cat([condition, context], -1)
        hidden = self.initial(x)
        kept = []
        for index, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                hidden = block(hidden, condition)
            kept.append(hidden)
            if index < len(self.shrink):
                hidden = self.shrink[index](hidden)
        for block in self.middle:
            hidden = block(hidden, condition)
        for index, blocks in enumerate(self.up):
            hidden = torch.cat([hidden, kept.pop()], 1)
            for block in blocks:  # type: ignore[attr-defined]
                hidden = block(hidden, condition)
            if index < len(self.grow):
                hidden = interpolate(hidden, size=kept[-1].shape[-2:], mode="nearest")
                hidden = self.grow[index](hidden)
        return self.output(silu(self.norm(hidden)))


class _Block(nn.Module):
    """Two convolutions around a modulation, next to the identity."""

    def __init__(self, before: int, after: int, condition: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(_GROUPS, before), nn.GroupNorm(_GROUPS, after)])
        self.first = nn.Conv2d(before, after, 3, padding=1)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.modulation = nn.Linear(condition, 2 * after)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        for parameter in self.second.parameters():
            nn.init.uniform_(parameter, -1e-3, 1e-3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[..., None, None].chunk(2, -3)
        hidden = self.first(silu(self.norms[0](x)))
        hidden = silu(self.norms[1](hidden) * (1 + scale) + shift)
        return self.skip(x) + self.second(self.dropout(hidden))


class _Attention(nn.Module):
    """Self-attention of all pixels, next to the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.inputs = nn.Conv2d(channels, 3 * channels, 1)
        self.output = nn.Conv2d(channels, channels, 1)
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        pixels = self.inputs(self.norm(x)).flatten(2).transpose(1, 2)
        mixed = scaled_dot_product_attention(*pixels.chunk(3, -1))
        return x + self.output(mixed.transpose(1, 2).reshape(x.shape))
