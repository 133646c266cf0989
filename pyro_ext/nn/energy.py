"""The network of an energy of one number, given a vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .block import Activation, ResidualBlock, check_settings
from .fourier import waves

__all__ = ["EnergyNetwork"]


class EnergyNetwork(nn.Module):
    r"""
    Bounded negative energy :math:`u(x; \gamma)` of a number :math:`x` given a vector.

    A residual network reads the number and the vector next to each other, and its output
    :math:`o` is bent into :math:`(-B, 0)` by

    .. math:: u = \tfrac{B}{2} \left(\tanh(2 o / B) - 1\right).

    So :math:`e^u` is at most one and never less than :math:`e^{-B}`: no ratio of two values is
    beyond :math:`e^B`, whatever the weights. Nash and Durkan (2019, section 3.1) take the
    negative softplus, which has no lower bound, and no slope left where u is close to zero: where
    the density is highest, it is hard to raise. This one has slope 1 in the middle.

    The part of the first layer that reads the vector is computed once per vector, not once per
    number. At the start the output varies little.

    :param int context_features: size of the vector.
    :param int hidden_features: size of the hidden layers.
    :param int residual_blocks: number of blocks, each of two layers.
    :param int frequencies: of sines and cosines of the number that are read next to it.
    :param float bound: B.
    :param activation: function applied before each layer of a block.
    :param float dropout: probability of dropping an input of the second layer of a block.
    :raises ValueError: if a setting is out of its range.

    >>> from pyro_ext.nn import EnergyNetwork
    >>> network = EnergyNetwork(3)
    >>> network(torch.randn(5, 20), torch.randn(5, 1, 3)).shape
    torch.Size([5, 20])

    **References**

    Nash and Durkan (2019): Autoregressive energy machines. ICML.
    """

    def __init__(
        self,
        context_features: int,
        hidden_features: int = 128,
        *,
        residual_blocks: int = 4,
        frequencies: int = 0,
        bound: float = 20.0,
        activation: Activation = torch.relu,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_settings(
            dropout,
            context_features=(context_features, 1),
            hidden_features=(hidden_features, 1),
            residual_blocks=(residual_blocks, 0),
            frequencies=(frequencies, 0),
        )
        if not 0.0 < bound < math.inf:
            raise ValueError(f"bound must be a positive number, got {bound!r}")
        self.context_features, self.bound = context_features, bound
        self.frequencies = frequencies
        self.initial = nn.Linear(1 + 2 * frequencies, hidden_features, bias=False)
        self.initial_context = nn.Linear(context_features, hidden_features)
        self.blocks = nn.ModuleList(
            ResidualBlock(
                (
                    nn.Linear(hidden_features, hidden_features),
                    nn.Linear(hidden_features, hidden_features),
                ),
                None,
                activation=activation,
                dropout=dropout,
            )
            for _ in range(residual_blocks)
        )
        self.output = nn.Linear(hidden_features, 1)
        with torch.no_grad():
            self.output.weight.mul_(0.1)
            self.output.bias.zero_()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """
        Evaluate the network.

        :param Tensor x: numbers, shape ``(...)``.
        :param Tensor context: shape ``(..., context_features)``, whose leading dimensions
            broadcast against those of ``x``.
        :returns: negative energies, shape ``(...)``.
        """
        hidden = self.initial(waves(x.unsqueeze(-1), self.frequencies)) + self.initial_context(
            context
        )
        for block in self.blocks:
            hidden = block(hidden)
        output = self.output(hidden).squeeze(-1)
        return 0.5 * self.bound * (torch.tanh(output * (2.0 / self.bound)) - 1.0)
