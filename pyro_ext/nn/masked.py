"""A residual network whose outputs are autoregressive, and its evaluation feature by feature."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Activation, BatchNorm, ResidualBlock, check_context, check_settings

__all__ = ["MaskedLinear", "ResMADE", "SequentialState"]


class MaskedLinear(nn.Linear):
    """
    A linear layer some of whose weights are zero.

    :param Tensor mask: shape ``(out_features, in_features)``, false where the weight is zero.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, shape ``(..., in_features)`` to ``(..., out_features)``."""
        return F.linear(input, self.weight * self.mask, self.bias)

    def rows(self, input: Tensor, start: int, stop: int) -> Tensor:
        """
        Outputs ``start:stop`` from the leading inputs, all those that their mask lets through.

        :param Tensor input: shape ``(..., n)`` for some ``n <= in_features``.
        :returns: shape ``(..., stop - start)``.
        """
        weight = self.weight[start:stop, : input.shape[-1]]
        return F.linear(input, weight, self.bias[start:stop])


class SequentialState(NamedTuple):
    """
    A :class:`ResMADE` of which the first features have been evaluated.

    Without gradients the columns are buffers of full size, which the next step fills further;
    with gradients they grow, and every state stays valid.
    """

    feature: int  # the next one
    initial_context: Tensor | None  # (..., hidden_features)
    gates: tuple[Tensor, ...]  # of the blocks, (..., hidden_features)
    columns: tuple[Tensor, ...]  # known inputs of the masked layers, batch_shape + (known,)


class ResMADE(nn.Module):
    r"""
    Masked residual network: output :math:`i` depends on the inputs before :math:`i` only.

    Every hidden unit has a degree :math:`d`, and depends on :math:`x_1, \ldots, x_d` (Nash and
    Durkan 2019, appendix A). A layer connects a unit to those of no greater degree, and as the
    degrees are the same in all hidden layers they may be added. Degrees are sorted, so that
    the masks are block triangular. A context enters the first layer and gates the blocks as in
    :class:`~pyro_ext.nn.ResidualNetwork`. There is one difference: with a context there are
    units of degree 0 as well, which see nothing else. Without them the first output could not
    depend on the context.

    Hidden layers smaller than the number of features are allowed, but lose dependencies.

    :meth:`start` and :meth:`step` evaluate feature by feature, where each input is known only
    once the output before it is: the sampling of an autoregressive model. They compute every
    unit once, all together half a call of the network, instead of one call per feature.

    :param int features: number of inputs.
    :param int outputs_per_feature: number of outputs for each of them.
    :param int hidden_features: size of the hidden layers.
    :param int context_features: size of a context, 0 for none.
    :param int residual_blocks: number of blocks, each of two layers.
    :param activation: function applied before each layer of a block, element by element.
    :param float dropout: probability of dropping an input of the second layer of a block.
    :param bool batch_norm: normalise before each activation, over all leading dimensions.
    :raises ValueError: if a size is too small.

    >>> from pyro_ext.nn import ResMADE
    >>> made = ResMADE(3, 2)
    >>> x = torch.randn(10, 3)
    >>> made(x).shape
    torch.Size([10, 3, 2])
    >>> with torch.no_grad():
    ...     first, state = made.step(made.start((10,)))
    ...     second, state = made.step(state, x[:, 0])
    >>> torch.testing.assert_close(second, made(x)[:, 1].detach())

    **References**

    Nash and Durkan (2019): Autoregressive energy machines. ICML.

    Germain, Gregor, Murray and Larochelle (2015): MADE: masked autoencoder for distribution
    estimation. ICML.
    """

    def __init__(
        self,
        features: int,
        outputs_per_feature: int,
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
            features=(features, 1),
            outputs_per_feature=(outputs_per_feature, 1),
            hidden_features=(hidden_features, 1),
            context_features=(context_features, 0),
            residual_blocks=(residual_blocks, 0),
        )
        self.features, self.outputs_per_feature = features, outputs_per_feature
        self.context_features = context_features

        lowest = 0 if context_features or features == 1 else 1
        degrees = lowest + torch.arange(hidden_features) * (features - lowest) // hidden_features
        # hidden units of degree d are those from _bounds[d] to _bounds[d + 1]
        self._bounds = [bisect_left(degrees.tolist(), degree) for degree in range(features + 1)]
        order = torch.arange(features)
        hidden_mask = degrees[:, None] >= degrees
        self.initial = MaskedLinear(degrees[:, None] > order)
        self.initial_context = (
            nn.Linear(context_features, hidden_features, bias=False) if context_features else None
        )
        blocks = nn.ModuleList(
            ResidualBlock(
                (MaskedLinear(hidden_mask), MaskedLinear(hidden_mask)),
                nn.Linear(context_features, hidden_features) if context_features else None,
                activation=activation,
                dropout=dropout,
                batch_norms=[BatchNorm(hidden_features) for _ in range(2 * batch_norm)],
            )
            for _ in range(residual_blocks)
        )
        self.blocks = cast("Sequence[ResidualBlock]", blocks)
        output_mask = order[:, None] >= degrees
        self.output = MaskedLinear(output_mask.repeat_interleave(outputs_per_feature, 0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """
        Evaluate the network for all features at once.

        :param Tensor x: input, shape ``(..., features)``.
        :param Tensor context: shape ``(..., context_features)``, whose leading dimensions
            broadcast against those of ``x``.
        :returns: shape ``(..., features, outputs_per_feature)``.
        :raises ValueError: if a shape is wrong, or the context is missing or not expected.
        """
        if x.shape[-1:] != (self.features,):
            raise ValueError(f"x must have shape (..., {self.features}), got {tuple(x.shape)}")
        check_context(x.shape[:-1], context, self.context_features)
        hidden = self.initial(x)
        if self.initial_context is not None:
            hidden = hidden + self.initial_context(context)
        for block in self.blocks:
            hidden = block(hidden, context)
        return self.output(hidden).unflatten(-1, (self.features, self.outputs_per_feature))

    def start(self, batch_shape: Sequence[int], context: Tensor | None = None) -> SequentialState:
        """
        Start to evaluate feature by feature.

        Whether gradients are enabled is asked here: without them the state holds buffers that
        each step fills further, which is faster, but only the newest state is valid. Inside
        :func:`torch.vmap` leave gradients enabled. Batches much larger than a thousand rows take
        up to a third less time in parts of that size, whose buffers stay in the cache.

        :param batch_shape: leading dimensions of the inputs to come, as far as those of the
            context do not extend them.
        :param Tensor context: shape ``(..., context_features)``, whose leading dimensions
            broadcast against ``batch_shape``.
        :returns: the state in which the first feature is next.
        :raises ValueError: if the shape of the context is wrong, it is missing or not expected,
            or batch normalisation is in training mode.
        """
        batch_shape = torch.Size(batch_shape)
        check_context(batch_shape, context, self.context_features)
        if any(norm.training for block in self.blocks for norm in block.batch_norms):
            raise ValueError(
                "batch normalisation in training mode needs all units at once: call .eval() "
                "before evaluating feature by feature"
            )
        initial_context: Tensor | None = None
        gates: tuple[Tensor, ...] = ()
        if context is not None and self.initial_context is not None:
            batch_shape = torch.broadcast_shapes(batch_shape, context.shape[:-1])
            initial_context = self.initial_context(context)
            gates = tuple(torch.sigmoid(block.gate(context)) for block in self.blocks)
        hidden_layers = [layer for block in self.blocks for layer in (block.first, block.second)]
        columns = tuple(
            layer.weight.new_empty(
                (*batch_shape, 0 if torch.is_grad_enabled() else layer.in_features)
            )
            for layer in [self.initial, *hidden_layers, self.output]
        )
        return SequentialState(0, initial_context, gates, columns)

    def step(
        self, state: SequentialState, previous: Tensor | None = None
    ) -> tuple[Tensor, SequentialState]:
        """
        The outputs for the next feature.

        :param SequentialState state: from :meth:`start` or the last step.
        :param Tensor previous: the feature before, shape ``batch_shape``; none for the first.
        :returns: the outputs, shape ``batch_shape + (outputs_per_feature,)``, and the state in
            which the feature after is next.
        :raises ValueError: if all features are done, or the one before is missing, not expected,
            or has a wrong shape.
        """
        self._check_step(state, previous)
        feature, initial_context, gates, (inputs, *columns, hidden) = state
        if previous is not None:
            inputs = _append(inputs, previous[..., None], feature - 1)
        start, stop = self._bounds[feature], self._bounds[feature + 1]
        if start < stop:
            new = self.initial.rows(inputs[..., :feature], start, stop)
            if initial_context is not None:
                new = new + initial_context[..., start:stop]
            for index, block in enumerate(self.blocks):
                gate = gates[index][..., start:stop] if gates else None
                pair = slice(2 * index, 2 * index + 2)
                new, columns[pair] = _rows_of_block(block, new, columns[pair], gate, start)
            hidden = _append(hidden, new, start)
        size = self.outputs_per_feature
        parameters = self.output.rows(hidden[..., :stop], feature * size, (feature + 1) * size)
        return parameters, SequentialState(
            feature + 1, initial_context, gates, (inputs, *columns, hidden)
        )

    def _check_step(self, state: SequentialState, previous: Tensor | None) -> None:
        if state.feature >= self.features:
            raise ValueError(f"all {self.features} features are done: start again")
        if state.feature == 0:
            if previous is not None:
                raise ValueError("the first step has no feature before it: leave out `previous`")
            return
        batch_shape = state.columns[0].shape[:-1]
        if previous is None or previous.shape != batch_shape:
            seen = None if previous is None else f"shape {tuple(previous.shape)}"
            raise ValueError(
                f"step {state.feature} needs the feature before it, of shape "
                f"{tuple(batch_shape)}, got {seen}"
            )


def _append(columns: Tensor, new: Tensor, start: int) -> Tensor:
    """Columns with new ones from ``start`` on, in place if they are a buffer that has room."""
    if columns.shape[-1] == start:
        return torch.cat([columns, new.expand(*columns.shape[:-1], -1)], -1)
    columns[..., start : start + new.shape[-1]] = new
    return columns


def _rows_of_block(
    block: ResidualBlock, x: Tensor, columns: list[Tensor], gate: Tensor | None, start: int
) -> tuple[Tensor, list[Tensor]]:
    """
    Some units of a masked block, when those before them are known.

    :param block: the block.
    :param Tensor x: inputs of the block from number ``start`` on, shape ``batch_shape + (n,)``.
    :param columns: inputs before ``start`` of the two layers.
    :param Tensor gate: gate of the units.
    :param int start: number of the first of the units.
    :returns: these units after the block, and the inputs of the layers, the new ones included.
    """
    stop = start + x.shape[-1]
    update, grown = x, []
    for index, layer in enumerate([block.first, block.second]):
        if block.batch_norms:
            update = block.batch_norms[index].part(update, start, stop)
        update = block.activation(update)
        if index == 1:
            update = block.dropout(update)
        grown.append(_append(columns[index], update, start))
        update = layer.rows(grown[index][..., :stop], start, stop)
    return (x + update if gate is None else torch.addcmul(x, update, gate)), grown
