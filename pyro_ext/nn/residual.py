"""A fully connected residual network, the conditioner of coupling layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .block import Activation, BatchNorm, ResidualBlock, check_context, check_settings

__all__ = ["ResidualNetwork"]


class ResidualNetwork(nn.Module):
    r"""
    Fully connected network of residual blocks, with a context that gates them.

    The network of the coupling layers of neural spline flows. A context enters twice: next to
    the input of the first layer, and in a sigmoid gate on what each block adds (Durkan et al.
    2019, appendix B.2). All of what depends on the context alone is computed at the shape of the
    context, so that one context shared by many inputs costs next to nothing.

    At the start the blocks are near the identity, and the gates, linear layers as PyTorch makes
    them, are about half open for a context of unit scale.

    :param int in_features: size of an input; 0 for a function of the context alone.
    :param int out_features: size of an output.
    :param int hidden_features: size of the hidden layers.
    :param int context_features: size of a context, 0 for none.
    :param int residual_blocks: number of blocks, each of two layers.
    :param activation: function applied before each layer of a block.
    :param float dropout: probability of dropping an input of the second layer of a block.
    :param bool batch_norm: normalise before each activation, over all leading dimensions.
    :raises ValueError: if a size is too small, or there is neither input nor context.

    >>> from pyro_ext.nn import ResidualNetwork
    >>> network = ResidualNetwork(2, 5, context_features=3)
    >>> network(torch.randn(10_000, 2), torch.randn(3)).shape
    torch.Size([10000, 5])

    **References**

    Durkan, Bekasov, Murray and Papamakarios (2019): Neural spline flows. NeurIPS.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int = 64,
        *,
        context_features: int = 0,
        residual_blocks: int = 2,
        activation: Activation = torch.relu,
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_settings(
            dropout,
            in_features=(in_features, 0),
            out_features=(out_features, 1),
            hidden_features=(hidden_features, 1),
            context_features=(context_features, 0),
            residual_blocks=(residual_blocks, 0),
        )
        if not in_features and not context_features:
            raise ValueError("in_features and context_features are both 0: nothing to depend on")
        self.in_features, self.out_features = in_features, out_features
        self.context_features = context_features

        self.initial = nn.Linear(in_features, hidden_features) if in_features else None
        self.initial_context = (
            nn.Linear(context_features, hidden_features, bias=self.initial is None)
            if context_features
            else None
        )
        self.blocks = nn.ModuleList(
            ResidualBlock(
                (
                    nn.Linear(hidden_features, hidden_features),
                    nn.Linear(hidden_features, hidden_features),
                ),
                nn.Linear(context_features, hidden_features) if context_features else None,
                activation=activation,
                dropout=dropout,
                batch_norms=[BatchNorm(hidden_features) for _ in range(2 * batch_norm)],
            )
            for _ in range(residual_blocks)
        )
        self.output = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """
        Evaluate the network.

        :param Tensor x: input, shape ``(..., in_features)``.
        :param Tensor context: shape ``(..., context_features)``, whose leading dimensions
            broadcast against those of ``x``.
        :returns: shape ``(..., out_features)``.
        :raises ValueError: if a shape is wrong, or the context is missing or not expected.
        """
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x must have shape (..., {self.in_features}), got {tuple(x.shape)}")
        check_context(x.shape[:-1], context, self.context_features)
        parts = []
        if self.initial is not None:
            parts.append(self.initial(x))
        if self.initial_context is not None:
            parts.append(self.initial_context(context))
        hidden = sum(parts[1:], parts[0])
        for block in self.blocks:
            hidden = block(hidden, context)
        output = self.output(hidden)
        if self.initial is None:
            batch_shape = torch.broadcast_shapes(x.shape[:-1], output.shape[:-1])
            return output.expand(batch_shape + output.shape[-1:])
        return output
