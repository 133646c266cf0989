"""What residual networks share: the block, batch normalisation, checks of arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Activation", "BatchNorm", "ResidualBlock", "check_context", "check_settings"]

Activation = Callable[[Tensor], Tensor]


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of the last dimension over all the others."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int) -> None:
        # the `eps` of the reference experiments: units that are nearly always off stay quiet
        super().__init__(features, eps=1e-3)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, shape ``(..., features)`` to the same shape."""
        return super().forward(input.reshape(-1, self.num_features)).reshape(input.shape)

    def part(self, input: Tensor, start: int, stop: int) -> Tensor:
        """Normalise features ``start:stop`` alone by the running statistics."""
        scale = self.weight / (self.running_var + self.eps).sqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift[start:stop], input, scale[start:stop])


class ResidualBlock(nn.Module):
    r"""
    Add a small network to its input (He et al. 2016, with activations before the layers).

    .. math:: x + \sigma(g(c)) \, W_2 \, a(W_1 \, a(x))

    where :math:`g` is there with a context :math:`c` only. The second layer starts uniform in
    :math:`\pm 10^{-3}`, and so the block near the identity.

    :param layers: the two layers.
    :param gate: a layer on the context, whose sigmoid multiplies what the block adds.
    :param activation: function applied before each layer.
    :param float dropout: probability of dropping an input of the second layer in training.
    :param batch_norms: normalisations before the two activations.
    """

    # linear or convolutional, plain or masked
    first: Any
    second: Any
    gate: Any
    batch_norms: Any

    def __init__(
        self,
        layers: tuple[nn.Linear, nn.Linear] | tuple[nn.Conv2d, nn.Conv2d],
        gate: nn.Module | None,
        *,
        activation: Activation,
        dropout: float = 0.0,
        batch_norms: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.first, self.second = layers
        self.gate = gate
        self.activation = activation
        # a dropout of zero would still draw a mask
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.batch_norms = nn.ModuleList(batch_norms)
        for parameter in self.second.parameters():
            nn.init.uniform_(parameter, -1e-3, 1e-3)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """
        Transform hidden units.

        :param Tensor x: hidden units.
        :param Tensor context: context; the gate has its shape, which broadcasts against ``x``.
        :returns: hidden units of the shape of ``x``.
        """
        normalize = list(self.batch_norms) or [nn.Identity(), nn.Identity()]
        update = self.first(self.activation(normalize[0](x)))
        update = self.second(self.dropout(self.activation(normalize[1](update))))
        if self.gate is None:
            return x + update
        return torch.addcmul(x, update, torch.sigmoid(self.gate(context)))


def check_settings(dropout: float, **sizes: tuple[Any, int]) -> None:
    """
    Check arguments of a constructor.

    :param float dropout: a probability below one.
    :param sizes: for the name of each argument its value and the smallest one allowed.
    :raises ValueError: if one is out of its range.
    """
    for name, (size, smallest) in sizes.items():
        if not isinstance(size, Integral) or int(size) < smallest:
            raise ValueError(f"{name} must be an integer of at least {smallest}, got {size!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be a probability in [0, 1), got {dropout!r}")


def check_context(
    batch_shape: torch.Size, context: Tensor | None, context_features: int, event_dim: int = 1
) -> None:
    """
    Check that there is a context if and only if there should be, and its shape.

    :param batch_shape: leading dimensions of the values, against which those of the context
        have to broadcast.
    :param Tensor context: the context.
    :param int context_features: size of dimension ``-event_dim`` of the context, 0 for none.
    :param int event_dim: dimensions of one context.
    :raises ValueError: if they do not fit.
    """
    if context is None:
        if context_features:
            raise ValueError(
                f"this network has {context_features} context features: pass a context"
            )
        return
    if not context_features:
        raise ValueError(
            f"got a context of shape {tuple(context.shape)}, but this network was made without "
            "one: leave it out, or make the network with a context"
        )
    if context.dim() < event_dim or context.shape[-event_dim] != context_features:
        expected = ", ".join(["...", str(context_features), "height", "width"][: event_dim + 1])
        raise ValueError(f"the context must have shape ({expected}), got {tuple(context.shape)}")
    leading = context.shape[: context.dim() - event_dim]
    pairs = zip(reversed(batch_shape), reversed(leading), strict=False)
    if any(m != n and m != 1 and n != 1 for m, n in pairs):
        raise ValueError(
            f"the leading dimensions {tuple(leading)} of the context do not broadcast against "
            f"those of the values, {tuple(batch_shape)}"
        )
