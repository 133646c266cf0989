"""Networks over noisy data and time, whose output has the shape of the data."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

from .block import check_settings
from .residual import ResidualNetwork

__all__ = ["ScoreNetwork", "TimeEmbedding"]

_FINEST = 4.0  # radians over the noise at which waves fade


class TimeEmbedding(nn.Module):
    r"""
    Features of time: sines and cosines of several frequencies, and a small network of them.

    .. math:: \sin(\omega_k t), \cos(\omega_k t), \quad
        \omega_k = 2 \pi \cdot \tfrac14 \dots \text{max\_frequency}

    in a geometric sequence, for t from 0 to 1.

    :param int features: size of the result.
    :param int number: number of frequencies.
    :param float max_frequency: the largest one, in waves over the range of t.
    :raises ValueError: if a size is too small.

    >>> from pyro_ext.nn import TimeEmbedding
    >>> TimeEmbedding(16)(torch.rand(5)).shape
    torch.Size([5, 16])
    """

    frequencies: Tensor

    def __init__(self, features: int, *, number: int = 8, max_frequency: float = 16.0) -> None:
        super().__init__()
        check_settings(0.0, features=(features, 1), number=(number, 2))
        exponents = torch.linspace(0, 1, number)
        frequencies = 0.25 * (max_frequency / 0.25) ** exponents
        self.register_buffer("frequencies", 2 * math.pi * frequencies)
        self.layers = nn.Sequential(
            nn.Linear(2 * number, features), nn.SiLU(), nn.Linear(features, features)
        )

    def forward(self, t: Tensor) -> Tensor:
        """
        Evaluate.

        :param Tensor t: shape ``(...)``.
        :returns: shape ``(..., features)``.
        """
        angles = t.unsqueeze(-1) * self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], -1))


class ScoreNetwork(nn.Module):
    r"""
    A fully connected residual network of vectors and time.

    Time, and the context if there is one, gate the blocks of a
    :class:`~pyro_ext.nn.ResidualNetwork`, and scale its last hidden layer. The output is zero at
    the start.

    :param int features: size of the data.
    :param int hidden_features: size of the hidden layers.
    :param int context_features: size of a context, 0 for none.
    :param int residual_blocks: number of blocks, each of two layers.
    :param int time_features: size of the features of time.
    :param int frequencies: waves that are put next to the data, for densities with fine
        structure in few dimensions (Tancik et al. 2020); 128, say. They start in random
        directions and are trained like all weights; time and context fade them.
    :param float max_frequency: the largest of their frequencies at the start, in radians for
        each unit of the data; the smallest is 1.
    :param noise_level: the standard deviation of the noise in x at times t. Waves k are multiplied
        by :math:`\exp(-\tfrac12 (|k| \sigma / 4)^2)` then: what is finer than the noise can only
        be an error, which costs little in training, and much in the density of a flow that
        follows the output.
    :param float dropout: probability of dropping an input of the second layer of a block.
    :raises ValueError: if a size is too small.

    >>> from pyro_ext.nn import ScoreNetwork
    >>> network = ScoreNetwork(3, context_features=2)
    >>> network(torch.randn(10, 3), torch.rand(10), torch.randn(10, 2)).abs().max()
    tensor(0., grad_fn=<MaxBackward1>)
    """

    def __init__(
        self,
        features: int,
        hidden_features: int = 128,
        *,
        context_features: int = 0,
        residual_blocks: int = 3,
        time_features: int = 32,
        frequencies: int = 0,
        max_frequency: float = 50.0,
        noise_level: Callable[[Tensor], Tensor] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_settings(
            dropout,
            features=(features, 1),
            hidden_features=(hidden_features, 1),
            context_features=(context_features, 0),
            frequencies=(frequencies, 0),
        )
        self.context_features = context_features
        self.noise_level = noise_level
        self.time = TimeEmbedding(time_features)
        condition = time_features + context_features
        self.waves: nn.Parameter | None = None
        self.wave_gates: nn.Linear | None = None
        if frequencies:
            directions = normalize(torch.randn(features, frequencies), dim=0)
            self.waves = nn.Parameter(directions * torch.linspace(1, max_frequency, frequencies))
            self.wave_gates = nn.Linear(condition, frequencies)
        self.body = ResidualNetwork(
            features + 2 * frequencies,
            hidden_features,
            hidden_features,
            context_features=condition,
            residual_blocks=residual_blocks,
            activation=silu,
            dropout=dropout,
        )
        self.gain = nn.Linear(condition, hidden_features)
        self.output = nn.Linear(hidden_features, features)
        for parameter in [*self.gain.parameters(), *self.output.parameters()]:
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """
        Evaluate.

        :param Tensor x: shape ``(n, features)``.
        :param Tensor t: from 0 to 1, shape ``(n,)``.
        :param Tensor context: shape ``(n, context_features)``.
        :returns: shape ``(n, features)``.
        """
        condition = silu(self.time(t))
        if context is not None:
            condition = torch.cat([condition, context], -1)
        if self.waves is not None and self.wave_gates is not None:
            angles, gates = x @ self.waves, self.wave_gates(condition).sigmoid()
            if self.noise_level is not None:
                ratios = self.noise_level(t).unsqueeze(-1) * self.waves.norm(dim=0)
                gates = gates * (-0.5 * (ratios / _FINEST).square()).exp()
            x = torch.cat([x, gates * angles.sin(), gates * angles.cos()], -1)
        hidden = silu(self.body(x, condition))
        return self.output(hidden * (1 + self.gain(condition)))
