r"""What a network puts out, and the score :math:`\nabla \log p_t` it stands for."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from .sde import SDE

__all__ = [
    "PARAMETRIZATIONS",
    "NoiseLevel",
    "Score",
    "check_finite",
    "column",
    "evaluate_score",
    "row_numbers",
]

PARAMETRIZATIONS = ("velocity", "noise", "score")


class Score(Protocol):
    """A score for rows of data, some of which may have left."""

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """
        Evaluate.

        :param Tensor x: shape ``(n,) + event_shape``.
        :param Tensor t: times, shape ``(n,)``.
        :param Tensor rows: the numbers of the rows among those of the context, shape ``(n,)``.
        :returns: shape ``(n,) + event_shape``.
        """


class NoiseLevel:
    """
    Standard deviation of the noise in what a network reads, as a function of its time.

    :param SDE sde: the diffusion.
    :param str parametrization: see :func:`evaluate_score`.
    """

    def __init__(self, sde: SDE, parametrization: str) -> None:
        self.sde, self.parametrization = sde, parametrization

    def __call__(self, t: Tensor) -> Tensor:
        """
        Evaluate.

        :param Tensor t: times as the network is given them.
        :returns: of the same shape.
        """
        if self.parametrization != "velocity":
            return self.sde.std(t)
        t = self.sde.time(t)
        std, mean_factor = self.sde.std(t), self.sde.mean_factor(t)
        return std * (std.square() + mean_factor.square()).rsqrt()


def evaluate_score(
    network: nn.Module,
    parametrization: str,
    sde: SDE,
    x: Tensor,
    t: Tensor,
    context: Tensor | None,
) -> Tensor:
    r"""
    The score from the output F of a network.

    ``"velocity"``: with standardised data in mind, what the network reads and what it has to put
    out has about unit scale at every time, and zero output is the score of standard normal data:

    .. math:: s = -\frac{x}{a^2 + \sigma^2}
        - \frac{a}{\sigma \sqrt{a^2 + \sigma^2}} F\left(\frac{x}{\sqrt{a^2 + \sigma^2}}, u\right)

    with u from 0 to 1, the natural scale of t. F is trained towards
    :math:`(a z - \sigma x_0) / \sqrt{a^2 + \sigma^2}`, noise z and datum :math:`x_0` (the
    preconditioning of Karras et al. 2022, which for variance preserving diffusions is the
    velocity of Salimans and Ho 2022).

    ``"noise"``: :math:`s = -F(x, t) / \sigma` (Ho et al. 2020; Song et al. 2021).
    ``"score"``: :math:`s = F(x, t)`.

    :param nn.Module network: called with x, times of shape ``(n,)``, and the context.
    :param str parametrization: one of the three.
    :param SDE sde: the diffusion.
    :param Tensor x: shape ``(n,) + event_shape``.
    :param Tensor t: times, shape ``(n,)``.
    :param Tensor context: rows of context, or ``None``.
    :returns: scores, shape ``(n,) + event_shape``.
    :raises ValueError: if the output of the network has another shape.
    """
    if parametrization == "score":
        return _output(network, x, t, context)
    std = column(sde.std(t), x)
    if parametrization == "noise":
        return -_output(network, x, t, context) / std
    mean_factor = column(sde.mean_factor(t), x)
    total = mean_factor.square() + std.square()
    output = _output(network, x * total.rsqrt(), sde.fraction(t), context)
    return -x / total - mean_factor * total.rsqrt() / std * output


def _output(network: nn.Module, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
    output: Tensor = network(x, t, context)
    if output.shape != x.shape:
        raise ValueError(
            f"the score network was called with x of shape {tuple(x.shape)} and returned shape "
            f"{tuple(output.shape)}: it must return the shape of x"
        )
    return output


def column(values: Tensor, like: Tensor) -> Tensor:
    """
    Give one number per row as many dimensions as the rows have.

    :param Tensor values: shape ``(n,)``.
    :param Tensor like: shape ``(n,) + event_shape``.
    :returns: shape ``(n, 1, ..., 1)``.
    """
    return values.reshape(-1, *[1] * (like.dim() - 1))


def check_finite(score: Tensor, t: Tensor) -> None:
    """
    Check scores, and name the time where they are not finite.

    :param Tensor score: shape ``(n,) + event_shape``.
    :param Tensor t: times, shape ``(n,)``.
    :raises ValueError: if one is NaN or infinite.
    """
    is_bad = ~score.isfinite().flatten(1).all(1)
    if bool(is_bad.any()):
        first = t.expand(len(score))[is_bad][0]
        raise ValueError(
            f"the score network returned NaN or infinite scores for {int(is_bad.sum())} of "
            f"{len(score)} rows, the first of them at time t={float(first):.6g}: check the "
            "network there, or start the diffusion later, by sde=VPSDE(start=1e-3), say"
        )


def row_numbers(x: Tensor) -> Tensor:
    """The numbers of all rows of x."""
    return torch.arange(len(x), device=x.device)
