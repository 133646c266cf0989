"""Moving averages of weights, which vary less than the weights of any one step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["averaged", "update_average"]


def update_average(
    average: dict[str, Tensor] | None, weights: Mapping[str, Tensor], decay: float, step: int
) -> dict[str, Tensor]:
    r"""
    Take the weights of a step into an exponential moving average.

    .. math:: \bar w \leftarrow d \, \bar w + (1 - d) \, w, \qquad
        d = \min\left(\text{decay}, \frac{1 + \text{step}}{10 + \text{step}}\right)

    so that what the weights were at the start is soon forgotten.

    :param average: the average so far, changed in place; ``None`` before the first step.
    :param weights: parameters of the module by name.
    :param float decay: below 1.
    :param int step: steps taken before this one.
    :returns: the average, by the names of the parameters.
    """
    if average is None:
        return {name: weight.detach().clone() for name, weight in weights.items()}
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        # one call for all, as their number is what many small ones cost
        torch._foreach_lerp_([average[name] for name in weights], [*weights.values()], 1 - decay)
    return average


@contextmanager
def averaged(module: nn.Module, average: dict[str, Tensor] | None) -> Iterator[None]:
    """
    Let a module have averaged weights for a while.

    :param nn.Module module: the module.
    :param average: its weights in the meantime; ``None`` changes nothing.
    """
    if average is None:
        yield
        return
    parameters = dict(module.named_parameters())
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        _assign(parameters, average)
        yield
    finally:
        _assign(parameters, own)


def _assign(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
