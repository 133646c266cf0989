"""Training on integers, with noise that is learned."""

from __future__ import annotations

from torch import Tensor

from ..dequantization import DequantizedFlow
from .score_flow import ScoreFlow

__all__ = ["dequantized_training_loss"]


def dequantized_training_loss(
    model: DequantizedFlow, x: Tensor, context: Tensor | None = None
) -> Tensor:
    r"""
    Bound on :math:`-\log P(x)` of integers, up to a constant, for training (eq. 13).

    The denoising loss of data :math:`(x + u) / L`, plus what learned noise adds:

    .. math:: \mathbb E_{q(u \mid x)} \left[ -\log p\big((x + u) / L\big)
        + \log q(u \mid x) \right]

    with :math:`-\log p` replaced by its bound, whose gradient reaches both the score network and,
    through u, the density q of the noise.

    :param DequantizedFlow model: a :class:`~pyro_ext.distributions.ScoreFlow` with its
        dequantisation.
    :param Tensor x: integers, or real numbers with the values of integers, shape
        ``(n,) + event_shape``.
    :param Tensor context: shape ``(n, context_features)``.
    :returns: the mean over the data, one number.
    :raises TypeError: if the flow is no score flow.

    >>> from pyro_ext.distributions import DequantizedFlow, ScoreFlow, UniformDequantization
    >>> from pyro_ext.distributions.diffusion import dequantized_training_loss
    >>> model = DequantizedFlow(ScoreFlow(4, hidden_features=8), UniformDequantization(16))
    >>> dequantized_training_loss(model, torch.randint(0, 16, (10, 4))).backward()
    """
    flow = model.flow
    if not isinstance(flow, ScoreFlow):
        raise TypeError(f"model.flow must be a ScoreFlow, got a {type(flow).__name__}")
    distribution = model() if context is None else model(context)
    values, log_density = distribution.dequantize(x, num_samples=1)
    # the rest of the bound depends on u through the prior at the last time, of which the data
    # are a share of a(T)^2
    at_end = flow.sde.mean_factor(values.new_tensor(flow.sde.end)) / flow.sde.prior_std
    remains = 0.5 * (at_end * (values[0] - flow.loc) / flow.scale).square().flatten(1).sum(-1)
    loss = flow.training_loss(values[0], context)
    return loss + (remains + log_density[0]).mean()
